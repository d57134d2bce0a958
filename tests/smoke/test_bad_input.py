"""A user's mistake ends in one line that names the key or path and the remedy, before training,
with status 1.
"""

import shutil
from pathlib import Path

import pytest
from runs import train, train_as_a_user

from flowrl.models.loading import resolve

CASES = {
    "unknown key": (["sampler.noise_levle=0.5"], ["sampler.noise_levle", "noise_level"]),
    "unknown first word": (["los.delta=1e-5"], ["los.delta", "'loss.delta'"]),
    "unknown top key": (["num_iteration=5"], ["num_iteration", "num_iterations"]),
    "unknown option": (["sampler=cpss"], ["sampler=cpss", "cps", "flow_sde"]),
    "unknown option of a sweep": (["-m", "sampler=cpss", "seed=0,1"], ["sampler=cpss", "flow_sde"]),
    "resume in a sweep": (["-m", "resume=sweep"], ["resume= in a sweep stands alone"]),
    "no threshold": (
        ["loss.delta=abc"],
        ["loss.delta=abc must be", "a number of at least 0 (inf switches it off) or auto"],
    ),
    "no GPU": (
        ["trainer.accelerator=tpu"],
        ["trainer.accelerator=tpu: none is found on this machine; take cpu or auto"],
    ),
    "group of one": (["batch.group_size=1"], ["batch.group_size=1", "at least 2"]),
    "uneven updates": (
        ["batch.updates_per_iteration=7"],
        ["batch.updates_per_iteration=7", "multiple of 7"],
    ),
    "no stochastic step": (["steps.count=0"], ["steps.count=0", "at least 1"]),
    "deterministic sampler": (["sampler=ode"], ["sampler=ode", "loss=nft"]),
    "zero-variance step": (["steps.high=6"], ["step 5", "zero-variance"]),
    "step out of range": (["steps.high=9"], ["steps.high", "rollout.num_steps=6"]),
    "missing model": (
        ["model.pretrained=/no/such/folder"],
        ["model.pretrained=/no/such/folder", "no such folder"],
    ),
    "missing resume": (
        ["resume=no/such/run"],
        ["resume=no/such/run", "no such folder", "earlier run"],
    ),
    "output below a file": (["run_dir={file}/run"], ["run_dir"]),
    "missing prompts": (["data=text", "data.prompts.path=no.txt"], ["no.txt", "no such file"]),
    "average that never moves": (["ema.every=5"], ["ema.every=5", "the run's 4 optimizer steps"]),
    "value of a wrong kind": (["batch.group_size=many"], ["group_size", "many"]),
}
STARTED = ("unknown key", "unknown option of a sweep", "uneven updates")
"""What a user starts for these, so that the line is seen to be alone: refused before PyTorch is
imported, and after. The other cases are forks.
"""


@pytest.mark.parametrize("case", CASES)
def test_one_line(case, tmp_path):
    """Mutation: let the exception through (a traceback), or drop the offending name from the
    message.
    """
    overrides, expected = CASES[case]
    (tmp_path / "file").write_text("")
    begin = train_as_a_user if case in STARTED else train
    result = begin(
        *(text.format(file=tmp_path / "file") for text in overrides), "debug=smoke", cwd=tmp_path
    )
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 1
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    assert all(text in errors[0] for text in expected), errors[0]
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob("*/*"))


def test_corrupt_weights_are_named(tmp_path):
    """Mutation: report only the exception's type."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("embedded:pipeline"), folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = train("debug=smoke", f"model.pretrained={folder}", cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 1
    assert (
        len(errors) == 1
        and "corrupt weights file" in errors[0]
        and str(Path("transformer")) in errors[0]
    ), result.stderr
