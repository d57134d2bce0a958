"""Threads that give way where other programs want the processors too.

OpenMP's threads spin while they wait for each other, which is fastest on an idle machine. On a busy
one they take the time of those that they wait for: `debug=smoke` beside four other processes on two
cores took 149 seconds, and 22 where its threads sleep instead; on the idle machine sleeping costs a
third of the speed.
"""

from __future__ import annotations

import os

BUSY = 1.25
"""The load, for each core, from which on a machine is busy."""

SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user has decided already."""


def give_way_when_busy() -> str:
    """Let OpenMP's threads sleep while they wait, on a machine that is busy, and return the line
    that says so; empty where they spin.

    It must be called before PyTorch is imported, since OpenMP reads its variables then.
    """
    is_decided = any(name in os.environ for name in SAID)
    is_alone = os.environ.get("OMP_NUM_THREADS") == "1"
    if is_decided or is_alone or not hasattr(os, "getloadavg"):
        return ""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load < BUSY * cores:
        return ""
    os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"})
    return (
        f"busy machine (load {load:.1f}, {cores} cores): threads give way, OMP_WAIT_POLICY=PASSIVE"
    )
