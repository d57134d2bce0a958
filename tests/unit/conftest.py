"""Folders that the tests of several files start from."""

import shutil

import pytest


@pytest.fixture
def study_place(tmp_path):
    """The places of a study of which nothing was run."""
    from study_by_hand import place_of

    return place_of(tmp_path)


@pytest.fixture(scope="module")
def awake_policy():
    """A policy with LoRA weights away from zero."""
    from runs import awake, make

    return awake(make()[0])


@pytest.fixture
def finished_run(tmp_path, awake_policy):
    """The folder of a finished run, whose configuration tells secrets and places."""
    from shared_run import write_run

    folder = tmp_path / "my run"
    write_run(folder, awake_policy)
    return folder


@pytest.fixture
def embedded_folder(tmp_path):
    """A copy of the embedded pipeline, which a test may damage."""
    from embedded_pipeline import EMBEDDED

    folder = tmp_path / "pipeline"
    shutil.copytree(EMBEDDED, folder)
    return folder
