"""`flowrl check`: what it tells, and that it refuses what training would refuse."""

import re

import pytest
from hydra.errors import InstantiationException

from flowrl.cli.check import check, run
from flowrl.errors import UserError
from flowrl.launch import hub_files
from flowrl.launch.compose import compose
from flowrl.launch.errors import explain
from flowrl.launch.hub_files import describe_files
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.sweep_jobs import jobs_of
from flowrl.objectives import num_trained

SMALL = ("debug=smoke", "trainer.accelerator=cpu")


def test_it_tells_what_would_be_trained(tmp_path, monkeypatch):
    """And writes nothing. Mutation: make the run's folder, or leave the batch plan out."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join(check([*SMALL, "sampler=ode", "loss=nft"]))
    assert "nft (flowrl.losses.nft.NFT)" in text and "2100 prompts of flowrl.prompts" in text
    assert "2 prompts x 4 = 8" in text and "held_out" in text
    assert "embedded:pipeline: part of FlowRL" in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=0"], r"lora\.rank=0 must be"),
        (["rollout.guidance_scale=3"], r"needs model\.has_guidance"),
        (
            ["loss=nft", "sampler=ode", "penalty=velocity", "rollout.training_guidance_scale=3"],
            r"rollout\.training_guidance_scale=3(\.0)? needs model\.has_guidance",
        ),
        (["evaluation.headline=beauty"], r"evaluation\.headline=beauty: the reward has no such"),
        (["data=text", "data.prompts.path=no.txt"], r"prompts path=no\.txt: no such file"),
        (["trainer.accelerator=tpu"], r"trainer\.accelerator=tpu: none is found"),
        (["reward=ocr"], r"reward=ocr could judge none"),
        (["reward=geneval"], r"reward=geneval could judge none of .* \"tag\" and \"include\""),
        (
            ["reward=remote", "reward.url=http://127.0.0.1:9", "reward.client.start_seconds=0"],
            r"reward\.url=http://127\.0\.0\.1:9: no server there",
        ),
        (["model.pretrained=./nowhere"], r"model\.pretrained=\./nowhere: no such folder"),
        (["resume=outputs/latest"], r"resume=outputs/latest: a run is checked by its resumption"),
    ],
)
def test_it_refuses_what_training_refuses(overrides, message):
    """Mutation: leave one of the checks out."""
    with pytest.raises((UserError, InstantiationException)) as told:
        check([*SMALL, *overrides])
    assert re.search(message, explain(told.value))


def test_the_jobs_of_a_sweep_are_checked_each(capsys):
    """Mutation: check the first alone."""
    jobs = jobs_of(["seed=1,2", "tags=[a,b]"])
    assert jobs.overrides == [["seed=1", "tags=[a,b]"], ["seed=2", "tags=[a,b]"]]
    assert jobs.sweeper == ""
    run([*SMALL, "loss=grpo,dppo"], [], is_sweep=True)
    told = capsys.readouterr().out
    assert told.count("job ") == 2 and "ok, all 2 jobs" in told
    with pytest.raises(UserError, match=r"lora\.rank=0"):
        run([*SMALL, "lora.rank=4,0"], [], is_sweep=True)


def test_a_sweepers_own_parameters_are_swept(tmp_path):
    """What is typed comes before them. Mutation: look at the command line alone."""
    path = tmp_path / "debug" / "swept.yaml"
    path.parent.mkdir()
    path.write_text(
        "# @package _global_\nhydra: {sweeper: {params: {seed: '1,2', num_iterations: '3,4'}}}\n"
    )
    words = ["debug=swept", "num_iterations=5"]
    jobs = jobs_of(words, with_config_dir([], tmp_path))
    assert jobs.overrides == [
        ["seed=1", "num_iterations=5", "debug=swept"],
        ["seed=2", "num_iterations=5", "debug=swept"],
    ]


def test_a_search_is_checked_at_the_ends_of_its_ranges(capsys):
    """Its jobs are drawn later. Mutation: check the configuration without its ranges."""
    words = ["hydra/sweeper=search", "loss=grpo,dppo", "sampler.noise_level=interval(0.2,0.9)"]
    jobs = jobs_of(words)
    assert jobs.sweeper == "OptunaSweeper"
    first = {
        "loss.delta": "1e-06",
        "optimizer.lr": "0.0003",
        "sampler.noise_level": "0.2",
        "hydra/sweeper": "search",
        "loss": "grpo",
    }
    others = [
        {"loss.delta": "0.0001"},
        {"optimizer.lr": "0.003"},
        {"sampler.noise_level": "0.9"},
        {"loss": "dppo"},
    ]
    checked = [dict(word.split("=") for word in job) for job in jobs.overrides]
    assert checked == [first, *(first | other for other in others)]
    with pytest.raises(UserError, match=r"optimizer\.lr=-1\.0 must be"):
        run([*SMALL, words[0], "optimizer.lr=interval(1e-4,-1)"], [], is_sweep=True)
    assert "OptunaSweeper draws its jobs" in capsys.readouterr().out


def test_a_search_whose_ranges_are_elsewhere_is_refused():
    """Mutation: say that all is well."""
    words = ["hydra/sweeper=search", "hydra.sweeper.params=null"]
    with pytest.raises(UserError, match=r"OptunaSweeper has no ranges .*; check one job"):
        jobs_of(words)


def test_it_counts_the_steps_that_a_run_trains():
    """Those of the objective that a run builds. Mutation: count all steps of the grid."""
    from hydra.utils import instantiate

    for loss, expected in (("dppo", 2), ("nft", 5)):
        cfg = compose(["name=t", f"loss={loss}"])
        algorithm = instantiate(cfg.algorithm)
        assert num_trained(algorithm, seed=0) == expected


def test_files_are_told_by_where_they_are(tmp_path, monkeypatch):
    """Mutation: take a cached repository for one that is to come, or a missing file for one."""
    monkeypatch.setattr(hub_files, "read_index", lambda *source: {})
    monkeypatch.setattr(hub_files.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("flowrl.runs.provenance.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_files.constants, "HF_HUB_OFFLINE", False)
    place = tmp_path / "models--org--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    cfg = compose(["name=t", "model.pretrained=org/name"])
    told = "not in the local hub cache; it is downloaded when training starts"
    assert f"model.pretrained=org/name: {told}" in describe_files(cfg)
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("a" * 40) / "x.safetensors").write_bytes(b"0" * 10)
    (line,) = (line for line in describe_files(cfg) if line.startswith("model.pretrained"))
    assert "in the local hub cache at aaaaaaaaaa, 1 file, 0.0 GB" in line
    cfg.model.pretrained = "org/other"
    monkeypatch.setattr(hub_files.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"org/other: not in the local hub cache"):
        describe_files(cfg)
    cfg.model.pretrained = "embedded:pipeline"
    cfg.lora.start = str(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=r"lora\.start=.*gone\.safetensors: no such file"):
        describe_files(cfg)
