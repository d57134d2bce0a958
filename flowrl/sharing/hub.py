"""The upload of a folder to the hub, and in one line each what may stand in its way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from flowrl.errors import UserError

_Error = TypeVar("_Error", bound=BaseException)

LOGIN = "run `hf auth login` with a token that may write, or set HF_TOKEN"


def check_name(repository: str) -> None:
    """Raise UserError for what is no ORG/NAME of the hub."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: no name for the hub ({_line(error)})") from error
    if not re.fullmatch(r"[^/]+/[^/]+", repository):
        raise UserError(f"{repository}: no name for the hub; give ORG/NAME or USER/NAME")


def check_token() -> None:
    """Raise UserError where there is no token to upload with."""
    if get_token() is None:
        raise UserError(f"no token for {constants.ENDPOINT}: {LOGIN}")


def upload(folder: Path, repository: str, *, is_private: bool, revision: str | None) -> str:
    """Upload a folder's files in one commit, to a repository and a branch that are made where they
    are missing, and return the address.

    Raises UserError, in one line, where the hub refuses or cannot be reached, where a file of the
    folder cannot be read, and where a private repository is asked for and a public one is there.
    """
    check_token()
    api = HfApi()
    disable_progress_bars()  # whose lines are for terminals
    try:
        address = str(api.create_repo(repository, private=is_private or None, exist_ok=True))
        if is_private and not api.repo_info(repository).private:
            raise UserError(
                f"{repository} is there and is public, so --private cannot be kept; nothing was "
                "uploaded: make it private on the hub, or choose another name"
            )
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message="Upload by flowrl push",
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        raise UserError(f"{repository}: {_reason(error)}") from error
    return address if revision is None else f"{address}/tree/{revision}"


def _reason(error: BaseException) -> str:
    """Say what stands in the way, and the remedy."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is uploaded; unset it"
    refusal = _first(HfHubHTTPError, error)
    if refusal is None:
        return _reason_on_this_side(error)
    status = refusal.response.status_code
    if status == 401:
        return f"{constants.ENDPOINT} does not know the token (401): {LOGIN}"
    if status == 403:
        return (
            "the token may not write there (403): ask for access, take a token that may write, or "
            "choose your own name as ORG"
        )
    if isinstance(refusal, RepositoryNotFoundError) or status == 404:
        return f"no such place on the hub, or not for this token ({status}); check ORG"
    return f"{constants.ENDPOINT} refused ({status}: {_line(refusal)}); push again later"


def _reason_on_this_side(error: BaseException) -> str:
    """Say what stands in the way of an upload that the hub has not refused, and the remedy."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.filename is not None:
            reason = cause.strerror or _line(cause)
            return f"{cause.filename}: {reason}; make it readable and push again"
    # The library's error for no connection, a time-out or an answer cut short is an HTTPError.
    if _first(HTTPError, error) or _first(ConnectionError, error) or _first(TimeoutError, error):
        return f"{constants.ENDPOINT} cannot be reached ({_line(error)}); push again once it can"
    return f"the upload failed ({_line(error)}); push again once that is mended"


def _first(kind: type[_Error], error: BaseException) -> _Error | None:
    """Return the first error of a kind among an error and its causes; None without one."""
    for cause in _chain(error):
        if isinstance(cause, kind):
            return cause
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Walk an error and what it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    """Return an error's text in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:197]}..."
