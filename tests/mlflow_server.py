"""A stand-in for MLflow's server: it keeps what it is sent."""

import json
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

EXPERIMENT = {"experiment_id": "1", "name": "flowrl", "artifact_location": "x"}
RUN = {"info": {"run_id": "a", "run_uuid": "a", "experiment_id": "1", "status": "RUNNING"}}
ANSWERS = {"get-by-name": {"experiment": EXPERIMENT}, "create": {"run": RUN}, "get": {"run": RUN}}


class Server(ThreadingHTTPServer):
    """`seen` has what was sent, by the last word of the address."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen = defaultdict(list)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        word = self.path.partition("?")[0].rpartition("/")[2]
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        self.server.seen[word].append(json.loads(content) if content else None)
        answer = json.dumps(ANSWERS.get(word, {})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *_):
        pass
