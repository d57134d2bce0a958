"""Every leaf of the configuration with values that nobody meant: refused by its name, or accepted
by a rule below.
"""

import json
import math
import re
import signal
import time
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conf_options import OPTIONS, select
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from runs import CONF

from flowrl.errors import UserError
from flowrl.launch.checks import check_rules
from flowrl.launch.compose import compose
from flowrl.launch.errors import explain, is_users
from flowrl.launch.scores import check_parts
from flowrl.launch.validate import validate
from flowrl.objectives import check_method

HUGE = 10**18
VALUES = {
    "null": None,
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "huge": HUGE,
    "''": "",
    "{a: 1}": {"a": 1},
}
"""And a value of another type than the one that stands there, called `wrong`."""
CHEAP = ("algorithm", "batch", "tuning", "ema", "data", "evaluation", "optimizer", "learning_rate")
CHEAP += ("regularizer",)
"""What is built where the value reaches it: all that needs no weights."""
SECONDS = 5
"""For one value; most take a hundredth of a second."""

RULES = {
    "null leaves the choice to FlowRL, as its YAML says": (
        "null",
        r"run_dir|embeddings\.folder|evaluation\.max_prompts|frames\.count|.*\.(family|exclude|image|tags|version|revision|attention|config)|"
        r"logger\.\w+\.(name|group|run_name|tracking_uri)|.*\.(final_delta|token_env)|scorer_timeout|.*\.start_seconds|reward\.wait_seconds|"
        r"algorithm\.training_guidance_scale",
    ),
    "a seed may be any number of 63 bits": ("0|huge", r"seed|.*\.seed"),
    "an infinite or large threshold masks nothing": (
        "inf|huge",
        r".*\.(delta|forward_delta|diagnostics\.clip|clip_high)",
    ),
    "a threshold of 0 masks all that moves away": (
        "0",
        r".*\.(delta|forward_delta|clip|cps_clip|guard_clip|awm_clip|clip_low|clip_high)",
    ),
    "inf is no bound, and a large one next to none": (
        "inf|huge",
        r"max_grad_norm|loss\.advantage_clip",
    ),
    "0 switches it off": (
        "0",
        r".*guidance_scale|evaluation\.kl_samples|evaluation\.sampler\.noise_level|optimizer\.weight_decay|ema\.decay|"
        r"max_missing|gate_tolerance|viewing\.every|penalty\.beta|.*refresh_rate|loss\.(fraction|decay_\w+|budget_share)|learning_rate\.final|"
        r".*\.(min_confidence|max_sequence_length|retries|backoff|max_backoff|open_seconds|start_seconds)",
    ),
    "a tracker of Lightning's is checked by its own hints": (
        "''|-1|0|huge",
        r"logger\.(csv|tensorboard)\.\w+",
    ),
    "what is built refuses a deadline below the time-out, and a judge that may say nothing": (
        "0",
        r"reward\.client\.deadline|reward\.judge\.top_logprobs",
    ),
    "with a threshold of 0 every detection counts": ("0", r"reward\.(counting_)?threshold"),
    "no line of votes counts, which whoever scores by them tells": ("0", r"reward\.lines"),
    "steps and windows begin at 0": ("0", r"(steps|rollout\.trained)\.low"),
    "a whole number is a name, too": ("0|-1|huge", "name"),
    "text where text may stand; what it names is looked for when it is needed": (
        "wrong",
        r"resume|condition|sweep|lora\.start|reward\.folder|backend\.attention|embeddings\.folder|(model|reward\.detector)\.revision|.*\.token_env|logger\.\w+\.\w+|run_dir",
    ),
    "what a pipeline's call takes is asked of the pipeline": (
        r"wrong|\{a: 1\}",
        r"model\.(call|guidance)",
    ),
    "a reward may prefer what its score falls with": ("-1", r"reward(\.\w+)*\.scale"),
    "a reward's cap may be any number, as the reward may": ("-1|0|huge|inf", r"loss\.reward_cap"),
    "a reward's weight may be any number": ("-1|0|huge", r"reward\.weights\.\w+"),
}
"""Which values (a pattern) may pass for which keys (a pattern), and why."""


