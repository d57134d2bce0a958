"""A stand-in for W&B's server on this machine: it takes one key and answers what its library asks
at a run's start.
"""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

KEY = "0123456789" * 4
TOKEN, ACCESS = "header.payload.signature", "an-access-token"
ENTITY = {"id": "e", "name": "me"}
PROJECT = {"id": "p", "name": "flowrl", "entity": ENTITY}
BUCKET = {
    "id": "b",
    "name": "the-id",
    "displayName": "a run",
    "config": "{}",
    "historyLineCount": 0,
}
ANSWERS = {
    "Viewer": {
        "viewer": {
            "id": "v",
            "entity": "me",
            "username": "me",
            "flags": "{}",
            "teams": {"edges": []},
        }
    },
    "RunResumeStatus": {"model": PROJECT | {"bucket": None}},
    "UpsertBucket": {"upsertBucket": {"bucket": BUCKET | {"project": PROJECT}, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
}


class Server:
    """Listens while it is entered; `seen` holds the operations that were asked for with the right
    key.
    """

    def __init__(self):
        self.seen = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def handler(self):
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, status, content):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def do_GET(self):
                self.answer(404, {})

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/oidc/token":
                    is_known = TOKEN.encode() in body
                    self.answer(
                        200 if is_known else 401, {"access_token": ACCESS, "expires_in": 3600}
                    )
                elif self.path != "/graphql":
                    self.answer(200, {})
                elif self.headers.get("Authorization") in (basic(KEY), f"Bearer {ACCESS}"):
                    name = json.loads(body)["operationName"]
                    seen.append(name)
                    self.answer(200, {"data": ANSWERS.get(name, {})})
                else:
                    self.answer(401, {"errors": [{"message": "no such key"}]})

        return Handler


def basic(key):
    """The header in which W&B's library sends a key."""
    return "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
