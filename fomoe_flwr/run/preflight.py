"""Preflight: everything that can be refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fomoe_flwr.config import RoutingMode, Settings, fewest_residents
from fomoe_flwr.costs import layout_context, worker_parameters
from fomoe_flwr.data.inventory import check_inventory
from fomoe_flwr.data.source import check_data
from fomoe_flwr.layout import check_layout
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.pretrained import check_weights
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.upcycling import check_dense
from fomoe_flwr.parallel.batch_split import BatchSplit
from fomoe_flwr.parallel.choice import num_processes
from fomoe_flwr.parameters.shapes import num_sparse_layers
from fomoe_flwr.run.directory import RunDirectory, claim_output_dir
from fomoe_flwr.run.tracking import check_tracker
from fomoe_flwr.worker.device import (
    check_cuda_graph,
    check_device,
    check_worker_memory,
    pick_device,
)


def preflight(settings: Settings) -> None:
    """Check layout, device, text and output directory. Raises SettingsError or DataError."""
    model = settings.model
    layers, context = num_sparse_layers(model), layout_context(settings)
    check_layout(settings.layout, layers, model.num_experts, context)
    # Only here is the worker's machine known to be this one.
    is_here = settings.engine == "in_process"
    if settings.local.processes:
        BatchSplit.of(settings.local, settings.local.processes)
    if is_here:
        check_device("local.device", settings.local.device)
        check_device("eval.device", settings.eval.device)
        device = pick_device(settings.local.device)
        check_cuda_graph(settings, device)
        count = num_processes(settings, device.type, torch.cuda.device_count())
        check_worker_memory(settings, worker_parameters(settings), device, count)
    if model.pretrained and not settings.resume:
        check_weights(model)
    if model.upcycle and not settings.resume:
        check_dense(model)
    if model.architecture and model.routing_mode is RoutingMode.PARTITIONED:
        # Its class is asked here, not by a worker in the first round.
        held = (tuple(range(max(1, fewest_residents(settings)))),) * layers
        build_model(model, transformers_config(model, 0), held, device="meta")
    check_tracker(settings)
    if settings.resume:
        run = RunDirectory(Path(settings.output_dir))
        # The run has a copy: the folder that its tokenizer came from may be gone.
        kept = replace(settings.data, tokenizer=str(run.tokenizer))
        check_data(replace(settings, data=kept))
        check_inventory(run.text, settings.data)
    else:
        check_data(settings)
    claim_output_dir(settings)
