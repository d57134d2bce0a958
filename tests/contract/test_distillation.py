"""Teachers beside a student on the embedded model: what they compute, whom they teach, and what is
refused.
"""

import re

import pytest
import torch
from hydra.errors import InstantiationException
from runs import awake, composed, draw, fit, make, put, term_loss

from flowrl.errors import UserError
from flowrl.gaussian import Likelihood
from flowrl.launch.build import prepare
from flowrl.launch.errors import explain
from flowrl.launch.lora_keys import take_from_file
from flowrl.launch.teachers import keep_copies, nodes_of, refuse_other_teachers, with_copies
from flowrl.models.outline import outline
from flowrl.models.sd3 import SD3
from flowrl.training.metric_means import Record
from flowrl.tuning.formats import read
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.writer import write

SMALL = ("loss=opd", "num_threads=1", "evaluation.max_prompts=2", "num_iterations=1")
SMALL += ("data.prompts.count=4", "data.prompts.families=[counting,position]")
FROM_FILE = ("lora.rank=null", "lora.alpha=null", "lora.targets=null")
LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.1.ff.net.2",
)
ROUTES = {"counting": "one", "position": "other"}


def lora(folder, seed, rank):
    """A LoRA for the embedded model, also of a layer that the model's own recipe leaves out."""
    generator = torch.Generator().manual_seed(seed)
    network = dict(outline(composed().model).named_modules())
    a, b = {}, {}
    for name in LAYERS:
        layer = network[name]
        a[name] = 0.1 * torch.randn(rank, layer.in_features, generator=generator)
        b[name] = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
    return write(LoRAFile(a, b, dict.fromkeys(LAYERS, 2.0 * rank)), folder, "comfy")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("teachers")
    return {"one": lora(place / "one", 1, 4), "other": lora(place / "other", 2, 2)}


def two(files):
    """Both teachers, each for one of the two families."""
    one = f"{{lora: {files['one']}, families: [counting]}}"
    return f"teachers={{one: {one}, other: {{lora: {files['other']}, families: [position]}}}}"


def alone(file):
    return f"teachers={{only: {{lora: {file}}}}}"


def mean_of(policy, batch, index, places=None):
    """The teachers' means of a step, without a gradient."""
    method = policy.algorithm
    places = range(len(batch.rows)) if places is None else places
    teachers = policy.objective.context.teachers
    return teachers.mean(batch, list(places), index, method.intervals, method.sampler)


def test_a_teacher_is_the_base_with_its_lora(files):
    """Bitwise what a policy that begins from the file computes, and nothing is left of it
    afterwards; its weights are none of the network's.

    Mutation: another scale, the student's adapter under it, or a hook that stays.
    """
    policy, data, _ = make(*SMALL, alone(files["one"]))
    awake(policy)
    batch = draw(policy, data.iterations[0], range(4))
    before = policy.objective.replay(batch, 0).mean.detach()
    found = mean_of(policy, batch, 0)
    assert torch.equal(policy.objective.replay(batch, 0).mean, before)
    begun, _, _ = make(*SMALL, alone(files["one"]), f"lora.start={files['one']}", *FROM_FILE)
    expected = begun.objective.replay(batch, 0).mean
    assert torch.equal(found, expected) and not found.requires_grad
    assert not torch.allclose(found, before, atol=1e-3)
    names = {name for name, _ in policy.transformer.named_parameters()}
    assert len(policy.tuning.parameters()) == sum(".policy." in name for name in names)


@pytest.mark.parametrize("student", ["tuning=full", "lora.start", "lora.compute=merged"])
def test_a_teacher_does_not_follow_the_student(files, student):
    """Whatever of the student is trained, and where it began. Mutation: a teacher on top of what
    the student began from, or of its weights of now.
    """
    words = (student,) if "=" in student else (f"lora.start={files['other']}", *FROM_FILE)
    plain, data, _ = make(*SMALL, alone(files["one"]))
    batch = draw(plain, data.iterations[0], range(4))
    policy, _, _ = make(*SMALL, alone(files["one"]), *words)
    with torch.no_grad():
        for value in policy.tuning.parameters().values():
            value.add_(0.01)
    moved = policy.objective.replay(batch, 0).mean.detach()
    torch.testing.assert_close(mean_of(policy, batch, 0), mean_of(plain, batch, 0))
    assert torch.equal(policy.objective.replay(batch, 0).mean, moved)


