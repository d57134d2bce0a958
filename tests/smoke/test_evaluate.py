"""scripts/evaluate.py on a finished run: the run's own numbers, resumable, on one page."""

import json
import shutil

import pytest
import torch
from hydra.errors import ConfigCompositionException
from PIL import Image
from runs import make
from safetensors.torch import load_file, save_file

from flowrl.cli import arguments, generate
from flowrl.cli import evaluate as evaluate_program
from flowrl.cli import export as export_lora
from flowrl.errors import UserError
from flowrl.tuning.layer_names import NAMES


@pytest.fixture(scope="module")
def script():
    return evaluate_program


@pytest.fixture(scope="module")
def evaluate(script):
    return lambda *words: script.run(
        arguments.evaluate().parse_intermixed_args([*map(str, words), "num_threads=1"])
    )


@pytest.fixture(scope="module")
def evaluated(evaluate, finished_run, tmp_path_factory):
    """Base model, run and exported LoRA, evaluated in one go."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    evaluate(
        "base", f"run={finished_run}", f"exported={finished_run}/lora", "--out", out, "--shown", 3
    )
    return out


def test_the_runs_own_numbers(evaluated, finished_run):
    """Base and trained policy score what the run measured before and after. Mutation: forget the
    LoRA, take the weights for the averaged ones, or draw other noise in later batches.
    """
    results = json.loads((evaluated / "results.json").read_text())
    summary = json.loads((finished_run / "summary.json").read_text())["eval"]
    for label, when in (("base", "before"), ("run", "after"), ("exported", "after")):
        for name, known in (("held_in", summary[when]), ("held_out", summary[when]["held_out"])):
            found = results[name][label]
            assert found["metrics"]["strict"]["mean"] == pytest.approx(known["strict"], abs=1e-6)
            assert found["metrics"]["reward"]["mean"] == pytest.approx(known["reward"], abs=1e-5)
            assert found["kl_ref"] == pytest.approx(known["kl_ref"], rel=1e-3, abs=1e-9)
            assert found["diversity"]["mean"] == pytest.approx(known["diversity"], rel=1e-4)
            assert found["metrics"]["panel/brightness"]["mean"] == pytest.approx(
                known["panel"]["brightness"], abs=1e-4
            )
    assert results["held_in"]["run"]["kl_ref"] > results["held_in"]["base"]["kl_ref"] == 0
    assert results["held_in"]["run"]["distances"]["features"] == "random-conv-128"
    assert "changes" in results["held_in"]["run"] and results["held_in"]["base"]["changes"] == {}


def test_samples_and_page(evaluated):
    """Mutation: a link to a file in place of a picture, or a record without its image."""
    lines = [
        json.loads(line)
        for line in (evaluated / "run" / "held_in" / "samples.jsonl").read_text().splitlines()
    ]
    assert [line["row"] for line in lines] == list(range(14))
    with Image.open(evaluated / "run" / "held_in" / lines[13]["file"]) as picture:
        assert picture.size == (32, 32)
    page = (evaluated / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * 3 * 3
    assert "http" not in page and "src='images" not in page
    assert "random-conv-128" in page and "Hacking panel" in page and lines[0]["prompt"] in page


def test_a_stopped_evaluation_goes_on(evaluate, evaluated, finished_run):
    """Mutation: start again, keep a half-written line, or draw other images the second time."""
    path = evaluated / "run" / "held_in" / "samples.jsonl"
    whole, base = path.read_text(), evaluated / "base" / "held_in" / "images" / "000000.png"
    path.write_text("".join(whole.splitlines(keepends=True)[:5])[:-9])
    stamp = base.stat().st_mtime_ns
    evaluate(
        "base",
        f"run={finished_run}",
        f"exported={finished_run}/lora",
        "--out",
        evaluated,
        "--shown",
        3,
    )
    assert path.read_text() == whole
    assert base.stat().st_mtime_ns == stamp


def test_one_image_a_prompt_has_no_diversity(evaluate, tmp_path):
    """In training and on the page; a single image has no distances either. Mutation: a diversity of
    0.
    """
    words = [f"evaluation.{word}=1" for word in ("images_per_prompt", "max_prompts", "kl_samples")]
    evaluate("base", "again=base", "--out", tmp_path, *words)
    found = json.loads((tmp_path / "results.json").read_text())["held_in"]["again"]
    assert found["num_images"] == 1 and found["diversity"] is None and "distances" not in found
    policy, _, evaluator = make(*words)
    metrics = evaluator.evaluate(policy).metrics
    assert "eval/held_in/reward" in metrics and "eval/held_in/diversity" not in metrics


def test_prompts_with_families_from_a_file(evaluate, tmp_path):
    """Captions under GenEval's key. Mutation: lose the family on the way to results and page."""
    rows = [("a red circle", "one"), ("two blue squares", "two"), ("a green cross", "one")]
    lines = [json.dumps({"prompt": text, "tag": family}) for text, family in rows]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    settings = (
        "evaluation.images_per_prompt=1",
        "evaluation.kl_samples=1",
        "reward=shapes",
        "evaluation.num_steps=2",
    )
    evaluate("base", "--out", tmp_path / "out", "--prompts", tmp_path / "mine.jsonl", *settings)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["mine"]["base"]
    assert found["headline"] == "strict"
    assert {name: each["num_prompts"] for name, each in found["families"].items()} == {
        "one": 2,
        "two": 1,
    }
    page = (tmp_path / "out" / "page.html").read_text()
    assert "Task families" in page and "3 prompts." in page and found["prompts"] == "3 prompts"


