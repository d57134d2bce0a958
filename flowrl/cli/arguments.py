"""The command lines of all programs but train.py, whose is Hydra's; they stand apart from the
programs, so that help imports nothing heavy.

The text of a program's help is the head of its module.
"""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flowrl.cli.parser import Parser, add_config_dir, make_parser

ASSUMED_SHARES = (0.2, 0.4)
"""Shares of a GPU's rating that training is assumed to reach; nothing has measured them."""


def head_of(name: str) -> str:
    """Read the docstring of a program's module, without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source))
    assert text is not None
    return text


def evaluate() -> Parser:
    """Describe the command line of `flowrl evaluate`."""
    parser = make_parser("evaluate", head_of("evaluate"))
    parser.add_argument("words", nargs="+", help="subjects, then overrides")
    add_config_dir(parser)
    parser.add_argument("--out", default="outputs/evaluation", help="where everything is written")
    parser.add_argument(
        "--prompts",
        help=(
            "in place of the configured sets: a text file, one prompt a line, or .jsonl with "
            "metadata"
        ),
    )
    parser.add_argument(
        "--reference",
        help="folder of real pictures to measure distances from, not the first subject",
    )
    parser.add_argument("--inception", help="torch-fidelity's weights file, for FID and KID proper")
    parser.add_argument(
        "--shown", type=int, default=16, help="prompts of each set whose images are on the page"
    )
    return parser


def generate() -> Parser:
    """Describe the command line of `flowrl generate`."""
    parser = make_parser("generate", head_of("generate"))
    parser.add_argument(
        "overrides", nargs="*", help="model=NAME, and configuration overrides as for train.py"
    )
    add_config_dir(parser)
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", help="a file with one prompt, or one JSON object, a line")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument(
        "--lora", type=Path, help="a LoRA file, a folder with one, or a run's folder"
    )
    trained.add_argument("--transformer", type=Path, help="a folder that full fine-tuning exported")
    parser.add_argument("--count", type=int, default=1, help="images a prompt")
    parser.add_argument("--out", type=Path, default=Path("outputs/pictures"))
    return parser


def report() -> Parser:
    """Describe the command line of `flowrl report`."""
    parser = make_parser("report", head_of("report"))
    parser.add_argument(
        "places", nargs="+", type=Path, help="run folders, or folders above them such as a sweep's"
    )
    parser.add_argument(
        "--out", type=Path, help="where to write; default: report/ in the first folder"
    )
    parser.add_argument(
        "--baseline", help="the condition to compare with, by its label; default: the first"
    )
    parser.add_argument(
        "--metrics", nargs="+", help="what the tables compare; default: the evaluation's headlines"
    )
    parser.add_argument(
        "--smooth",
        type=int,
        help="iterations in a running mean; default: a fortieth of the longest run",
    )
    parser.add_argument("--title", help="head of the page; default: the first folder's name")
    return parser


def study() -> Parser:
    """Describe the command line of `flowrl study`."""
    from flowrl.studies.plan import ORDER

    parser = make_parser("study", head_of("study"))
    parser.add_argument("action", choices=("plan", "run", "collect", "render", "reproduce"))
    parser.add_argument(
        "studies", nargs="*", default=[], help=f"default: all, in this order: {', '.join(ORDER)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the reduced version, below outputs/quick/<commit>"
    )
    parser.add_argument(
        "--retry", action="store_true", help="run failed runs again, which are results otherwise"
    )
    parser.add_argument(
        "--stage", action="append", default=[], help="run this one alone; may be given again"
    )
    parser.add_argument("--slots", type=int, help="runs at a time; default: one for each core")
    return parser


def serve() -> Parser:
    """Describe the command line of `flowrl serve`."""
    parser = make_parser("serve", head_of("serve"))
    parser.add_argument(
        "overrides", nargs="*", help="reward=NAME, and keys of conf/serve.yaml or of the reward"
    )
    add_config_dir(parser)
    return parser


def vote() -> Parser:
    """Describe the command line of `flowrl vote`."""
    parser = make_parser("vote", head_of("vote"))
    parser.add_argument("run", type=Path, help="the folder of a run, or of its votes")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default: this one"
    )
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one; default: 8001")
    parser.add_argument(
        "--token-env",
        metavar="NAME",
        help="environment variable with the token; default: a new one",
    )
    return parser


def doctor() -> Parser:
    """Describe the command line of `flowrl doctor`."""
    parser = make_parser("doctor", head_of("doctor"))
    parser.add_argument("overrides", nargs="*", help="reward=NAME and any reward.KEY=VALUE")
    add_config_dir(parser)
    parser.add_argument(
        "--pairs", nargs="+", help="kinds of pairs to order: shapes text size sharpness content"
    )
    parser.add_argument("--max-seconds", type=float, default=5.0, help="longest time for one image")
    return parser


def positives(text: str, meaning: str, example: str) -> tuple[float, ...]:
    """Read numbers above 0 with commas between them. Raises argparse's error, which the parser
    tells in one line, for anything else.
    """
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be {meaning} above 0, or several with commas between them, such as "
            f"{example}"
        )
    return values


def plan() -> Parser:
    """Describe the command line of `flowrl plan`."""
    parser = make_parser("plan", head_of("plan"))
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for train.py")
    add_config_dir(parser)
    parser.add_argument(
        "--gpu",
        type=partial(positives, meaning="a number of GiB", example="16,24,80"),
        default=(80.0,),
        metavar="GIB",
        help="GiB of one GPU, or of several kinds as in 16,24,80; default: 80",
    )
    parser.add_argument(
        "--tflops",
        type=partial(positives, meaning="a rating in TFLOP/s", example="97,165"),
        metavar="TFLOPS",
        help="the rating of the GPU, or of each, in dense products of the model's dtype, to "
        "predict hours",
    )
    parser.add_argument(
        "--share",
        type=partial(positives, meaning="a share of the rating", example="0.2,0.4"),
        default=ASSUMED_SHARES,
        metavar="SHARES",
        help="the shares of the rating between which a run is taken to lie; default: "
        f"{','.join(map(str, ASSUMED_SHARES))}, an assumption",
    )
    parser.add_argument(
        "--price",
        type=partial(positives, meaning="a price an hour", example="0.3,0.4"),
        metavar="PRICES",
        help="the price of an hour of the GPU, or of each",
    )
    return parser


def export() -> Parser:
    """Describe the command line of `flowrl export`."""
    parser = make_parser("export", head_of("export"))
    parser.add_argument("source", type=Path)
    parser.add_argument(
        "overrides", nargs="*", help="model=NAME, and configuration overrides as for train.py"
    )
    add_config_dir(parser)
    parser.add_argument("--format", choices=("diffusers", "peft", "comfy"), required=True)
    parser.add_argument("--out", type=Path)
    return parser


def push() -> Parser:
    """Describe the command line of `flowrl push`."""
    parser = make_parser("push", head_of("push"))
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("repository", metavar="ORG/NAME", help="where on the hub")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, upload nothing")
    parser.add_argument(
        "--out", type=Path, help="where the folder is written; default: RUN/hub in a dry run"
    )
    parser.add_argument(
        "--evaluation", type=Path, help="folder of an evaluation of base and this run"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="a branch; default: main")
    return parser


def runs() -> Parser:
    """Describe the command line of `flowrl runs`."""
    parser = make_parser("runs", head_of("runs"))
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), help="default: outputs"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, null for what is not known")
    return parser


def check() -> Parser:
    """Describe the command line of `flowrl check`."""
    parser = make_parser("check", head_of("check"))
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for training")
    add_config_dir(parser)
    parser.add_argument("-m", "--multirun", action="store_true", help="check all jobs of a sweep")
    return parser


def parity() -> Parser:
    """Describe the command line of `flowrl parity`."""
    parser = make_parser("parity", head_of("parity"))
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for train.py")
    parser.add_argument("--edit", action="store_true", help="with a picture beside each prompt")
    add_config_dir(parser)
    return parser


def new() -> Parser:
    """Describe the command line of `flowrl new`."""
    parser = make_parser("new", head_of("new"))
    parser.add_argument("name", metavar="NAME", help="of the folder and of its Python package")
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "evaluate": evaluate,
    "generate": generate,
    "report": report,
    "study": study,
    "serve": serve,
    "vote": vote,
    "doctor": doctor,
    "plan": plan,
    "check": check,
    "new": new,
    "export": export,
    "push": push,
    "runs": runs,
}
"""The command line of each program, by the subcommand's name."""
