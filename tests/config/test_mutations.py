import tomllib

from runs import ROOT


def test_every_mutation_applies():
    """Each `old` occurs exactly once and its tests exist, so that `make mutation` means something.

    Mutation: rename a variable of a loss without the table.
    """
    mutations = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    assert len(mutations) > 50
    for mutation in mutations:
        assert (ROOT / mutation["file"]).read_text().count(mutation["old"]) == 1, mutation
        assert all((ROOT / test.split("::")[0]).is_file() for test in mutation["tests"]), mutation
