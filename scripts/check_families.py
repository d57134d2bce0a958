"""Check every family of small random pipelines under `model=derived`, from its stock sampling to a
LoRA that the stock pipeline loads, and print what was measured as a table.

    python scripts/check_families.py                      # all of them, into families.jsonl
    python scripts/check_families.py wan21 z_image        # these alone
    python scripts/check_families.py --page > docs/reference/families.md

Each family is a line of the file, written when it is done: a run that is broken off goes on where
it was. Families that are named are measured anew. A family runs in a process of its own, which
begins with everything imported. Its columns: the parity check in float32, guided and not, each
number the larger one (see flowrl/training/parity.py); two iterations of train.py; the export,
loaded by the stock pipeline and compared weight by weight; and the time of a velocity outside of
its network. A family that takes a picture beside each prompt is given pictures of two sizes
throughout. A family that is refused has the sentence instead.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import importlib
import io
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import diffusers
import torch
from families import FAMILIES
from families.family import Family
from families.pictures import pictures_of, with_pictures
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file

from flowrl.cli import train
from flowrl.cli.parity import PROMPTS, measure_times
from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.errors import explain
from flowrl.launch.validate import validate
from flowrl.models.derived.adapter import Derived
from flowrl.models.experts import FIRST
from flowrl.runs.files import write_whole
from flowrl.training.parity import Parity, check
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.networks import companions_of

RECORD = Path("families.jsonl")
SCALES = ("guidance_scale", "true_cfg_scale")
"""The arguments of a stock call that FlowRL gives itself."""
GUIDED = 3.0
STEPS = 4
SHORT = (
    "debug=smoke",
    "logger=none",
    "reward=jpeg_compressibility",
    "embeddings.folder=null",
    "rollout.trained={count: 1, low: 1, high: 2}",
    "batch.max_micro_batch=4",
    "viewing.every=0",
    "num_threads=1",
    "trainer.accelerator=cpu",
)
REMEDIES = {
    "set tuning=full": ("tuning=full", "all weights trained"),
    "set model.has_guidance=false": ("model.has_guidance=false", ""),
    "backend.gradient_checkpointing=true is not": (
        "backend.gradient_checkpointing=false",
        "without gradient checkpointing",
    ),
}
"""By a part of a refusal: the override that it asks for, and what the table then says."""


def measure(name: str) -> dict[str, Any]:
    """Return what the table says of a family: numbers, or the sentence that refuses it."""
    family = FAMILIES[name]
    with TemporaryDirectory() as place:
        folder = family.save(Path(place) / name)
        pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
        row: dict[str, Any] = {"family": name, "pipeline": pipeline, "notes": []}
        overrides = overrides_of(family, folder)
        pictures = pictures_of(family)
        if pictures:
            overrides += with_pictures(PROMPTS, pictures, Path(place) / "prompts")
            row["notes"].append("with pictures")
        try:
            row |= with_remedies(
                overrides, row["notes"], lambda words: measure_parity(words, pictures)
            )
            row |= with_remedies(
                overrides, row["notes"], lambda words: measure_run(words, folder, Path(place))
            )
        except UserError as error:
            row["refused"] = sentence(str(error), folder)
    return row


def overrides_of(family: Family, folder: Path) -> list[str]:
    """Return the configuration of a family's small pipeline."""
    call = {name: value for name, value in family.call.items() if name not in SCALES}
    words = ", ".join(f"{name}: {json.dumps(value)}" for name, value in call.items())
    return [
        "model=derived",
        f"model.pretrained={folder}",
        f"model.call={{{words}}}",
        "model.dtype=float32",
        "lora.rank=4",
        f"rollout.num_steps={STEPS}",
        *SHORT,
    ]


def with_remedies(overrides: list[str], notes: list[str], work: Any) -> dict[str, Any]:
    """Call `work` with the overrides, and again with what a refusal asks for, as a user would; what
    was added stays, and is noted.

    Raises UserError where a refusal asks for nothing that was not tried.
    """
    while True:
        try:
            result: dict[str, Any] = work(overrides)
            return result
        except UserError as error:
            for part, (word, note) in REMEDIES.items():
                if part in str(error) and word not in overrides:
                    overrides.append(word)
                    notes += [note] if note else []
                    break
            else:
                raise


