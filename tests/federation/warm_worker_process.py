"""A warm worker in a process of its own whose answers take no training and no torch.

python warm_worker_process.py FOLDER IDLE_SECONDS WITH_PROCESS
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from flwr.app import Context, RecordDict

from fomoe_flwr.federation.warm.folder import Folder
from fomoe_flwr.federation.warm.process import run_warm_worker


def note(context: Context, text: str) -> None:
    """Append to the file that the test reads."""
    with open(str(context.node_config["notes"]), "a", encoding="utf-8") as stream:
        stream.write(f"{os.getpid()} {text}\n")


def echo(content: RecordDict, context: Context) -> RecordDict:
    """Return what came."""
    note(context, f"echo {context.run_id} {context.node_id} {context.run_config}")
    return content


def slow(content: RecordDict, context: Context) -> RecordDict:
    """Take a while."""
    note(context, "begin")
    time.sleep(float(context.node_config["seconds"]))
    note(context, "end")
    return content


def fragile(content: RecordDict, context: Context) -> RecordDict:
    """Die hard as often as the test wants, then answer."""
    notes = Path(str(context.node_config["notes"]))
    deaths = len(notes.read_text(encoding="utf-8").splitlines()) if notes.is_file() else 0
    if deaths < int(context.node_config["deaths"]):
        note(context, "dies")
        os.kill(os.getpid(), signal.SIGKILL)
    return content


def hang(content: RecordDict, context: Context) -> RecordDict:
    """Wait for itself for ever, the first time."""
    is_first = not Path(str(context.node_config["notes"])).is_file()
    note(context, "begin")
    if is_first:
        threading.Event().wait()
    return content


def grind(content: RecordDict, context: Context) -> RecordDict:
    """Compute for a while."""
    note(context, "begin")
    end = time.monotonic() + float(context.node_config["seconds"])
    while time.monotonic() < end:
        sum(range(10_000))
    return content


def refuse(content: RecordDict, context: Context) -> RecordDict:
    """Fail in the way of a bad message."""
    raise ValueError("not\nwith me")


def break_down(content: RecordDict, context: Context) -> RecordDict:
    """Fail in a way that nobody foresaw."""
    raise KeyError("a bug")


if __name__ == "__main__":
    run_warm_worker(
        Folder(sys.argv[1]),
        float(sys.argv[2]),
        int(sys.argv[3]),
        {f.__name__: f for f in (echo, slow, fragile, hang, grind, refuse, break_down)},
    )