@contextmanager
def time_limit(seconds):
    """TimeoutError after so many seconds."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def leaves(node, path="", owner=""):
    """(key, what tells it from keys of other options, value as it is written); interpolations and
    lists are leaves.
    """
    owner = f"{node['_target_']}" if "_target_" in node else owner or path
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            yield from leaves(value, name, "" if "_target_" in value else f"{owner} {key}")
        else:
            yield name, (owner, str(key)), value


def outcome(cfg, resolved, key, value):
    """What becomes of `key=value`: refused, accepted, unnamed, traceback or hang, and what was
    said.
    """
    try:
        with time_limit(SECONDS):
            validate(cfg)
            check_parts(cfg)
            check_rules(cfg)
            for name in resolved:
                if OmegaConf.to_container(cfg[name], resolve=True) != resolved[name]:
                    built = instantiate(cfg[name])
                    if name == "algorithm":
                        check_method(built)
    except TimeoutError:
        return "hang", ""
    except Exception as error:
        root = error
        while root.__cause__ is not None and not isinstance(root, UserError):
            root = root.__cause__
        if not isinstance(root, UserError) and not is_users(root):
            return "traceback", f"{type(root).__name__}: {root}"
        text = explain(error)
        # A prompt file's reader knows its argument's name, not the key, or the line that lacks what
        # the value names.
        is_named = (
            key in text
            or f"{key.rpartition('.')[2]}={value}" in text
            or f"line 1: no {value!r}" in text
        )
        return ("refused" if is_named and "\n" not in text else "unnamed"), text
    return "accepted", ""


def walk(cfg, seen):
    """(key, value, outcome, message) for every leaf whose place is not in `seen`, which is
    filled.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    resolved = {
        name: OmegaConf.to_container(cfg[name], resolve=True) for name in CHEAP if cfg[name]
    }
    OmegaConf.set_struct(cfg, False)
    for key, place, written in leaves(raw):
        if place in seen:
            continue
        seen.add(place)
        other = 1.5 if isinstance(written, str) and "${" not in written else "two"
        for label, value in {**VALUES, "wrong": other}.items():
            if value != written or isinstance(value, bool) != isinstance(written, bool):
                OmegaConf.update(cfg, key, value, merge=False, force_add=True)
                yield key, label, *outcome(cfg, resolved, key, value)
        OmegaConf.update(cfg, key, written, merge=False, force_add=True)


def is_new(group, option, seen):
    """Whether an option's file has a target whose keys have not been walked."""
    targets = re.findall(r"_target_: ([\w.]+)", (CONF / group / f"{option}.yaml").read_text())
    return not set(targets) <= {owner for owner, _ in seen}


def rule(key, label):
    """The first rule by which a value is accepted."""
    for name, (values, keys) in RULES.items():
        if re.fullmatch(values, label) and re.fullmatch(keys, key):
            return name
    return None


NEEDED = {
    "cps": ("sampler=cps",),
    "guard": ("sampler=flow_sde",),
    "nft": ("sampler=ode", "penalty=velocity"),
    "awm": ("sampler=ode", "penalty=velocity"),
    "pepg": ("sampler=ode", "penalty=velocity"),
    "epg": ("sampler=ode", "penalty=velocity"),
    "par": ("sampler=ode", "penalty=velocity"),
    "forward_dppo": ("sampler=ode", "penalty=velocity"),
    "flow_dpo": ("sampler=ode",),
    "dgpo": ("sampler=ode", "penalty=velocity"),
    "draft": ("sampler=ode", "penalty=velocity"),
}
SKIPPED = ("hydra/launcher", "hydra/sweeper", "experiment", "experiment/base", "debug")
"""Hydra's own, and groups that only choose among the others."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Prompt files for the options that read some."""
    monkeypatch.chdir(tmp_path)
    row = {
        "prompt": "a red circle",
        "tag": "one",
        "include": [],
        "atom_count": 1,
        "vqa_list": [["a?", "Yes"]],
    }
    for name in ("prompts.txt", "prompts.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a red circle")
    texts = {"prompt": ["a red circle"], "tag": ["one"]}
    pq.write_table(pa.table(texts), tmp_path / "prompts.parquet")


def test_every_leaf_is_refused_by_name_or_accepted_by_a_rule(files):
    """Mutation: take a bound out of any signature or of the schema, or name the target's parameter
    alone.
    """
    start, seen, counts, wrong, used = time.process_time(), set(), {}, [], set()
    small = (
        "data.prompts.count=12",
        "evaluation.sets.held_in.count=12",
        "evaluation.sets.held_out.count=12",
    )
    everything = [("", "", lambda: compose(["name=test", "run_dir=run", *small]))]
    for group, option in OPTIONS:
        if group not in SKIPPED:
            others = (*NEEDED.get(option, ()), "run_dir=run")
            everything.append((group, option, partial(select, group, option, *others)))
    for group, option, composed in everything:
        if group and not is_new(group, option, seen):
            continue
        for key, label, what, text in walk(composed(), seen):
            counts[what] = counts.get(what, 0) + 1
            reason = rule(key, label)
            used |= {reason} if what == "accepted" else set()
            if what not in ("refused", "accepted") or (what == "accepted" and reason is None):
                wrong.append(f"{group}={option} {key}={label}: {what} {text}")
    seconds = time.process_time() - start
    print(
        f"{len(seen)} leaves, {sum(counts.values())} values in {seconds:.0f} s of one core: "
        f"{counts}"
    )
    assert not wrong, "\n".join(wrong)
    assert used == RULES.keys(), "a rule by which nothing is accepted"
    assert len(seen) > 200 and counts["refused"] > 1500
