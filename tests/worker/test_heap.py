"""Memory that a step frees stays in the process, and goes back to the system afterwards."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from fomoe_flwr.worker.heap import held_heap, hold_heap

# A process of its own: what is set here is for good.
PROGRAM = """
import json, resource, sys, torch
from fomoe_flwr.worker.heap import held_heap, release_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(16 << 20)
found = {"before": faults()}
with held_heap(sys.argv[1] == "held"):
    # Until free blocks of the size lie somewhere in the heap.
    faults()
    found["inside"] = faults()
    found["resident"] = resident()
found["after"] = resident()
print(json.dumps(found))
"""

on_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc"
)


def run(word: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@on_glibc
def test_a_held_heap_hardly_asks_for_a_page_twice_and_gives_all_back() -> None:
    found, size = run("held"), 4 * (16 << 20)
    # Small blocks between large ones make the heap grow now and then.
    assert found["inside"] < found["before"] / 4
    assert found["resident"] - found["after"] > 0.9 * size


@on_glibc
def test_a_heap_that_is_not_held_stays_as_it_was() -> None:
    found = run("free")
    assert found["inside"] > found["before"] / 2


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fomoe_flwr.worker import heap

    monkeypatch.setattr(heap, "_glibc", lambda: None)
    assert not hold_heap()
    with held_heap(True):
        pass
