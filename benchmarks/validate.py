"""Compare what the cost model predicts with what is measured: bytes, memory, step and round time.

    python benchmarks/validate.py                        # everything, some minutes on two cores
    python benchmarks/validate.py bytes memory           # parts of it
    python benchmarks/validate.py --to benchmarks/results/validation

Bytes: whole federations in this process, every round held to its prediction, no difference
allowed. Memory: training state tensor by tensor, and the growth of a fresh process (10 %). Steps:
two rates of this machine (FLOP/s, and bytes/s of the optimizer's pass) are measured on some shapes
and predict others (15 %). Rounds: messages cross a link that `tc` holds to 10, 100 and 1000 Mb/s
(15 %). Exit status 1 if anything lies outside.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from measurement import save
from validation.cases import BASE, PAIR
from validation.comparison import Row, table
from validation.memory import check_memory, measure_memory
from validation.payload import check_bytes
from validation.rounds import check_rounds
from validation.steps import check_steps

from fomoe_flwr import report

PARTS: dict[str, Callable[[argparse.Namespace], Iterable[Row]]] = {
    "bytes": lambda options: check_bytes(),
    "memory": lambda options: check_memory(),
    "steps": lambda options: check_steps(options.repeats),
    "rounds": lambda options: check_rounds(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"default: {[*PARTS]}")
    parser.add_argument("--repeats", type=int, default=7, help="of a timed step")
    parser.add_argument("--to", type=Path, default=None, help="write FILE.json and FILE.md")
    parser.add_argument("--measure-memory", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return 0
    rows: list[Row] = []
    for part in options.parts or PARTS:
        for row in PARTS[part](options):
            rows.append(row)
            if row.what != "bytes" or not row.is_within:
                print(
                    f"{row.what:<22}{row.predicted:>16,.5g}{row.measured:>16,.5g} {row.unit} "
                    f"{row.difference:>+8.1%} {'' if row.is_within else 'OUTSIDE'} {row.case}",
                    flush=True,
                )
    outside = [row for row in rows if not row.is_within]
    print(f"\n{table(rows)}\n\n{len(rows)} comparisons, {len(outside)} outside their bounds")
    if options.to:
        where = report.environment()
        document = {**where, "rows": [{**vars(row), "difference": row.difference} for row in rows]}
        save(options.to.with_suffix(".json"), document)
        head = "\n".join(f"- {key.rpartition('/')[2]}: {value}" for key, value in where.items())
        load = f"- load: {os.getloadavg()[2]:.1f} processes wanted to run, mean of 15 minutes"
        head += f"\n{load}"
        options.to.with_suffix(".md").write_text(
            "# Predicted and measured\n\n"
            f"`python benchmarks/validate.py --to {options.to}`\n\n{head}\n- base: `{BASE}`\n"
            f"- pair: `{PAIR}`\n\n{table(rows)}\n"
        )
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
