"""Uploads, as the installed library sends them, to a stand-in of the hub; and what is told where
it refuses.
"""

import socket

import pytest
from hub import Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http

from flowrl.errors import UserError
from flowrl.sharing import hub as uploads


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which the library takes for the hub, with a token of a user's."""
    hub = Hub()
    with hub.start() as url:
        reach(url, monkeypatch)
        hub.url = url
        yield hub


def reach(url, monkeypatch):
    """Have the library take an address for the hub's, without Xet, whose protocol is a library's
    own.
    """
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    _http.close_session()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "README.md").write_text("a card\n")
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "images" / "a.png").write_bytes(b"picture")
    return tmp_path


CONTENT = {
    "README.md": b"a card\n",
    "weights.safetensors": b"weights",
    "images/a.png": b"picture",
}


def push(folder, *, is_private=False, revision=None):
    return uploads.upload(folder, "me/lora", is_private=is_private, revision=revision)


def test_all_files_arrive_in_one_commit(hub, folder):
    """Large ones by Git LFS, all with the token. Mutation: a commit a file, or no token."""
    assert push(folder) == f"{hub.url}/me/lora"
    assert hub.files == {("me/lora", "main"): CONTENT}
    assert hub.private == {"me/lora": False} and hub.messages == ["Upload by flowrl push"]
    # What writes has the token; the library may read without one.
    written = {request: token for request, token in hub.tokens.items() if "POST" in request}
    assert len(written) >= 4 and set(written.values()) == {"Bearer hf_mine"}, written
    # The library also reads on its own account, once a day.
    posted = [request for request in hub.asked if request.startswith("POST")]
    assert posted[0] == "POST /api/repos/create"
    assert "POST /me/lora.git/info/lfs/objects/batch" in posted


def test_a_second_push_goes_to_the_same_place(hub, folder):
    """Mutation: refuse a repository that is there."""
    push(folder)
    (folder / "README.md").write_text("another card\n")
    push(folder)
    assert hub.files["me/lora", "main"]["README.md"] == b"another card\n"


def test_a_branch_is_made(hub, folder):
    """Mutation: upload to main all the same."""
    address = push(folder, revision="v2")
    assert address == f"{hub.url}/me/lora/tree/v2"
    assert hub.files == {("me/lora", "v2"): CONTENT}


def test_private_means_private(hub, folder):
    """What is public already stays without the files. Mutation: upload there, or ask for a public
    repository.
    """
    push(folder, is_private=True)
    assert hub.private == {"me/lora": True} and hub.files["me/lora", "main"] == CONTENT
    hub.private["me/lora"] = False
    hub.files.clear()
    with pytest.raises(UserError, match="is there and is public, so --private cannot be kept"):
        push(folder, is_private=True)
    assert hub.files == {}


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("/api/", 401, r"does not know the token \(401\): run `hf auth login`"),
        ("/api/", 403, r"the token may not write there \(403\): ask for access"),
        ("/api/repos/create", 500, r"refused \(500: .*\); push again later"),
        ("/api/models/me/lora/preupload", 404, r"no such place on the hub.* check ORG"),
        ("/me/lora.git", 403, r"the token may not write there \(403\)"),
        ("/api/models/me/lora/commit", 403, r"the token may not write there \(403\)"),
    ],
)
def test_refusals_are_one_line(place, status, words, hub, folder):
    """Mutation: let the library's lines through."""
    hub.refuse[place] = status
    with pytest.raises(UserError, match=f"^me/lora: .*{words}") as told:
        push(folder)
    assert "\n" not in str(told.value)


def test_no_network_no_token_and_offline_are_told(folder, monkeypatch):
    """Mutation: a traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reach(f"http://127.0.0.1:{port}", monkeypatch)
    with pytest.raises(UserError, match=r"cannot be reached \(.*\); push again once it can"):
        push(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _http.close_session()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(folder)
    monkeypatch.setattr(uploads, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"no token for http.*: run `hf auth login`"):
        push(folder)


@pytest.mark.parametrize(
    ("asked", "name"),
    [("/api/models/me/lora/preupload", "README.md"), ("/me/lora.git", "weights.safetensors")],
)
def test_a_file_that_cannot_be_read_is_named(asked, name, hub, folder):
    """Whether it is uploaded with the commit or before it; here it is gone once it was listed.

    Mutation: say of every error of this machine's that the hub cannot be reached.
    """
    refused = hub.refused

    def lose_file(handler):
        if handler.path.startswith(asked):
            (folder / name).unlink(missing_ok=True)
        return refused(handler)

    hub.refused = lose_file
    with pytest.raises(UserError) as told:
        push(folder)
    reason = "No such file or directory; make it readable and push again"
    assert str(told.value) == f"me/lora: {folder / name}: {reason}"
    assert hub.files == {}


def test_other_failures_are_told_as_they_are(hub, folder, monkeypatch):
    """Such as the transfer library's own. Mutation: say that the hub cannot be reached."""

    def fail(*_, **__):
        raise RuntimeError("the transfer\nbroke")

    monkeypatch.setattr(uploads.HfApi, "upload_folder", fail)
    with pytest.raises(
        UserError, match=r"^me/lora: the upload failed \(the transfer broke\); push"
    ):
        push(folder)


@pytest.mark.parametrize("name", ["lora", "me/lora/2", "me/my lora", "", "me/", "/lora", "me/-x-"])
def test_a_name_of_the_hub_is_asked_for(name):
    """Before anything is written. Mutation: take what the library would make of it."""
    with pytest.raises(UserError, match="no name for the hub"):
        uploads.check_name(name)
    uploads.check_name("me/my-lora_2.0")
