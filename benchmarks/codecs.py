"""Measure how fast codecs turn numbers into bytes and back, as a share of memory bandwidth.

    python benchmarks/codecs.py --threads 2 --json benchmarks/results/codecs.json
    python benchmarks/codecs.py --megabytes 64 --threads 1

A vector of normal numbers is encoded and decoded. Speed is bytes of its fp32 form over seconds,
best of `--repeat`, as a share of what a copy of a block of memory reaches in the same process. What
each codec does to the loss: `python benchmarks/experiments.py --series codecs`.
"""

from __future__ import annotations

import torch
from measurement import best_seconds, markdown, parser_of, save
from server import copy_speed

from fomoe_flwr.codecs.sizes import CODECS, INTEGERS, Codec
from fomoe_flwr.codecs.vectors import decode, encode
from fomoe_flwr.report.environment import environment


def measure(codec: Codec, vector: torch.Tensor, repeat: int) -> dict[str, float]:
    """Time one codec; also return its relative error."""
    size = vector.numel()
    data = encode(vector, codec)
    error = (decode(data, codec, size) - vector).norm() / vector.norm()
    return {
        "bytes_per_number": len(data) / size,
        "relative_error": float(error),
        "encode_seconds": best_seconds(lambda: encode(vector, codec), repeat),
        "decode_seconds": best_seconds(lambda: decode(data, codec, size), repeat),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    num_bytes = options.megabytes * 2**20
    copy = copy_speed(num_bytes)
    vector = torch.randn(num_bytes // 4, generator=torch.Generator().manual_seed(0))
    rows, shown = [], []
    by_chance = [Codec(name, stochastic=True) for name in INTEGERS]
    for codec in [*map(Codec, CODECS), *by_chance]:
        name = f"{codec.name}, stochastic" if codec.stochastic else codec.name
        row = measure(codec, vector, options.repeat)
        for way in ("encode", "decode"):
            row[f"{way}_share_of_copy"] = num_bytes / row[f"{way}_seconds"] / copy
        rows.append({"codec": name, **row})
        cells = [f"`{name}`", f"{row['bytes_per_number']:.3f}", f"{row['relative_error']:.2g}"]
        for way in ("encode", "decode"):
            speed = num_bytes / row[f"{way}_seconds"]
            cells += [f"{speed / 1e9:.2f}", f"{row[f'{way}_share_of_copy']:.0%}"]
        shown.append(cells)
    print(f"copy: {copy / 1e9:.1f} GB/s, {options.threads} threads\n")
    titles = ("codec", "bytes a number", "relative error")
    titles += ("encode GB/s", "of copy", "decode GB/s", "of copy")
    print(markdown(titles, shown))
    document = {
        **environment(),
        "threads": options.threads,
        "bytes": num_bytes,
        "copy_bytes_per_second": copy,
        "rows": rows,
    }
    save(options.json, document)


if __name__ == "__main__":
    main()
