"""Time the training step of one worker in one process and in several, under DDP and FSDP2.

    python benchmarks/parallel.py --json benchmarks/results/parallel-gpu.json
    python benchmarks/parallel.py --processes 2 --share 0.25 model=olmoe-demo local.steps=16

The worker holds `--share` of the experts of every layer. A step has as many micro-batches as there
are processes, and each takes one; a lone process takes them one after the other, so all variants
see the same tokens and must report the same loss. Efficiency is the speed-up over one process,
divided by the number of processes. Memory is the most that torch held on a process's GPU.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from measurement import parser_of, save
from safetensors.torch import save_file

from fomoe_flwr.config import Settings, load_settings, settings_from_dict
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import load_state, state_of
from fomoe_flwr.parallel.processes import Processes
from fomoe_flwr.parallel.serve import Job, serve
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.parallel.torch_team import TorchTeam
from fomoe_flwr.report.environment import environment
from fomoe_flwr.worker.step_benchmark import RandomBatches
from fomoe_flwr.worker.trainer import LocalTrainer
from fomoe_flwr.worker.training_model import TrainingModel

ON_GPU = (
    # 1.7 billion parameters, of which a token uses 0.3.
    "model.num_layers=16",
    "model.hidden_size=1024",
    "model.expert_size=512",
    "model.num_experts=64",
    "model.top_k=8",
    "model.num_heads=16",
    "model.num_kv_heads=16",
    "model.vocab_size=50304",
    "data.sequence_length=2048",
    "local.batch_size=8",
    "local.precision=bfloat16",
)
TIMEOUT_SECONDS = 300


def take_steps(job: Job, joined: TorchTeam) -> dict[str, Any]:
    """Train `warm_steps` and then `local.steps` steps; return what the latter report."""
    settings = settings_from_dict(job["settings"])
    team: Team = joined if joined.size > 1 else ALONE
    shape, device = settings.model, joined.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    config = transformers_config(shape, settings.data.sequence_length)
    held = max(1, round(shape.num_experts * job["share"]))
    residents = [list(range(held))] * shape.num_layers
    full = build_model(shape, config, residents, seed=settings.seed)
    model = build_model(shape, config, residents, device=device, empty=True, arrange=team.arrange)
    load_state(model, state_of(full))
    del full
    execution = Execution.choose(settings, device, team.size)
    execution.prepare(model)
    team.take(model)
    batches = RandomBatches(settings, device)
    training = TrainingModel(model, settings, team, execution)
    trainer = LocalTrainer(training, settings, residents, lambda position: batches)
    trainer.train(job["warm_steps"])
    trainer.probe.forget()
    # What is measured begins at the schedule's start again.
    trainer.step = 0
    report = trainer.train(settings.local.steps)
    trained = trainer.weights
    if job.get("weights"):
        weights = {key: trained[key].cpu().contiguous() for key in trained}
        if joined.is_first:
            save_file(weights, job["weights"])
    team.let_go()
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "balance_loss": report.balance_loss,
        "ghost_fraction": report.routing.ghost_fraction,
        "tokens": report.tokens,
        "tokens_per_second": report.tokens_per_second,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else None,
    }


def job(settings: Settings, device: str, parallel: str, share: float, **more: Any) -> Job:
    """Return the job of one variant."""
    return {
        "settings": settings.to_dict(),
        "share": share,
        "warm_steps": 3,
        "device": device,
        "parallel": parallel,
        "state_bytes": 0,
        "threads": max(1, torch.get_num_threads() // settings.local.accumulate),
        "timeout_seconds": TIMEOUT_SECONDS,
    } | more


def compare(settings: Settings, device: str, count: int, share: float) -> dict[str, Any]:
    """Run one process, then `count` of them under DDP and under FSDP2."""
    results: dict[str, Any] = {}
    for processes, kinds in ((1, ("ddp",)), (count, ("ddp", "fsdp"))):
        together = Processes("parallel", processes)
        try:
            for kind in kinds:
                name = f"{processes} {kind}" if processes > 1 else "1"
                results[name] = together.run(job(settings, device, kind, share))
                speed_up = results[name]["tokens_per_second"] / results["1"]["tokens_per_second"]
                results[name] |= {"speed_up": speed_up, "efficiency": speed_up / processes}
                print(f"{name:>8}  {json.dumps(results[name])}", flush=True)
        finally:
            together.close()
    return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("overrides", nargs="*", help="settings, as for `fomoe run`")
    parser.add_argument("--processes", type=int, default=0, help="0: one for every GPU, else 2")
    parser.add_argument("--share", type=float, default=0.5, help="resident share of the experts")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    count = arguments.processes or max(2, torch.cuda.device_count())
    settings = load_settings(
        [
            *(ON_GPU if has_gpu else ()),
            f"local.accumulate={count}",
            "local.warmup_steps=0",
            "local.schedule=constant",
            f"local.steps={10 if has_gpu else 4}",
            *arguments.overrides,
        ]
    )
    results = compare(settings, "cuda" if has_gpu else "cpu", count, arguments.share)
    document = {
        **environment(),
        "cores": os.cpu_count(),
        "share": arguments.share,
        "settings": settings.to_dict(),
        "variants": results,
    }
    save(arguments.json, document)


if __name__ == "__main__":
    if "FOMOE_RANK" in os.environ:
        serve(take_steps)
    else:
        main()
