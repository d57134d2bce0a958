"""One finished run, shared by the smoke tests."""

from pathlib import Path

import pytest
from runs import SHORT, train


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished run of four iterations, started where outputs/ is its own."""
    place = tmp_path_factory.mktemp("finished")
    result = train(*SHORT, cwd=place)
    assert result.returncode == 0, result.stderr
    return (place / "outputs" / "latest").resolve()
