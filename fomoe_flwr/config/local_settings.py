"""Settings of a worker's steps: what they compute, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from fomoe_flwr.config.fields import choice, number


@dataclass
class LocalSettings:
    """What a worker does between two synchronisations."""

    steps: int = number(32, at_least=1)
    """Optimizer steps between two synchronisations (the paper's K)."""
    round_seconds: float = number(0, at_least=0)
    """Seconds of steps that a round gives every worker, at its own speed: unequal sites wait less
    for each other. A worker that was not measured yet takes `steps`; 0: all always do."""
    speeds: list[float] = field(default_factory=list)
    """Steps per second of every worker; empty: as measured in its last reply."""
    optimizer: str = choice("adamw", "adamw", "sgd")
    lr: float = number(4e-3, above=0)
    """Highest learning rate."""
    warmup_steps: int = number(32, at_least=0)
    """Steps of the whole run in which the rate rises from 0."""
    schedule: str = choice("cosine", "constant", "cosine", "wsd")
    """How the rate goes on after warm-up, over the whole run."""
    min_lr_ratio: float = number(0.1, at_least=0, at_most=1)
    """Last rate of `cosine` and `wsd`, as a share of `lr`."""
    decay_fraction: float = number(0.2, above=0, at_most=1)
    """Share of the run's steps, at its end, in which `wsd` decays."""
    batch_size: int = number(8, at_least=1)
    """Sequences of a micro-batch."""
    accumulate: int = number(1, at_least=1)
    """Micro-batches of a step."""
    beta1: float = number(0.9, at_least=0, below=1)
    beta2: float = number(0.95, at_least=0, below=1)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.0, at_least=0)
    grad_clip: float = number(1.0, at_least=0)
    """Largest norm of a step's gradients; 0 clips nothing."""
    precision: str = choice("float32", "float32", "bfloat16", "bfloat16_parameters")
    """bfloat16: autocast over fp32 master weights; bfloat16_parameters: no masters, moments in
    bfloat16 too, half the memory. Both are meant for a GPU."""
    fresh_expert_warmup_steps: int = number(8, at_least=0)
    """Steps in which the rate of an expert that is new to its worker rises from 0."""
    keep_inner_state: bool = True
    """Keep the inner optimizer's state between rounds."""
    device: str = choice("auto", "auto", "cpu", "cuda")
    """auto: a GPU if there is one."""
    threads: int = number(0, at_least=0)
    """CPU threads of a worker; 0 leaves them to torch."""
    parallel: str = choice("auto", "auto", "none", "ddp", "fsdp")
    """Processes that train a worker together: a replica in each (ddp), or every parameter parted
    among them (fsdp). auto: ddp if the training state fills at most half of a GPU, else fsdp."""
    processes: int = number(0, at_least=0)
    """0: one for every GPU that the node shows."""


@dataclass
class ExecutionSettings:
    """How a worker computes its steps; what it computes does not depend on it, up to rounding."""

    experts: str = choice("auto", "auto", "autograd", "fused", "static")
    """Core of the experts: `fused` has a backward pass of its own, `static` never waits for the
    device. auto: fused, and static under a CUDA graph."""
    loss: str = choice("auto", "auto", "whole", "chunked")
    """chunked: never all logits at once. auto: chunked on a GPU, and for large vocabularies."""
    compile: str = choice("auto", "auto", "on", "off")
    """Compile attention, norms and router losses. auto: on a GPU."""
    cuda_graph: str = choice("auto", "auto", "on", "off")
    """Capture a step's passes once and replay them, in every round. auto: on a GPU, in bfloat16,
    with one process a worker."""
    checkpoint_activations: bool = False
    """Keep only the inputs of layers, and run layers again in the backward pass."""
    hold_heap: bool = True
    """On a CPU with glibc: what a step frees stays in the process until the round ends. Steps are
    faster, the resident set is somewhat larger. It is for the process, and for good."""
