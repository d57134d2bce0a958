"""Every command that the texts about private projects show is one that there is."""

import re
import shlex

from runs import ROOT

from flowrl.cli.arguments import PARSERS
from flowrl.cli.new import write_project
from flowrl.launch.compose import compose
from flowrl.launch.search_path import with_config_dir

HOW_TO = ROOT / "docs" / "how-to" / "private_project.md"


def test_each_command_that_the_texts_show_is_one(tmp_path):
    """Mutation: misspell a flag or a subcommand in the template's README or in the how-to."""
    project = write_project("acme", tmp_path)
    texts = [(project / "README.md").read_text(), HOW_TO.read_text()]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("flowrl ")]
    assert len(commands) >= 12
    for name, *words in commands:
        if name != "train":
            PARSERS[name]().parse_intermixed_args(words)
            continue
        overrides = [word.split(",")[0] for word in words if "=" in word]
        folder = project / "conf" if "--config-dir" in words else None
        assert compose(with_config_dir(["name=t", *overrides], folder)).num_iterations > 0
