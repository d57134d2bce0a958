"""The programs behind the command `flowrl`, each a module; in a checkout train.py and scripts/ are
doors to the same.
"""

PROGRAMS = {
    "train": ("train.py", "train a policy, or with -m the jobs of a sweep"),
    "evaluate": ("evaluate.py", "compare base models, runs and LoRA files on one page"),
    "generate": ("generate.py", "draw prompts with a base model and a LoRA, side by side"),
    "report": ("report.py", "compare runs on one page: curves, tables, samples"),
    "study": ("study.py", "run, collect and write up the studies below experiments/"),
    "serve": ("serve_reward.py", "serve a reward over HTTP, for reward=remote to ask"),
    "vote": ("", "vote on a run's pictures in a browser, for reward=votes"),
    "doctor": (
        "reward_doctor.py",
        "examine a reward: does it order, repeat, how fast is it",
    ),
    "plan": ("plan_memory.py", "estimate GPU memory and the largest micro-batch that fits"),
    "parity": ("check_model.py", "compare a derived model with its stock pipeline"),
    "check": ("", "check what training is given: values, prompts, servers, files"),
    "new": ("", "write a project of your own, with a reward and a loss"),
    "push": ("push_run.py", "share a finished run on the hub, with a model card"),
    "runs": ("list_runs.py", "list the runs below a folder: state, progress, headline"),
    "export": ("export_lora.py", "convert a run's LoRA for diffusers, peft or ComfyUI"),
}
"""The subcommands, each with its door in a checkout, where it has one, and what it does."""