def test_a_subset_and_its_repeated_lines_are_told(evaluate, tmp_path, capsys):
    """In the output, in results.json and on the page; four lines of two texts have no interval.

    Mutation: say nothing, or count lines as prompts.
    """
    (tmp_path / "mine.txt").write_text("a red circle\na blue square\n" * 2 + "a green cross\n")
    settings = (
        "evaluation.images_per_prompt=1",
        "evaluation.kl_samples=1",
        "evaluation.num_steps=2",
    )
    words = ("--prompts", tmp_path / "mine.txt", "evaluation.max_prompts=4", "reward=shapes")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (100 * i, 0, 0)).save(pictures / f"{i}.gif")
    (pictures / "notes.txt").write_text("x")
    evaluate("base", "--out", tmp_path / "out", *words, *settings, "--reference", pictures)
    told = (
        "4 of 5 prompts, evenly spread; 2 different texts, each of which counts once in intervals"
    )
    lines = capsys.readouterr().out
    read = "2 pictures, 1 files not read (first: notes.txt, no kind of picture that is read here)"
    assert f"mine: {told}\n" in lines and f"--reference {pictures}: {read}\n" in lines
    found = json.loads((tmp_path / "out" / "results.json").read_text())["mine"]["base"]
    assert found["prompts"] == told and found["metrics"]["reward"]["num_prompts"] == 2
    assert found["distances"]["against"] == f"{pictures} ({read})"
    page = (tmp_path / "out" / "page.html").read_text()
    assert f"{told}." in page and read in page


def test_mistakes_are_named(evaluate, evaluated, finished_run, tmp_path):
    """Mutation: mix samples of two evaluations, or take a wrong folder for a base model."""
    subjects = ("base", f"run={finished_run}", f"exported={finished_run}/lora")
    with pytest.raises(ValueError, match="other settings"):
        evaluate(*subjects, "--out", evaluated, "evaluation.seed=1")
    with pytest.raises(ValueError, match="an evaluation of exported, run too, whose page"):
        evaluate("base", "--out", evaluated)
    with pytest.raises(ValueError, match=r"--reference .* 0 pictures there"):
        evaluate("base", "--out", tmp_path / "none", "--reference", tmp_path)
    assert not (tmp_path / "none").exists()
    for word in ("/no/such/run", "mine=/no/such/run", "mine=gone.safetensors"):
        with pytest.raises(ValueError, match="no such file or folder; give `base`, a LoRA file"):
            evaluate(word, "--out", tmp_path)
    with pytest.raises(ConfigCompositionException, match="rewrd"):
        evaluate("base", "rewrd=ocr", "--out", tmp_path)
    with pytest.raises(ValueError, match="neither a LoRA nor a checkpoint there"):
        evaluate(tmp_path, "--out", tmp_path / "out", "evaluation.sets.held_in.count=1")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("x.lora_magnitude_vector", "holds DoRA"),
        ("lora_unet_x.lora_down.weight", "kohya's names"),
        (
            "transformer_blocks.77.attn.to_q",
            "only 23 of its 24 layers fit this SD3Transformer2DModel",
        ),
    ],
)
def test_every_subject_is_examined_before_the_first_image(
    evaluate, call, finished_run, tmp_path, key, words
):
    """The last of two, and in generate.py with the same words. Mutation: draw the base first, or
    another reason.
    """
    file = shutil.copy(
        finished_run / "lora" / "pytorch_lora_weights.safetensors", tmp_path / "odd.safetensors"
    )
    layer = {
        f"{key}.lora_A.weight": torch.ones(16, 128),
        f"{key}.lora_B.weight": torch.ones(128, 16),
    }
    save_file(load_file(file) | (layer if key.endswith("to_q") else {key: torch.ones(1)}), file)
    with pytest.raises(UserError, match=words) as error:
        evaluate("base", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    status, _, err = call(
        generate, "--prompt", "a red circle", "--lora", file, "--out", tmp_path / "pictures"
    )
    assert (
        status == 1
        and err.strip() == f"error: {error.value}"
        and not (tmp_path / "pictures").exists()
    )


def test_one_lora_in_three_formats(evaluate, call, finished_run, tmp_path):
    """As files and folders, beside the run itself: the same numbers and pictures, bitwise, and
    generate.py's alike.

    Mutation: lose alpha of one format, or its name for a layer.
    """
    files = {}
    for form, name in NAMES.items():
        status, _, err = call(export_lora, finished_run, "--format", form, "--out", tmp_path / form)
        assert status == 0, err
        files[form] = tmp_path / form / name if form == "comfy" else tmp_path / form
    words = [f"{form}={path}" for form, path in files.items()]
    settings = [
        f"evaluation.{word}"
        for word in ("images_per_prompt=1", "max_prompts=3", "num_steps=2", "kl_samples=1")
    ]
    evaluate("base", f"run={finished_run}", *words, "--out", tmp_path / "out", *settings)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    pictures, generated = {}, set()
    for label in ("base", "run", *files):
        paths = sorted((tmp_path / "out" / label).glob("*/images/*.png"))
        pictures[label] = [path.read_bytes() for path in paths]
        assert len(paths) == 6
    for form in files:
        assert pictures[form] == pictures["run"] != pictures["base"]
        assert all(each[form]["metrics"] == each["run"]["metrics"] for each in results.values())
        assert all(each[form]["kl_ref"] == each["run"]["kl_ref"] > 0 for each in results.values())
        drawn = tmp_path / f"drawn_{form}"
        status, _, err = call(
            generate, "--prompt", "a red circle", "--lora", files[form], "--out", drawn, settings[2]
        )
        assert status == 0, err
        with Image.open(drawn / "000-0-lora.png") as picture:
            generated.add(picture.tobytes())
    assert len(generated) == 1
