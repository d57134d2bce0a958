"""How tests start train.py, load scripts, build policies in process, and where the project's
folders are.
"""

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import forks
import torch
from hydra import compose, initialize_config_dir
from lightning import Trainer

from flowrl.launch.build import build
from flowrl.launch.compose import register_resolvers
from flowrl.training.sampling import sample_update

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SHORT = ("debug=smoke", "num_iterations=4", "viewing.every=0")
SMALL = ("num_iterations=1", "batch.updates_per_iteration=1", "batch.max_micro_batch=4")


def start(*overrides, cwd):
    """Start train.py in `cwd`, as a user would."""
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, preexec_fn=_heed_interrupts
    )


def _heed_interrupts():
    """A suite that a script started in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(*overrides, cwd, seconds=300):
    """Run train.py to its end, in a fork that has the libraries imported."""
    return forks.run(ROOT / "train.py", *overrides, cwd=cwd, seconds=seconds)


def train_as_a_user(*overrides, cwd, seconds=300):
    """Run train.py to its end in a process that is started for it."""
    process = start(*overrides, cwd=cwd)
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def load_script(name):
    """scripts/`name`.py as a module of its own, loaded anew with each call; its `main` does not
    run.
    """
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def composed(*overrides, config=CONF, base=("name=test",)):
    """A configuration, as train.py composes it."""
    register_resolvers()
    with initialize_config_dir(str(config), version_base="1.3"):
        return compose("config", overrides=[*base, *overrides])


def make(*overrides, config=CONF, base=("name=test", "debug=smoke")):
    """Policy, data and evaluator of a composed configuration."""
    return build(composed(*overrides, config=config, base=base))


def awake(policy):
    """The policy with LoRA weights away from zero."""
    with torch.no_grad():
        for i, parameter in enumerate(policy.tuning.parameters().values()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    return policy


def put(policy, **parts):
    """Replace parts of a policy's method, which is frozen."""
    for name, part in parts.items():
        object.__setattr__(policy.algorithm, name, part)
        if name == "loss":
            policy.objective.loss = part


def draw(policy, batch, rows):
    """The samples numbered `rows`, whose prompts have the same stochastic steps."""
    [micro_batch] = sample_update(policy, batch, 0, [rows])
    return micro_batch


def first_batch(policy, data):
    """The first iteration's rollout, a part for each micro-batch."""
    return [
        draw(policy, data.iterations[0], rows)
        for update in policy.plan.updates(0)
        for rows in update
    ]


def fit(policy, data):
    """All iterations of `data`, without files or trackers."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(policy, datamodule=data)


def term_loss(policy, batch, index, record=None):
    """The loss of a micro-batch's `index`-th term; its metrics go into `record`."""
    output = policy.objective.term(batch, index, policy.num_optimizer_steps)
    if record is not None:
        for name, value in output.metrics.items():
            record.add(name, value, term=(policy.num_optimizer_steps, index))
    return output.loss
