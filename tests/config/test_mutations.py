import ast
import tomllib

from runs import ROOT


def test_every_mutation_applies():
    """Each `old` occurs exactly once, what replaces it is Python, and its tests exist, so that
    `make mutation` means something.

    Mutation: rename a variable of a loss without the table.
    """
    mutations = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    assert len(mutations) > 50
    for mutation in mutations:
        text = (ROOT / mutation["file"]).read_text()
        assert text.count(mutation["old"]) == 1, mutation
        if mutation["file"].endswith(".py"):
            ast.parse(text.replace(mutation["old"], mutation["new"]), mutation["old"])
        for path, _, test in (name.partition("::") for name in mutation["tests"]):
            assert f"def {test.split('[')[0]}" in (ROOT / path).read_text(), (path, test)
