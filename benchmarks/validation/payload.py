"""Bytes of messages: every round of a whole federation is held to its prediction."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fomoe_flwr import costs
from fomoe_flwr.config import load_settings
from fomoe_flwr.federation.in_process import run_in_process
from fomoe_flwr.layout import Layout
from fomoe_flwr.run.directory import RunDirectory
from validation.cases import TINY
from validation.comparison import Row

BYTES = (
    "layout.overlap=1",
    "layout.overlap=2 model=qwen3-moe-tiny layout.kind=random",
    "layout.overlap=2 model=mixtral-tiny model.routing=partitioned layout.kind=rolling",
    "layout.overlap=2 model=deepseek-v3-tiny layout.kind=balanced",
    "layout.overlap=2 model=glm4-moe-tiny model.routing=partitioned outer=nesterov",
    "layout.overlap=2 model=fomoe-tiny outer=local_adamw layout.kind=random",
    "layout.overlap=2 model=fomoe-tiny model.routing=partitioned outer=des_loc",
    "layout.overlap=2 layout.kind=weighted layout.residents=[12,8,4]",
    "layout.overlap=2 outer.fragments=2 wire.up=bfloat16",
    "layout.overlap=2 outer=local_adamw outer.fragments=2 layout.kind=random "
    "layout.reshuffle_every=2",
    "layout.overlap=2 wire.up=float16 wire.down=bfloat16 layout.warm_rounds=1",
    "layout.overlap=2 model=deepseek-v3-tiny outer=des_loc outer.fragments=2",
    "layout.overlap=3 outer=nesterov wire.up=bfloat16 wire.down=bfloat16",
    "layout.overlap=2 wire.up=int8 wire.down=bfloat16 outer=nesterov",
    "layout.num_workers=5 layout.overlap=2 layout.allow_uneven=true",
    "experiment=centralised layout.num_workers=1",
)


def check_bytes() -> Iterable[Row]:
    for words in BYTES:
        with tempfile.TemporaryDirectory() as folder:
            settings = load_settings([*TINY, *words.split(), f"output_dir={folder}/run"])
            with silence():
                assert run_in_process(settings)
            run = RunDirectory(Path(folder) / "run")
            rows, layouts = run.read_metrics(), run.read_layouts()
        before = None
        for row in rows:
            layout = Layout.from_json(layouts[str(row["round"])])
            told = costs.predict_round(settings, layout, row["round"], before)
            before = layout
            for way in ("up", "down"):
                name = f"{words}, round {row['round']} {way}"
                found = row[f"comm/bytes_{way}"]
                yield Row("bytes", name, getattr(told, way), found, "B", 0.0)


@contextlib.contextmanager
def silence() -> Iterable[None]:
    """Keep a run's own lines out of the table."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)