def families_of(batch):
    return [prompt.family for prompt in batch.prompts]


def test_each_sample_has_the_teacher_of_its_family(files):
    """In a micro-batch of both, also at the first step, where the samples of a prompt are equal.

    Mutation: the first teacher for all, or means in the order of the teachers.
    """
    policy, data, _ = make(*SMALL, two(files))
    awake(policy)
    single = {name: make(*SMALL, alone(file))[0] for name, file in files.items()}
    # The first prompt of the iteration has family one, and the second the other, in turns.
    batch = draw(policy, data.iterations[0], range(8))
    assert set(families_of(batch)) == {"counting", "position"}
    for index in range(2):
        found = mean_of(policy, batch, index)
        of_each = {name: mean_of(other, batch, index) for name, other in single.items()}
        for row, family in enumerate(families_of(batch)):
            ours = of_each[ROUTES[family]][row]
            torch.testing.assert_close(found[row], ours, rtol=1e-4, atol=1e-5)
            theirs = of_each[ROUTES[families_of(batch)[row - 4]]][row]
            assert not torch.allclose(found[row], theirs, atol=1e-3)
        some = mean_of(policy, batch, index, [6, 1])
        torch.testing.assert_close(some, found[[6, 1]], rtol=1e-4, atol=1e-5)


def test_a_teacher_is_asked_for_its_own_samples_alone(files, monkeypatch):
    """Mutation: pass all samples through each teacher."""
    policy, data, _ = make(*SMALL, two(files), "rollout.shared_initial_noise=false")
    batch = draw(policy, data.iterations[0], range(8))
    counts = []
    velocity = policy.model.velocity

    def counted(x, *rest):
        counts.append(len(x))
        return velocity(x, *rest)

    monkeypatch.setattr(policy.model, "velocity", counted)
    mean_of(policy, batch, 1)
    mean_of(policy, batch, 1, [0, 1, 5])
    # The first four are of one prompt, the others of another.
    assert counts in ([4, 4, 2, 1], [4, 4, 1, 2])


def test_the_loss_is_the_kl_to_them(files):
    """|mean - teacher_mean|^2 / (2 std^2), a mean over pixels and over samples, whose gradient is
    that of the loss. Mutation: the KL to the rollout's own policy.
    """
    policy, data, _ = make(*SMALL, two(files))
    awake(policy)
    batch = draw(policy, data.iterations[0], range(8))
    for index in range(2):
        step = policy.objective.replay(batch, index)
        by_hand = (step.mean - mean_of(policy, batch, index)).square().mean() / (2 * step.std**2)
        loss = term_loss(policy, batch, index)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
        weights = list(policy.tuning.parameters().values())
        ours = torch.autograd.grad(loss, weights, allow_unused=True)
        theirs = torch.autograd.grad(by_hand, weights, allow_unused=True)
        for got, wanted in zip(ours, theirs, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-7)


def test_a_student_that_is_its_teacher_is_at_a_distance_of_exactly_0(files):
    """Bitwise, at every step, with no gradient; and a run that can learn nothing says so.

    Mutation: evaluate the teacher in another batch shape, or at another guidance scale.
    """
    policy, data, _ = make(*SMALL, alone(files["one"]), f"lora.start={files['one']}", *FROM_FILE)
    batch = draw(policy, data.iterations[0], range(8))
    for index in range(2):
        record = Record()
        loss = term_loss(policy, batch, index, record)
        assert loss.item() == 0 and record.means()["teacher/kl/only"] == 0
        for gradient in torch.autograd.grad(loss, list(policy.tuning.parameters().values())):
            assert not gradient.any()


def test_samples_train_on_their_own_steps_alone(files):
    """The mean is over trained pairs of sample and step. Mutation: teach the other samples too."""
    words = ("steps=all_but_last", "trained=random_share", "trained.share=0.5")
    policy, data, _ = make(*SMALL, two(files), *words)
    awake(policy)
    batch = draw(policy, data.iterations[0], range(8))
    objective = policy.objective
    for index, number in enumerate(batch.trajectory.steps):
        rows = objective._trained(batch).at(number)
        if not rows:
            continue
        step = objective.replay(batch, index)
        means = mean_of(policy, batch, index)
        kl = (step.mean - means).square().mean((1, 2, 3)) / (2 * step.std**2)
        output = objective.term(batch, index, 0)
        pairs = len(batch.rows) * objective._trained(batch).num_trained
        expected = kl[rows].sum() * objective.num_terms(batch) / pairs * len(batch.rows) / 8
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
        for name, family in (("one", "counting"), ("other", "position")):
            own = [row for row in rows if families_of(batch)[row] == family]
            assert output.counts.get(f"teacher/kl/{name}", 0) == len(own)
            if own:
                found = output.metrics[f"teacher/kl/{name}"].item()
                assert found == pytest.approx(kl[own].mean().item(), rel=1e-4)


