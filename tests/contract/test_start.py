"""Training that begins from a LoRA: its weights, its scale, the reference, and what of it is a
copy.
"""

import re
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from lightning import Trainer
from runs import awake, composed, draw, fit, make

from flowrl.api import load
from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop
from flowrl.cli.check import check
from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.errors import explain
from flowrl.launch.lora_keys import take_from_file
from flowrl.launch.start import keep_copy, refuse_other_start, with_copy
from flowrl.models.outline import outline
from flowrl.models.sd3 import SD3
from flowrl.tuning.formats import read
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.writer import write

FROM_FILE = ("lora.rank=null", "lora.alpha=null", "lora.targets=null")
SMALL = ("data.prompts.count=8", "num_threads=1", "evaluation.max_prompts=2", "num_iterations=1")
LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.1.ff.net.2",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A LoRA for the embedded model, of two ranks and scales, with layers that its own
    configuration leaves out.
    """
    torch.manual_seed(0)
    network = dict(outline(composed().model).named_modules())
    ranks = dict(zip(LAYERS, (4, 2, 2), strict=True))
    a = {name: 0.1 * torch.randn(rank, network[name].in_features) for name, rank in ranks.items()}
    b = {name: 0.1 * torch.randn(network[name].out_features, rank) for name, rank in ranks.items()}
    alpha = dict(zip(LAYERS, (4.0, 4.0, 1.0), strict=True))
    return write(LoRAFile(a, b, alpha), tmp_path_factory.mktemp("start"), "comfy")


def begun(start, *overrides):
    return make(f"lora.start={start}", *FROM_FILE, *SMALL, *overrides)


def fused(start):
    """The base with the LoRA added to its own weights, under an adapter that is zero."""
    policy, _, _ = make(*SMALL, "lora.targets=proj_out")
    given = read(start)
    with torch.no_grad():
        for name, a in given.a.items():
            scale = given.alpha[name] / a.shape[0]
            policy.transformer.get_submodule(name).weight += scale * given.b[name] @ a
    return policy


def velocities(policy, other, data):
    """The velocity of a policy and of something else that has one, at the policy's first
    samples.
    """
    part = draw(policy, data.iterations[0], range(4))
    x, conditioning = part.trajectory.x0, part.conditioned.conditioning()
    return policy.velocity(x, 0.5, conditioning).detach(), other.velocity(
        x, 0.5, conditioning
    ).detach()


def test_training_begins_from_the_lora(start):
    """At its scale, layer by layer; weights and average alike. Mutation: one scale for all layers,
    fresh weights, or an average that begins elsewhere.
    """
    policy, data, _ = begun(start)
    ours, theirs = velocities(policy, fused(start), data)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    given, parameters = read(start), policy.tuning.parameters()
    assert len(parameters) == 2 * len(LAYERS)
    for name in LAYERS:
        for part, matrices in (("A", given.a), ("B", given.b)):
            key = f"{name}.lora_{part}.policy.weight"
            assert torch.equal(parameters[key], matrices[name]) and torch.equal(
                policy.ema.weights[key], matrices[name]
            )
            assert parameters[key].requires_grad


def test_the_reference_is_the_start_or_the_base(start):
    """Also after the weights have moved, and the trained ones come back. Mutation: refer to the
    base whatever is asked for, to the trained weights, or leave the reference in place.
    """
    base, data, _ = make(*SMALL)
    for reference, other in (("start", fused(start)), ("base", base)):
        policy, data, _ = begun(start, f"lora.reference={reference}")
        awake(policy)
        before = {
            name: value.detach().clone() for name, value in policy.tuning.parameters().items()
        }
        ref, expected = (
            velocities(policy, policy.reference, data)[1],
            velocities(policy, other, data)[1],
        )
        torch.testing.assert_close(ref, expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(before[name], p) for name, p in policy.tuning.parameters().items())


@pytest.mark.parametrize("reference", ["start", "base"])
def test_penalty_and_drift_are_measured_from_the_reference(start, reference):
    """Zero where training begins at it, in training and in evaluation, and not zero from the base.

    The gate has passed, and an update has moved the weights but not the reference. Mutation:
    another reference in one of the two.
    """
    policy, data, evaluator = begun(start, "penalty=kl", f"lora.reference={reference}")
    drift = evaluator.evaluate(policy).metrics["eval/held_in/kl_ref"]
    fit(policy, data)
    assert policy.has_passed_gate
    # The first of two updates is at the start.
    assert (drift == 0) == (reference == "start") and policy.last_metrics["loss/penalty"] > 0
    if reference == "start":
        key = f"{LAYERS[0]}.lora_B.policy.weight"
        kept, trained = (
            policy.tuning.reference[key],
            policy.tuning.parameters()[key],
        )
        assert torch.equal(kept, read(start).b[LAYERS[0]]) and not torch.equal(kept, trained)


def test_diffusion_nfts_old_policy_begins_there_too(start):
    """Mutation: an old policy of fresh weights."""
    policy, data, _ = begun(start, "experiment=diffusion_nft")
    given = read(start)
    assert all(
        torch.equal(policy.objective.old[f"{name}.lora_B.policy.weight"], given.b[name])
        for name in LAYERS
    )
    fit(policy, data)


def test_what_is_exported_is_read_again(start, tmp_path):
    """The average, at the scales it was trained with. Mutation: one alpha for all layers."""
    policy, _, _ = begun(start)
    awake(policy)
    policy.ema.start(policy.tuning.parameters())
    saver = Checkpoint(
        record=RunRecord(folder=str(tmp_path)), stop=Stop(), folder=str(tmp_path), every=1, keep=1
    )
    saver.export(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), policy)
    again = read(tmp_path)
    assert again.alpha == read(start).alpha and again.ranks == read(start).ranks
    assert all(
        torch.equal(again.b[n], policy.ema.weights[f"{n}.lora_B.policy.weight"]) for n in LAYERS
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "lora.rank=8",
            r"lora\.rank=8, but lora\.start=.* has rank 2 and 4; lora\.rank=null takes its",
        ),
        ("lora.alpha=2", r"lora\.alpha=2.*has alpha 1 and 4; lora\.alpha=null takes its"),
        ("lora.targets=.*attn\\.to_q", "matches 3 layers, 1 of which are among the 3"),
        ("tuning=full", r"lora\.start=.* is for tuning=lora.*fuse"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_load(start, change, words, monkeypatch):
    """With both numbers and the remedy. Mutation: take the file's without a word, or load the model
    first.
    """

    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(SD3, "__init__", load)
    with pytest.raises((UserError, InstantiationException)) as error:
        begun(start, change)
    assert re.search(words, explain(error.value))


def test_a_lora_of_another_model_is_refused_before_weights_load(start, monkeypatch, tmp_path):
    """Mutation: leave it to the loaded model."""
    odd = read(start)
    a, b = ({f"other.{name}": value for name, value in group.items()} for group in (odd.a, odd.b))
    write(LoRAFile(a, b, {}), tmp_path, "comfy")
    monkeypatch.setattr(SD3, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="none of its 3 layers fit this SD3Transformer2DModel"):
        begun(tmp_path)


def test_null_needs_a_start():
    """Mutation: an adapter of no rank."""
    with pytest.raises(InstantiationException) as error:
        make("lora.rank=null")
    assert explain(error.value).startswith("lora.rank=null is for lora.start=FILE")


def test_what_the_command_line_leaves_open_is_the_files(start, monkeypatch):
    """Mutation: keep the model's rank beside a LoRA of another, forget one that was typed, or keep
    a path that depends on where the run was started.
    """
    cfg = compose([f"lora.start={start.name}", "lora.alpha=8"])
    monkeypatch.chdir(start.parent)
    take_from_file(cfg, [f"lora.start={start.name}", "lora.alpha=8"])
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (None, 8, None)
    assert cfg.lora.start == str(start) and cfg.tuning.rank is None
    plain = compose([])
    before = plain.copy()
    take_from_file(plain, [])
    assert plain == before


def test_a_check_and_a_notebook_take_it_as_a_launch_does(start):
    """With the file's ranks and layers, which are not the model's. Mutation: compare it with those
    of a fresh adapter.
    """
    words = ("debug=smoke", f"lora.start={start}", *SMALL)
    assert any("lora.start=" in line and "on this machine" in line for line in check(words))
    with pytest.raises(UserError, match=r"lora\.rank=8, but lora\.start=.* has rank 2 and 4"):
        check([*words, "lora.rank=8"])
    experiment = load(*words)
    assert experiment.cfg.lora.rank is None
    parameters = experiment.policy.tuning.parameters()
    assert {tensor.shape[0] for name, tensor in parameters.items() if "lora_A" in name} == {2, 4}


def test_a_run_keeps_what_it_began_from(start, tmp_path):
    """Whatever becomes of the file. Mutation: read the file again, or write the copy's path into
    the configuration.
    """
    source = tmp_path / "mine.safetensors"
    source.write_bytes(start.read_bytes())
    cfg = compose([f"lora.start={source}"])
    run = tmp_path / "run"
    assert with_copy(cfg, run) is cfg
    keep_copy(cfg, run)
    source.unlink()
    keep_copy(cfg, run)
    assert read(Path(with_copy(cfg, run).tuning.start)).alpha == read(start).alpha
    assert cfg.lora.start == str(source)


@pytest.mark.parametrize("item", ["lora.start=x", "++lora.start=x"])
def test_a_resumed_run_begins_where_it_began(item):
    """Mutation: take the new file's name, and go on with the weights of the old one."""
    with pytest.raises(UserError, match="a resumed run keeps the LoRA that it began from"):
        refuse_other_start(["seed=1", item], "/a/lora")
    refuse_other_start(["lora.reference=base", "++lora.start=/a/lora"], "/a/lora")


def test_the_same_start_in_other_words_is_no_other(tmp_path, monkeypatch):
    """A path of the launch's folder, one in quotes, or null where there was none: the run keeps
    absolute paths. Mutation: compare texts.
    """
    monkeypatch.chdir(tmp_path)
    kept = str(tmp_path / "my lora")
    for item in ("lora.start='my lora'", f'++lora.start="{kept}"', 'lora.start="./my lora"'):
        refuse_other_start([item], kept)
    refuse_other_start(["lora.start=null", "~lora.start"], None)
    for item, start in (("lora.start=null", kept), ("lora.start=my", kept), ("lora.start=x", None)):
        with pytest.raises(UserError, match=rf"^{item}: a resumed run keeps the LoRA"):
            refuse_other_start([item], start)
