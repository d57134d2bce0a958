"""What W&B wrote where there is no network: the records of a run's offline segments."""

import json
import struct

from wandb.proto.wandb_internal_pb2 import Record

HEAD, BLOCK, ENTRY = 7, 32768, 7
"""Bytes of the file's head, of a block, and of the head of an entry: checksum, length, kind (whole
or which part).
"""


def segments(run):
    """A run's offline folders, oldest first."""
    return sorted((run / "wandb").glob("offline-run-*"))


def records(segment):
    """All records of a segment, as far as it was written before the process ended."""
    (path,) = segment.glob("run-*.wandb")
    content, place, found, whole = path.read_bytes(), HEAD, [], b""
    assert content[:4] == b":W&B"
    while place + ENTRY <= len(content):
        left = BLOCK - place % BLOCK
        if left < ENTRY:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + ENTRY])
        whole += content[place + ENTRY : place + ENTRY + length]
        place += ENTRY + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found


def of_kind(segment, kind):
    """The records of one kind, such as run, history, alert or exit."""
    return [
        getattr(record, kind)
        for record in records(segment)
        if record.WhichOneof("record_type") == kind
    ]


def config(segment):
    """The configuration as it was logged, key by key."""
    merged = {}
    for record in of_kind(segment, "run") + of_kind(segment, "config"):
        updates = record.config.update if hasattr(record, "config") else record.update
        for item in updates:
            if item.key:
                merged[item.key] = json.loads(item.value_json)
    return merged


def artifacts(segment):
    """What was logged as artifacts."""
    requests = of_kind(segment, "request")
    logged = [request.log_artifact.artifact for request in requests]
    return [*of_kind(segment, "artifact"), *(artifact for artifact in logged if artifact.name)]


def history(segment, name):
    """The values logged under `name`, in order."""
    items = [
        {item.key or "/".join(item.nested_key): item.value_json for item in row.item}
        for row in of_kind(segment, "history")
    ]
    return [row[name] for row in items if name in row]


def images(run):
    """How many image files the segments of a run hold together."""
    return sum(len(list(segment.glob("files/media/images/*.png"))) for segment in segments(run))
