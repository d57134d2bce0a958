"""The LoRA of a run's folder: its export, or else its newest whole checkpoint."""

import pytest
import torch
from lora_weights import LAYERS, checkpoint_of, given, mixed

from flowrl.evaluation.subjects import Subject
from flowrl.runs import checkpoint
from flowrl.tuning.formats import find, read
from flowrl.tuning.writer import write


def test_a_checkpoint_is_read_at_the_alpha_of_its_run(tmp_path):
    """The configuration's, or layer by layer that of the LoRA it began from. Mutation: take the
    rank for alpha.
    """
    file = checkpoint_of(tmp_path, mixed()) / "ema.safetensors"
    with pytest.raises(ValueError, match=r"does not tell its alpha.*export_lora.py"):
        read(file)
    (tmp_path / "config.yaml").write_text("lora: {rank: 4, alpha: 8}\n")
    for source in (file, tmp_path):
        assert read(source).alpha == dict.fromkeys(LAYERS, 8.0)
    write(mixed(), tmp_path / "start", "comfy")
    (tmp_path / "config.yaml").write_text("lora: {rank: null, alpha: null}\n")
    assert read(tmp_path).alpha == mixed().alpha


def test_a_runs_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    """As training takes it, said once though it is asked twice. Mutation: take the last folder with
    a state.json.
    """
    for number in (1, 2):
        path = checkpoint.save(
            tmp_path / "checkpoints",
            keep=2,
            weights={"ema": {"a": torch.ones(2)}},
            state={"num_iterations": number},
        )
    (path / "ema.safetensors").write_bytes(b"cut")
    for _ in range(2):
        assert find(tmp_path) == tmp_path / "checkpoints" / "000001" / "ema.safetensors"
    (message,) = caplog.messages
    assert "000002/ema.safetensors is damaged" in message and "going on from" in message
    assert Subject.read(str(tmp_path)).weights() == [find(tmp_path)]


def test_a_sweeps_job_is_named_by_sweep_and_number(tmp_path):
    """Mutation: call it 0, as every sweep's first."""
    job = tmp_path / "outputs" / "04-52-30-sweep" / "0"
    (job / "lora").mkdir(parents=True)
    assert Subject.read(str(job)).label == "04-52-30-sweep-0"
    assert Subject.read(str(job / "lora")).label == "04-52-30-sweep-0"
    (job.parent / "04-52-30-run").mkdir()
    assert Subject.read(str(job.parent / "04-52-30-run")).label == "04-52-30-run"


def test_a_run_is_its_export_or_else_its_newest_checkpoint(tmp_path):
    """Mutation: the checkpoint over the export, or what it began from."""
    weights = given()
    write(mixed(), tmp_path / "start", "comfy")
    newest = checkpoint_of(tmp_path, weights)
    assert find(tmp_path) == newest / "ema.safetensors"
    export = write(weights, tmp_path / "lora", "diffusers")
    assert find(tmp_path) == find(tmp_path / "lora") == find(export) == export