def measure_parity(
    overrides: Sequence[str], pictures: Sequence[Image.Image] = ()
) -> dict[str, Any]:
    """Check a family against its stock pipeline, guided and not, and time a velocity; `pictures`
    are those of the prompts, if any.
    """
    cfg: Any = compose(["name=families", *overrides])
    validate(cfg)
    model = make_model(cfg.model)
    recipe = instantiate(cfg.tuning)
    recipe.check_layers(model.transformer)
    trained = recipe.attach(model.transformer, cfg.seed).parameters()
    instantiate(cfg.backend).apply(model)
    rows = model.encode_edits(PROMPTS, pictures) if pictures else model.encode_prompts(PROMPTS)
    model.drop_text_encoders()
    scales = [GUIDED, 1.0] if model.arguments.has_guidance else [1.0]
    picture = next(iter(pictures), None)
    parities = check(model, rows, trained, scales=scales, num_steps=STEPS, seed=0, picture=picture)
    total, outside = measure_times(model, rows[:1], scales[0])
    return {
        "state": list(model.latent_shape),
        **largest(parities),
        "gradients": parities[0].has_gradient,
        "trained": len(trained),
        "alone": model.stock.probe.is_alone or bool(model.stock.alone_at),
        "milliseconds": total,
        "outside": outside,
    }


def make_model(node: Any) -> Derived:
    """Make the model of a configuration. Raises UserError, which Hydra wraps, as it was told."""
    try:
        model: Derived = instantiate(node)
    except InstantiationException as error:
        raise UserError(explain(error)) from error
    return model


def largest(parities: Sequence[Parity]) -> dict[str, float]:
    """Return the larger of each number that was measured guided and not."""
    names = ("velocity", "rollout", "image", "rows", "replay")
    return {name: max(getattr(parity, name) for parity in parities) for name in names}


def measure_run(overrides: Sequence[str], folder: Path, place: Path) -> dict[str, Any]:
    """Train for two iterations, and load what was exported with the stock pipeline.

    Raises UserError with the run's last line where it fails.
    """
    # Anew where another attempt was refused, whose folder this process still claims.
    run = Path(mkdtemp(dir=place)) / "run"
    printed = io.StringIO()
    sys.argv = ["train.py", *overrides, f"run_dir={run}"]
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(printed):
            status: Any = run_program(train.main, takes_overrides=True)
    except SystemExit as end:
        status = end.code
    if status:
        raise UserError(printed.getvalue().strip().splitlines()[-1].removeprefix("error: "))
    iterations = len((run / "metrics.csv").read_text().splitlines()) - 1
    return {"iterations": iterations, "export": reload(run, folder)}


def reload(run: Path, folder: Path) -> str:
    """Load what a run exported with the stock pipeline, compare the weights, and say by what it was
    loaded.

    Raises UserError where a weight differs or is not there.
    """
    stock: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    if (run / "transformer").is_dir():
        network = type(stock.transformer).from_pretrained(run / "transformer")
        require_equal(load_whole(run / "transformer"), network.state_dict(), "")
        return "its transformer's from_pretrained"
    file = run / "lora" / NAMES["diffusers"]
    companions = companions_of(file)
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(run / "lora", adapter_name="ours")
        loader = "load_lora_weights"
        for network, other in companions.items():
            choice = {f"load_into_{network}": True}
            stock.load_lora_weights(
                run / "lora", weight_name=other.name, adapter_name="ours", **choice
            )
            loader += f", once more into {network}"
    else:
        stock.transformer.load_lora_adapter(
            run / "lora", weight_name=NAMES["diffusers"], adapter_name="ours"
        )
        loader = "its transformer's load_lora_adapter"
    for network, other in {FIRST: file, **companions}.items():
        weights = getattr(stock, network).state_dict()
        require_equal(load_file(other), weights, ".ours")
    return loader


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a transformer's folder."""
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    return weights