def test_the_distances_do_not_depend_on_micro_batches(files):
    """Of one iteration in which one teacher has three prompts and the other one. Mutation: pool
    means of unequally many samples as if there were as many.
    """
    words = ("data.prompts.count=40", "batch.prompts_per_iteration=5", "batch.group_size=2")
    words += ("batch.updates_per_iteration=1", "optimizer.lr=1e-9", "steps=all_but_last")
    found = []
    for size in (10, 5, 1):
        policy, data, _ = make(*SMALL, two(files), *words, f"batch.max_micro_batch={size}")
        fit(policy, data)
        found.append({k: v for k, v in policy.last_metrics.items() if k.startswith("teacher/")})
    assert found[0].keys() == {"teacher/kl/one", "teacher/kl/other"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_groups_of_one_and_missing_rewards_are_no_hindrance(files):
    """A run without a single reward distils all the same. Mutation: stop it, or ask for groups."""
    words = ("batch.prompts_per_iteration=4", "batch.group_size=1")
    policy, data, _ = make(*SMALL, two(files), *words)

    def broken(images, prompts):
        raise RuntimeError("no scorer")

    policy.reward.reward = broken
    before = {name: value.detach().clone() for name, value in policy.tuning.parameters().items()}
    fit(policy, data)
    assert policy.last_metrics["reward/missing"] == 1
    after = policy.tuning.parameters()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    policy.learning.check(1)
    with pytest.raises(UserError, match=r"batch\.group_size=1 must be at least 2"):
        prepare(composed("debug=smoke", *words))


def test_a_penalty_is_added_and_sums_are_sums(files):
    """Both distances under the run's reduction. Mutation: leave the penalty out."""
    policy, data, _ = make(*SMALL, alone(files["one"]), "penalty=kl", "penalty.beta=0.5")
    awake(policy)
    batch = draw(policy, data.iterations[0], range(4))
    output = policy.objective.term(batch, 1, 0)
    total = output.metrics["loss/policy"] + 0.5 * output.metrics["loss/penalty"]
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert output.metrics["loss/penalty"] > 0
    mean = output.metrics["teacher/kl/only"].item()
    put(policy, likelihood=Likelihood(reduction="sum", form="gaussian"))
    summed = policy.objective.term(batch, 1, 0).metrics["teacher/kl/only"].item()
    assert summed == pytest.approx(mean * batch.trajectory.x0[0].numel(), rel=1e-4)


REFUSED = {
    "no teachers": (("loss=opd",), r"^loss=opd needs teachers: give teachers="),
    "another loss": (
        ("loss=dppo", "teachers={{a: {{lora: {one}}}}}"),
        r"^teachers=\['a'\] are given, of which loss=dppo would learn nothing",
    ),
    "a forward loss": (
        (
            "loss=nft",
            "sampler=ode",
            "rollout.shared_initial_noise=false",
            "penalty=none",
            "teachers={{a: {{lora: {one}}}}}",
        ),
        r"of which loss=nft would learn nothing",
    ),
    "a deterministic sampler": (
        ("sampler=ode", "teachers={{a: {{lora: {one}}}}}"),
        r"sampler=ode is deterministic",
    ),
    "a family without a teacher": (
        ("teachers={{a: {{lora: {one}, families: [counting]}}}}",),
        r"^teachers: none is for family 'position' of 2 prompts of data, such as '",
    ),
    "two for one family": (
        (
            "teachers={{a: {{lora: {one}, families: [counting]}}, "
            "b: {{lora: {one}, families: [position, counting]}}}}",
        ),
        r"^teachers\.b\.families names 'counting', as does teachers\.a\.families",
    ),
    "two for all others": (
        ("teachers={{a: {{lora: {one}}}, b: {{lora: {one}}}}}",),
        r"^teachers\.b\.families=null and teachers\.a\.families=null",
    ),
    "a family that one teacher names twice": (
        ("teachers={{a: {{lora: {one}, families: [counting, counting]}}, b: {{lora: {one}}}}}",),
        r"^teachers\.a\.families names 'counting' twice; once is enough$",
    ),
    "a family that no prompt has": (
        ("teachers={{a: {{lora: {one}, families: [countin]}}, b: {{lora: {one}}}}}",),
        r"^teachers\.a\.families names 'countin', which no prompt of data has; .* 'counting'",
    ),
    "a teacher of no prompt": (
        ("teachers={{a: {{lora: {one}, families: [counting, position]}}, b: {{lora: {one}}}}}",),
        r"^teachers\.b\.families=null is for no prompt of data",
    ),
    "a file that is not there": (
        ("teachers={{a: {{lora: nowhere}}}}",),
        r"nowhere: no such file or folder",
    ),
    "guidance without a negative prompt": (
        ("teachers={{a: {{lora: {one}, guidance_scale: 4.5}}}}",),
        r"^teachers\.a\.guidance_scale=4\.5 needs model\.has_guidance=true",
    ),
    "a compiled network": (
        ("backend.compile=true", "teachers={{a: {{lora: {one}}}}}"),
        r"^loss=opd does not go with backend\.compile=true",
    ),
    "credit for steps": (
        (
            "rollout.credit=step",
            "steps=all_but_last",
            "advantage=global_std",
            "teachers={{a: {{lora: {one}}}}}",
        ),
        r"^rollout\.credit=step scores unfinished samples for advantages, which loss=opd does not",
    ),
    "divided weights": (
        ("trainer=fsdp", "teachers={{a: {{lora: {one}}}}}"),
        r"^loss=opd is not tested with trainer=fsdp",
    ),
    "a name that is no name": (
        ("teachers={{a/b: {{lora: {one}}}}}",),
        r"^teachers\.a/b: a teacher's name is one of letters",
    ),
    "another model's": (
        ("teachers={{a: {{lora: {odd}}}}}",),
        r"none of its 3 layers fit this SD3Transformer2DModel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_distilled_is_refused_before_weights_load(
    files, case, monkeypatch, tmp_path
):
    """In one line that names the key. Mutation: drop any of these rules."""
    monkeypatch.setattr(SD3, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    words, pattern = REFUSED[case]
    good = read(files["one"])
    a, b = ({f"other.{name}": value for name, value in group.items()} for group in (good.a, good.b))
    odd = write(LoRAFile(a, b, {}), tmp_path / "odd", "comfy")
    with pytest.raises((UserError, InstantiationException)) as error:
        make(*SMALL, *(word.format(one=files["one"], odd=odd) for word in words))
    text = explain(error.value)
    assert re.search(pattern, text) and "\n" not in text, text


def test_a_run_keeps_its_teachers(files, tmp_path):
    """Whatever becomes of the files; a resumed run is told of no others. Mutation: read the file
    again, or write the copy's path into the configuration.
    """
    source = tmp_path / "mine.safetensors"
    source.write_bytes(files["one"].read_bytes())
    cfg = composed(alone(source))
    run = tmp_path / "run"
    assert with_copies(cfg, run) is cfg
    keep_copies(cfg, run)
    source.unlink()
    keep_copies(cfg, run)
    copied = nodes_of(with_copies(cfg, run))["only"]["lora"]
    kept, given = read(run / "teachers" / "only"), read(files["one"])
    assert copied == str(run / "teachers" / "only") and cfg.teachers.only.lora == str(source)
    assert kept.alpha == given.alpha
    assert all(torch.equal(kept.b[name], value) for name, value in given.b.items())
    with pytest.raises(UserError, match=r"^teachers\.only\.lora=x: a resumed run keeps the teach"):
        refuse_other_teachers(["teachers.only.lora=x"])
    refuse_other_teachers(["teachers.only.guidance_scale=2", "lora.rank=2"])


def test_paths_of_teachers_do_not_depend_on_where_a_run_is_resumed(files, monkeypatch):
    """What is no teacher, or has no file yet, is left to the checks of all values. Mutation: keep
    the path as it was typed.
    """
    monkeypatch.chdir(files["one"].parent)
    cfg = composed("teachers={a: {lora: lora.safetensors}, b: {families: [x]}, c: 5}")
    take_from_file(cfg, [])
    assert cfg.teachers == {
        "a": {"lora": str(files["one"])},
        "b": {"families": ["x"]},
        "c": 5,
    }
    take_from_file(composed("teachers=runs/a"), [])
