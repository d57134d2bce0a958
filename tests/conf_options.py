"""The options of conf/, and how one of them is composed."""

from runs import CONF, composed

OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem) for path in CONF.glob("*/**/*.yaml")
)
FILE = "data.prompts.path=prompts.txt"
TABLE = "data.prompts.path=prompts.parquet"
FILLED = {
    ("model", "derived"): ("model.pretrained=org/name",),
    ("data", "text"): (FILE,),
    ("data", "jsonl"): (FILE,),
    ("data", "geneval"): (FILE,),
    ("data", "geneval2"): (FILE,),
    ("data", "hub"): (TABLE,),
    ("evaluation", "text"): ("data=text", FILE),
    ("evaluation", "hub"): ("data=hub", TABLE),
    ("evaluation", "jsonl"): ("data=jsonl", FILE),
    ("evaluation", "geneval2"): ("evaluation.sets.held_in.path=prompts.jsonl",),
    ("experiment", "diffusion_opd_sd35"): tuple(
        f"teachers.{name}.lora={name}" for name in ("ocr", "pickscore", "geneval")
    ),
    ("regularizer", "data"): ("regularizer.images.path=images",),
    ("reward", "remote"): ("reward.url=http://localhost:8000",),
}
"""Values that an option leaves to the user."""
PARTS = {
    "http": ("reward.client", "reward=remote", "reward.url=http://localhost:8000"),
    "detector": ("reward.detector", "reward=geneval"),
}
"""Groups below an option of another group: the place, and what brings it."""
BASE = "experiment/base"
"""What recipes take into their defaults: nothing that a user chooses."""


def options(group):
    return [name for other, name in OPTIONS if other == group]


def select(group, option, *others):
    if group in PARTS:
        place, *needed = PARTS[group]
        return composed(*needed, f"{group}@{place}={option}", *others)
    if group == BASE:
        return composed(f"+{group}={option}", *others)
    return composed(f"{group}={option}", *FILLED.get((group, option), ()), *others)
