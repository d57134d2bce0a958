"""The page on which people vote, over a folder of votes: two pictures, of which one is chosen.

    GET  /                   the page, which holds nothing of the run
    GET  /state?tab=TAB      up to two pairs to vote on, and how far voting and training are
    GET  /pictures/DIGEST    a picture
    POST /vote               {"pair": KEY, "choice": "left", "right" or "equal", "tab": TAB}
    POST /undo               {"tab": TAB}: the tab's last vote does not count

All but the page ask for the token, which the page takes from behind the # of its own address:
browsers send that to no server, and write it into no log.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from flowrl.errors import UserError
from flowrl.runs.files import read_object
from flowrl.serving.connections import settings_for
from flowrl.serving.listening import bind
from flowrl.votes.files import (
    DIGEST,
    STATUS,
    AlreadyVoted,
    Choice,
    Pair,
    Vote,
    cast,
    has_pictures,
    mark_as_seen,
    open_pairs,
    picture_path,
    read_pairs,
    read_votes,
    usable_votes,
)

PAGE = Path(__file__).parent / "templates" / "vote.html"
TAB = re.compile(r"[A-Za-z0-9-]{1,64}")
CHOICES = frozenset(get_args(Choice)) - {"undone"}
MAX_BODY = 4096
"""Bytes of a request; a vote has less than 200."""
BODY_SECONDS = 10.0
"""Until a request has arrived."""
AHEAD = 2
"""Pairs that a tab is given: one to look at, and the next one to load meanwhile."""
LEASE = 10.0
"""Seconds for which pairs that a tab was given are given to no other tab; a tab that is seen asks
anew every two.
"""
MAX_CONNECTIONS = 64
IDLE_SECONDS = 30
SHUTDOWN_SECONDS = 5

Answer = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """A request that gets a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class VotingPages:
    """The pages over the folder of votes; `clock` gives seconds. What people said is in the files
    alone, so that the server may end and begin anew at any moment.
    """

    def __init__(
        self, folder: Path, token: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.token = token
        self.clock = clock
        self.leases: dict[str, tuple[str, float]] = {}

    async def page(self, request: Request) -> Response:
        """Answer with the page, which may run its own script alone and ask no other server."""
        nonce = secrets.token_urlsafe(16)
        text = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def state(self, request: Request) -> Response:
        """Answer with what a tab is to show."""
        return JSONResponse(self._state(_tab(request.query_params.get("tab"))))

    async def picture(self, request: Request) -> Response:
        """Answer with the file of a picture. Raises Refused where there is none of that name."""
        digest = request.path_params["digest"]
        path = picture_path(self.folder, digest)
        if not DIGEST.fullmatch(digest) or not path.is_file():
            raise Refused(404, "no such picture")
        return FileResponse(path, media_type="image/png")

    async def vote(self, request: Request) -> Response:
        """Write a vote, and answer with what comes next. Raises Refused where it cannot count."""
        values = await _body(request)
        tab = _tab(values.get("tab"))
        choice = values.get("choice")
        if not isinstance(choice, str) or choice not in CHOICES:
            raise Refused(422, f"choice must be one of {', '.join(sorted(CHOICES))}")
        pair = read_pairs(self.folder).get(str(values.get("pair")))
        if pair is None or not has_pictures(self.folder, pair):
            raise Refused(404, "no such pair, or its pictures were removed")
        self._cast(pair, choice, tab)
        self.leases.pop(pair.key, None)
        return JSONResponse(self._state(tab))

    async def undo(self, request: Request) -> Response:
        """Take a tab's last vote back, and answer with its pair first. Raises Refused where there
        is none.
        """
        tab = _tab((await _body(request)).get("tab"))
        votes = [vote for vote in read_votes(self.folder).votes if vote.tab == tab]
        if not votes:
            raise Refused(409, "there is no vote of this tab to take back")
        self._cast(votes[-1], "undone", tab)
        return JSONResponse(self._state(tab, first=votes[-1]))

    def _cast(self, pair: Pair, choice: Any, tab: str) -> None:
        """Write a vote on a pair. Raises Refused for a second one, and where it cannot be
        written.
        """
        vote = Vote(
            left=pair.left,
            right=pair.right,
            prompt=pair.prompt,
            iteration=pair.iteration,
            choice=choice,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            tab=tab,
        )
        try:
            cast(self.folder, vote)
        except AlreadyVoted:
            raise Refused(409, "this pair has a vote already") from None
        except OSError as error:
            raise Refused(507, f"the vote was not written: {error.strerror}") from error

    def _state(self, tab: str, first: Pair | None = None) -> dict[str, Any]:
        """Say what a tab is to show: the pairs that it has had, then the newest ones."""
        waiting = open_pairs(self.folder)
        now = self.clock()
        chosen = self._free_for(tab, waiting, now)
        if first is not None:
            chosen = [first, *(pair for pair in chosen if pair.key != first.key)]
        chosen = chosen[:AHEAD]
        for pair in chosen:
            self.leases[pair.key] = (tab, now + LEASE)
            mark_as_seen(self.folder, pair)
        ballot = read_votes(self.folder)
        return {
            "pairs": [_shown(pair) for pair in chosen],
            "num_votes": len(usable_votes(self.folder, ballot)),
            "num_open": len(waiting),
            "has_vote": any(vote.tab == tab for vote in ballot.votes),
            "training": self._training(),
        }

    def _free_for(self, tab: str, waiting: Sequence[Pair], now: float) -> list[Pair]:
        """List the pairs that a tab has, then those that no other one has, the newest first."""
        mine = []
        others = []
        # The sort keeps the order within an iteration.
        for pair in sorted(waiting, key=lambda pair: -pair.iteration):
            holder, until = self.leases.get(pair.key, (tab, 0.0))
            if holder == tab and until > now:
                mine.append(pair)
            elif until <= now:
                others.append(pair)
        return [*mine, *others]

    def _training(self) -> dict[str, Any] | None:
        """Return what training last said of itself; None where that is nothing, or damaged."""
        path = self.folder / STATUS
        if not path.is_file():
            return None
        try:
            return read_object(path, "it is written again")
        except UserError:
            return None

    def is_authorized(self, request: Request) -> bool:
        """Tell whether a request has the token."""
        header = request.headers.get("authorization", "")
        # As in the reward server: as bytes, in a time that does not tell how much was right.
        return hmac.compare_digest(header.encode(), f"Bearer {self.token}".encode())


def _shown(pair: Pair) -> dict[str, Any]:
    return {
        "pair": pair.key,
        "left": pair.left,
        "right": pair.right,
        "prompt": pair.prompt,
        "iteration": pair.iteration,
    }


def _tab(value: object) -> str:
    """Return the name of a tab. Raises Refused for what is none."""
    if not isinstance(value, str) or not TAB.fullmatch(value):
        raise Refused(422, "tab must be 1 to 64 letters, digits and dashes")
    return value


async def _body(request: Request) -> dict[str, Any]:
    """Read the JSON object in a body. Raises Refused for a large, a slow and any other one."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY:
                    raise Refused(413, f"a body of more than {MAX_BODY} bytes")
    except TimeoutError:
        raise Refused(408, f"the body took longer than {BODY_SECONDS:g} s") from None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, "the body is no JSON") from None
    if not isinstance(values, dict):
        raise Refused(422, "the body is no JSON object")
    return values


def build_app(pages: VotingPages) -> Starlette:
    """Build the application."""

    def guarded(answer: Answer, *, is_open: bool = False) -> Answer:
        async def respond(request: Request) -> Response:
            try:
                if not is_open and not pages.is_authorized(request):
                    raise Refused(401, "wrong or missing token; open the address that was printed")
                response = await answer(request)
            except Refused as refusal:
                response = JSONResponse({"error": str(refusal)}, refusal.status)
            except UserError as error:
                response = JSONResponse({"error": str(error)}, 500)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            response.headers["Cache-Control"] = "no-store"
            response.headers["Referrer-Policy"] = "no-referrer"
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        return respond

    return Starlette(
        routes=[
            Route("/", guarded(pages.page, is_open=True), methods=["GET"]),
            Route("/state", guarded(pages.state), methods=["GET"]),
            Route("/pictures/{digest}", guarded(pages.picture), methods=["GET"]),
            Route("/vote", guarded(pages.vote), methods=["POST"]),
            Route("/undo", guarded(pages.undo), methods=["POST"]),
        ]
    )


def serve_votes(folder: Path, *, host: str, port: int, token: str) -> None:
    """Serve the page at `host`:`port`, where 0 takes a free one, until SIGINT or SIGTERM.

    Raises UserError for a port that is taken.
    """
    config = settings_for(
        build_app(VotingPages(folder, token)),
        host=host,
        port=port,
        max_connections=MAX_CONNECTIONS,
        idle_seconds=IDLE_SECONDS,
        shutdown_seconds=SHUTDOWN_SECONDS,
    )
    listening = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    # The line that people and scripts wait for: by now a browser can connect.
    print(f"vote at http://{shown}:{listening.getsockname()[1]}/#{token}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