def require_equal(
    exported: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor], adapter: str
) -> None:
    """Raise UserError unless every exported weight is among those loaded."""
    for key, value in exported.items():
        layer, dot, last = key.removeprefix("transformer.").rpartition(".")
        other = loaded.get(f"{layer}{adapter}{dot}{last}")
        if other is None or not torch.equal(other, value):
            raise UserError(f"the stock pipeline does not load the exported {key}")


def sentence(text: str, folder: Path) -> str:
    """Return a refusal without the folder that it names."""
    head = f"model.pretrained={folder}: "
    return text.removeprefix(head).replace(str(folder), folder.name)


def child(name: str, answer: Any) -> None:
    """Measure a family in a process of its own, and hand over the result."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        answer.send(measure(name))
    except Exception as error:  # which would end the table, and belongs into it
        answer.send({"family": name, "failed": f"{type(error).__name__}: {error}"})


def measure_apart(name: str) -> dict[str, Any]:
    """Measure a family in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(name, there))
    process.start()
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    except EOFError:
        result = {"family": name, "failed": "its process ended"}
    process.join()
    return result


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Read what was measured before, by family."""
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["family"]: row for row in rows}


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of all families that were measured, in the order of the families."""
    known = [rows[name] for name in FAMILIES if name in rows]
    trained = [row for row in known if "iterations" in row]
    others = [row for row in known if "iterations" not in row]
    lines = [*HEAD, *map(line_of, trained), "", *REFUSED_HEAD]
    lines += [f"| `{row['family']}` | {reason(row)} |" for row in others]
    missing = [f"`{name}`" for name in FAMILIES if name not in rows]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Families of pipelines

What `python scripts/check_families.py` measured on small pipelines of random weights, of the real
classes of diffusers, in float32 on a CPU; `--page` wrote this page. Differences are shares of the
largest number, the larger one of guided and not: of the *velocity* at the stock sampling's states,
of the last state of a *rollout*, of the *decoded* image or clip, of a sample beside others (*rows*)
and of the same state again (*replay*). *Gradient* counts the trained weights that the velocity
depends on; a fresh LoRA's are its second factors. *Run* is `train.py` for two iterations, *reload*
what loaded its export in the stock pipeline, weight by weight equal; a family *with pictures* has
one beside each prompt throughout. *Outside* is the time of a velocity of one row outside its
network, in the best of five calls, on a machine that other programs used at the same time: some of
it is theirs.
"""
COLUMNS = (
    "family",
    "pipeline",
    "state",
    "velocity",
    "rollout",
    "decode",
    "rows",
    "replay",
    "gradient",
    "run",
    "reload",
    "outside, ms",
)
HEAD = (*INTRODUCTION.splitlines(), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|")
REFUSED_HEAD = """Not trained, each with the line that a user gets:

| family | line |
|---|---|""".splitlines()


def line_of(row: Mapping[str, Any]) -> str:
    """Return a trained family's line."""
    numbers = [f"{row[name]:.1g}" for name in ("velocity", "rollout", "image", "rows", "replay")]
    notes = [*row["notes"], *(["one row a call"] if row["alone"] else [])]
    run = ", ".join([f"{row['iterations']} iterations", *notes])
    cells = [
        f"`{row['family']}`",
        row["pipeline"],
        " x ".join(map(str, row["state"])),
        *numbers,
        f"{row['gradients']} of {row['trained']}",
        run,
        row["export"],
        f"{row['outside']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def reason(row: Mapping[str, Any]) -> str:
    """Return why a family is not trained."""
    text: str = row.get("refused") or row["failed"]
    return text.replace("|", "\\|")


def main() -> None:
    """Measure the families of the command line that are missing, or print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="measured anew; all that are missing without")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file of results")
    parser.add_argument("--page", action="store_true", help="print the page, and measure nothing")
    args = parser.parse_args()
    rows = read_record(args.record)
    if args.page:
        print(page(rows), end="")
        return
    for name in args.families:
        if name not in FAMILIES:
            raise UserError(f"{name}: no such family; known are {', '.join(FAMILIES)}")
    importlib.import_module("flowrl.launch.run")  # what each process would import anew
    for name in args.families or [name for name in FAMILIES if name not in rows]:
        rows[name] = measure_apart(name)
        write_whole(args.record, "".join(json.dumps(row) + "\n" for row in rows.values()))
        print(json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
