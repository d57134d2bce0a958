"""Every command that the documents show is one that works."""

import re
import shlex
import subprocess

import pytest
from hydra import compose, initialize_config_dir
from runs import CONF, ROOT

from flowrl.launch.compose import register_resolvers

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES if "_build" not in page.parts}
DOCUMENTS = "\n".join(TEXTS.values())
PRIVATE = ("own_loss", "own_reward", "private_project")
"""Pages whose paths are those of a private project."""
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", DOCUMENTS, re.DOTALL)
        for line in block.splitlines()
    }
)
STARTS = ("python train.py", "flowrl train", "make train")
TRAIN = [
    command
    for command in COMMANDS
    # Those of a private project need its folder.
    if command.startswith(STARTS) and "--config-dir" not in command
]


@pytest.mark.parametrize("command", TRAIN)
def test_train_commands_compose(command):
    """Mutation: misspell an override in the README or on a page."""
    words = shlex.split(command)
    if words[0] == "make":
        words = shlex.split(words[-1].removeprefix("ARGS=")) if "ARGS" in command else []
        words = ["experiment=diffusion_nft_fast", *words]
    else:
        words = words[2:]
    pairs = [word.split("=", 1) for word in words if "=" in word and not word.startswith("resume=")]
    values = [value.split(",") if "-m" in words else [value] for _, value in pairs]
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for i in range(max(map(len, values), default=1)):
            overrides = [
                f"{key}={own[i % len(own)]}" for (key, _), own in zip(pairs, values, strict=True)
            ]
            assert compose("config", overrides=["name=test", *overrides]).num_iterations > 0


def test_documented_make_targets_and_scripts_exist():
    """Mutation: rename a target or script without the documents."""
    text = "\n".join(text for page, text in TEXTS.items() if page.stem not in PRIVATE)
    for target in set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", DOCUMENTS, re.MULTILINE)):
        assert (
            subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0
        ), target
    for path in set(re.findall(r"`((?:flowrl|conf|scripts|tests|docs)/[\w/.-]+)`", text)):
        # What `make docs` builds is not there before.
        assert path.startswith("docs/_build") or (ROOT / path).exists(), path


def test_metrics_page_is_current():
    """Mutation: change the glossary without `make docs`."""
    from flowrl.runs.glossary import page

    assert (ROOT / "docs" / "metrics.md").read_text() == page()


@pytest.mark.parametrize("page", [*TEXTS, *sorted(ROOT.glob("experiments/**/*.md"))], ids=str)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page):
    """A bar in a cell ends it, and what stands behind it is not shown. Mutation: KL(old || current)
    unescaped in the page of metrics.
    """
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table[:200]


def test_no_placeholder_is_left():
    """Mutation: leave an unfilled @@RESULT@@ in a document."""
    assert "@@" not in DOCUMENTS


def test_the_loop_of_the_architecture_is_the_one_that_trains():
    """Line by line, comments aside. Mutation: rename `step_weights` without the page."""
    page = (ROOT / "docs/architecture.md").read_text()
    policy = (ROOT / "flowrl/training/policy.py").read_text()
    code = {line.strip() for line in policy.splitlines()}
    [loop] = re.findall(r"One iteration, in .*?```python\n(.*?)```", page, re.DOTALL)
    lines = [line.split("  #")[0].strip() for line in loop.splitlines()]
    assert len(lines) > 8 and [line for line in lines if line not in code] == []


def test_the_index_of_the_architecture_names_what_there_is():
    """Every file, and every name in one of its row's files. Mutation: rename a function without
    it.
    """
    page = (ROOT / "docs/architecture.md").read_text()
    index = page.split("## Where is ...?")[1].split("\n## ")[0]
    rows = [line.split("|")[2:4] for line in index.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for files, names in rows:
        text = "".join(
            (ROOT / "flowrl" / file).read_text() for file in re.findall(r"`([^`]+\.py)`", files)
        )
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b|^{name} = ", text, re.MULTILINE), name


def test_the_readme_is_short():
    """And names the command that runs the tests. Mutation: move a page back into it."""
    assert len(README) <= 6500
    assert "make test" in COMMANDS
