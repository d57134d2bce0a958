"""A stand-in of the hub's interface, as far as uploads use it: repositories, branches, the question
how each file is uploaded, large files by Git LFS, and commits.
"""

import base64
import json
from dataclasses import dataclass, field

from servers import answering, reply


@dataclass
class Hub:
    """What was uploaded: `files` by repository, branch and path; `private` repositories; the
    requests in order; the token of each. `refuse` maps the beginning of a path to a status.
    """

    files: dict = field(default_factory=dict)
    private: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    tokens: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)
    cards: list = field(default_factory=list)
    refuse: dict = field(default_factory=dict)
    url: str = ""

    def start(self):
        """Serve until the context ends."""
        return answering(self.post, get=self.get, put=self.put)

    def refused(self, handler):
        request = f"{handler.command} {handler.path.partition('?')[0]}"
        self.asked.append(request)
        self.tokens[request] = handler.headers.get("Authorization")
        for start, status in self.refuse.items():
            if handler.path.startswith(start):
                reply(handler, {"error": "not for you"}, status)
                return True
        return False

    def get(self, handler):
        if self.refused(handler):
            return
        name = handler.path.removeprefix("/api/models/").partition("?")[0]
        reply(handler, {"id": name, "private": self.private.get(name, False)})

    def put(self, handler, body):
        self.asked.append(f"PUT {handler.path}")
        self.objects[handler.path.rpartition("/")[2]] = body
        reply(handler, {})

    def post(self, handler, body):
        if self.refused(handler):
            return
        path = handler.path.partition("?")[0]
        if path == "/api/repos/create":
            self.create(handler, json.loads(body))
        elif path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            reply(handler, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(handler, json.loads(body))
        else:
            _, _, _, organisation, name, action, revision = path.split("/")
            repository = f"{organisation}/{name}"
            if action == "branch":
                self.files[repository, revision] = {}
                reply(handler, {})
            elif action == "preupload":
                self.preupload(handler, json.loads(body))
            elif action == "commit":
                self.commit(handler, repository, revision, body)

    def create(self, handler, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        is_new = name not in self.private
        if is_new:
            # Earlier versions of the library ask in the first way, later ones in the second.
            is_private = wanted.get("private") or wanted.get("visibility") == "private"
            self.private[name] = bool(is_private)
        body = {"url": f"https://huggingface.co/{name}", "error": "You already created this"}
        reply(handler, body, 200 if is_new else 409)

    def preupload(self, handler, wanted):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs"
                if file["path"].endswith((".safetensors", ".png"))
                else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        reply(handler, {"files": modes})

    def batch(self, handler, wanted):
        url = f"http://{handler.headers['Host']}"
        objects = [
            {**entry, "actions": {"upload": {"href": f"{url}/objects/{entry['oid']}"}}}
            for entry in wanted["objects"]
        ]
        reply(handler, {"objects": objects})

    def commit(self, handler, repository, revision, body):
        files = self.files.setdefault((repository, revision), {})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        address = f"https://huggingface.co/{repository}/commit/0"
        reply(handler, {"commitUrl": address, "commitOid": "0" * 40})
