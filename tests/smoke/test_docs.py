"""The documentation builds without a warning, and its pages lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import forks
import pytest
from runs import ROOT


class Links(HTMLParser):
    """Collects what a page links to, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.places.update(filter(None, (values.get("id"), values.get("name"))))
        key = {"a": "href", "img": "src"}.get(tag)
        if key and values.get(key):
            self.targets.append(values[key])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, as `make docs` builds it. Mutation: link to a page or heading that is not
    there, or leave a page out of all lists of contents.
    """
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"-m sphinx .*", (ROOT / "Makefile").read_text())[0]
    words = recipe.replace("docs/_build", str(folder)).split()
    build = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert build.returncode == 0, build.stderr[-3000:]
    assert "warning" not in build.stderr.lower(), build.stderr[-3000:]
    return folder / "html"


def test_internal_links_resolve(site):
    """To pages, to places in them, to files and to pictures. Mutation: misspell an anchor."""
    pages = {path: Links(path) for path in site.rglob("*.html")}
    broken = []
    for page, links in pages.items():
        for link in links.targets:
            url = urlsplit(link)
            if url.scheme or url.netloc or page.name in ("genindex.html", "search.html"):
                continue
            path = (page.parent / unquote(url.path)).resolve() if url.path else page
            is_there = path.exists()
            if is_there and url.fragment and path in pages:
                is_there = unquote(url.fragment) in pages[path].places
            if not is_there:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert len(pages) > 25
    assert sorted(set(broken)) == []


def test_every_group_stands_in_the_reference(site, root):
    """With each of its options, and each key with a meaning. Mutation: leave a folder of conf/ out,
    or add a key without a comment and without a line in docs/reference/keys.yaml.
    """
    from config_page import page

    reference = page()
    shown = (site / "docs/reference/configuration.html").read_text()
    for path in sorted((root / "conf").rglob("*.yaml")):
        group = path.parent.relative_to(root / "conf").as_posix()
        if group != ".":
            assert f"\n## {group}\n" in reference
            assert f"\n### {group}={path.stem}\n" in reference
            assert f"{group}={path.stem}" in shown
    assert [line for line in reference.splitlines() if line.endswith("|  |")] == []


def test_the_first_page_leads_to_all_parts(site):
    """Mutation: drop a list of contents from docs/index.md."""
    text = (site / "docs/index.html").read_text()
    for part in ("tutorial/", "how-to/", "reference/", "explanation/", "../experiments/"):
        assert f'href="{part}' in text, part
    assert "docs/index.html" in (site / "index.html").read_text()


def test_the_tutorials_own_reward_and_loss_train(tmp_path, root):
    """The files that both pages show, as they are shown. Mutation: rename a name that they import,
    or a key in one of their YAML files.
    """
    files = {}
    for name in ("own_reward", "own_loss"):
        text = (root / "docs/tutorial" / f"{name}.md").read_text()
        shown = re.findall(r"`([\w/]+\.(?:py|yaml))`[^\n]*:\n\n```\w+\n(.*?)```", text, re.DOTALL)
        files.update(shown)
    assert sorted(files) == [
        "acme/kl_penalty.py",
        "acme/redness.py",
        "conf/loss/kl_penalty.yaml",
        "conf/reward/redness.yaml",
        "test_kl_penalty.py",
    ]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # From this checkout, whatever is installed.
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    words = ("reward=redness", "loss=kl_penalty", "debug=smoke", "trainer.accelerator=cpu")
    for command in (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_kl_penalty.py"],
        ["-m", "flowrl", "doctor", "--config-dir", "conf", "reward=redness"],
        ["-m", "flowrl", "train", "--config-dir", "conf", *words],
    ):
        done = forks.run(*command, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "acme/penalty" in next(tmp_path.glob("outputs/latest/metrics.csv")).read_text()
