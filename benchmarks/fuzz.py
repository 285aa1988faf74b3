"""Throw spoilt messages at what reads them, and count: refused, accepted, and anything else.

    python benchmarks/fuzz.py --seconds 60 --json benchmarks/results/fuzz.json

True arrays of every codec and true texts of tasks and replies are cut, lengthened, overwritten,
spliced and bitten into, drawn from a seed. A reader must return finite numbers of the agreed size,
or raise its one documented error. Anything else is a finding: it is printed with the seed of its
case, and the exit status is 1. `--case SEED` repeats one.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict
from measurement import markdown, parser_of, save

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.sizes import CODECS, Codec
from fomoe_flwr.codecs.vectors import decode, encode
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.routing_fields import choices_in, counts_in
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.report.environment import environment

LAYERS, EXPERTS, TOP_K, TOKENS = 2, 4, 2, 6
TASK = TaskHeader(
    settings={"rounds": 2, "model": {"name": "x"}},
    spec_digest="0a" * 8,
    tokenizer_digest="1b" * 32,
    run_key="2c" * 16,
    worker=1,
    server_round=3,
    layout_digest="3d" * 8,
    residents=((0, 2), (1, 3)),
    keep_rounds=[1, 2],
    fragment=-1,
    moments=["exp_avg"],
    pooled_share=[[0.5, 0.5]],
    probe=[[3, 1], [4, 1]],
)
REPLY = {
    "server_round": 3,
    "worker": 1,
    "layout_digest": "3d" * 8,
    "load": [[3] * EXPERTS] * LAYERS,
    "ghosts": [1] * LAYERS,
    "all_ghost": [0] * LAYERS,
    "routed_tokens": 6,
    "choices": [[0, 1] * TOKENS] * LAYERS,
}
HOSTILE = ("NaN", "-1", "1e999", "9" * 400, "null", "{}", "[]", '""', "true", "[" * 2000, "-0.0")


def bite(data: bytes, draw: random.Random) -> bytes:
    """Spoil bytes in one of several ways, one to four times."""
    spoilt = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(spoilt) + 1)
        match draw.randrange(6):
            case 0:
                del spoilt[at : at + draw.randint(1, 64)]
            case 1:
                spoilt[at:at] = draw.randbytes(draw.randint(1, 64))
            case 2:
                spoilt[at : at + 8] = draw.randbytes(min(8, len(spoilt) - at))
            case 3:
                other = draw.randrange(len(spoilt) + 1)
                spoilt[at : at + 16] = spoilt[other : other + 16][: len(spoilt) - at]
            case 4:
                spoilt[at : at + 4] = b"\xff\xff\x7f\x7f"[: len(spoilt) - at]
            case _:
                spoilt = bytearray(draw.randbytes(len(spoilt)))
    return bytes(spoilt)


def swap(value: Any, draw: random.Random) -> Any:
    """Put something hostile in the place of one value of a JSON tree."""
    if draw.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return f"@{draw.choice(HOSTILE)}@"
    if isinstance(value, dict):
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: swap(value[key], draw)}
    copy = list(value)
    at = draw.randrange(len(copy))
    copy[at] = swap(copy[at], draw)
    return copy * draw.choice((1, 1, 1, 3))


def spoil_text(fields: dict[str, Any], draw: random.Random) -> str:
    """Spoil a JSON text: as a tree, or as bytes."""
    text = json.dumps(swap(fields, draw)).replace('"@', "").replace('@"', "").replace('\\"', '"')
    if draw.random() < 0.3:
        text = bite(text.encode(), draw).decode("utf-8", "replace")
    return text


def array_case(draw: random.Random) -> tuple[str, int, Callable[[], None]]:
    """Spoil the bytes of a vector."""
    codec = Codec(draw.choice(CODECS), zstd_level=draw.choice((0, 0, 3)))
    size = draw.choice((0, 1, 127, 4097, 9000))
    vector = torch.randn(size, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    data = bite(encode(vector, codec), draw)

    def read() -> None:
        found = decode(data, codec, size)
        assert found.shape == (size,), found.shape
        assert found.dtype is torch.float32, found.dtype
        assert bool(torch.isfinite(found).all()), "not finite"

    return f"array {codec.name}", len(data), read


def text_case(draw: random.Random) -> tuple[str, int, Callable[[], None]]:
    """Spoil the text of a task or a reply."""
    is_task = draw.random() < 0.5
    fields = {**vars(TASK)} if is_task else REPLY
    text = spoil_text(fields, draw)
    content = RecordDict({wire.TASK: ConfigRecord({"json": text})})

    def read_task() -> None:
        header = TaskHeader.read(content)
        assert header.server_round >= 0

    def read_reply() -> None:
        words = wire.json_in(content, wire.TASK)
        counts = counts_in(words, LAYERS, EXPERTS)
        assert counts.load.shape == (LAYERS, EXPERTS)
        choices = choices_in(words, LAYERS, TOKENS, TOP_K, EXPERTS)
        assert 0 <= int(choices.min()) <= int(choices.max()) <= EXPERTS

    return ("task", len(text), read_task) if is_task else ("reply", len(text), read_reply)


def run_case(seed: int) -> tuple[str, int, str]:
    """Run one case; return what it was, its bytes, and how it ended."""
    draw = random.Random(seed)
    kind, size, read = (array_case if draw.random() < 0.7 else text_case)(draw)
    try:
        read()
    except (CodecError, WireError):
        return kind, size, "refused"
    except Exception as error:  # whatever else comes is what is looked for
        return kind, size, f"{type(error).__name__}: {error}"[:200]
    return kind, size, "accepted"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--case", type=int, default=None, help="run this case alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case is not None:
        print(run_case(options.case))
        return
    ends: dict[str, Counter[str]] = {}
    findings, total, seed = [], 0, options.seed
    stop = time.monotonic() + options.seconds
    while time.monotonic() < stop:
        kind, size, end = run_case(seed)
        total += size
        if end not in ("refused", "accepted"):
            findings.append({"seed": seed, "kind": kind, "error": end})
            print(f"case {seed}, {kind}: {end}", flush=True)
            end = "finding"
        ends.setdefault(kind, Counter())[end] += 1
        seed += 1
    shown = []
    for kind, counts in sorted(ends.items()):
        cells = [sum(counts.values()), *(counts[e] for e in ("refused", "accepted", "finding"))]
        shown.append([kind, *(f"{cell:,}" for cell in cells)])
    print(markdown(("read", "cases", "refused", "accepted", "findings"), shown))
    print(f"\n{seed - options.seed:,} cases, {total:,} bytes, {len(findings)} findings")
    document = {
        **environment(),
        "cases": seed - options.seed,
        "bytes": total,
        "ends": ends,
        "findings": findings,
    }
    save(options.json, document)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
