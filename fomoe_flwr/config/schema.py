"""The settings of a run: one tree of dataclasses, their defaults and their bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fomoe_flwr.codecs.sizes import CHUNK, CODECS, FLOATS, INTEGERS, Codec, CodecPair


class RoutingMode(StrEnum):
    """How a worker's router treats experts that the worker does not hold (paper section 3.2)."""

    SKIP_TOKEN = "skip_token"
    """Full router on every worker, top-k over all experts; a chosen ghost adds nothing."""

    PARTITIONED = "partitioned"
    """Router rows travel with their experts, top-k over the residents only."""


def _number(
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={"bounds": bounds})


def _choice(default: str, *options: str) -> Any:
    return field(default=default, metadata={"options": options})


@dataclass
class ModelSettings:
    """Shape of the model; every family of `fomoe_flwr.model.families` takes the same names."""

    name: str = "olmoe-demo"
    family: str = _choice(
        "olmoe", "olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "fomoe"
    )
    routing: str = _choice("skip_token", *(mode.value for mode in RoutingMode))
    num_layers: int = _number(4, at_least=1)
    hidden_size: int = _number(256, at_least=8)
    expert_size: int = _number(256, at_least=1)
    num_heads: int = _number(4, at_least=1)
    num_kv_heads: int = _number(4, at_least=1)
    head_size: int = _number(0, at_least=0)
    """Width of an attention head; 0 means hidden_size / num_heads."""
    num_experts: int = _number(16, at_least=1)
    num_shared_experts: int = _number(0, at_least=0)
    """Experts that every token passes and every worker holds; `deepseek_v3` and `glm4_moe` only."""
    top_k: int = _number(2, at_least=1)
    vocab_size: int = _number(4096, at_least=260)
    tie_embeddings: bool = True
    norm_topk: bool = False
    init_std: float = _number(0.02, above=0)
    pretrained: str = ""
    """Folder of a transformers checkpoint to go on from (continued pre-training)."""
    rope_theta: float = _number(0.0, at_least=0)
    """Base of the rotary angles; 0 means the family's own."""
    norm_eps: float = _number(0.0, at_least=0)
    """0 means the family's own."""
    base_hidden_size: int = _number(256, at_least=1)
    base_num_layers: int = _number(4, at_least=1)
    """Proxy from which CompleteP transfers learning rate and scales; `fomoe` only."""

    @property
    def routing_mode(self) -> RoutingMode:
        return RoutingMode(self.routing)


@dataclass
class DataSettings:
    """Where text comes from. No path and no data set means the embedded corpus."""

    path: str = ""
    dataset: str = ""
    dataset_config: str = ""
    dataset_revision: str = ""
    text_key: str = "text"
    domain_key: str = "domain"
    partition: str = _choice("iid", "iid", "by_domain")
    sequence_length: int = _number(128, at_least=8)
    holdout_fraction: float = _number(0.02, above=0, below=0.5)
    tokenizer: str = ""


@dataclass
class LayoutSettings:
    """Who holds which experts."""

    kind: str = _choice("fixed", "fixed", "random", "rolling", "balanced", "weighted", "explicit")
    num_workers: int = _number(4, at_least=1)
    overlap: int = _number(2, at_least=1)
    draw: str = _choice("per_layer", "per_layer", "same")
    reshuffle_every: int = _number(1, at_least=1)
    warm_rounds: int = _number(0, at_least=0)
    """Rounds of full replicas before the experts are parted."""
    roll_by: int = _number(1, at_least=1)
    """Experts by which `rolling` advances at every reshuffle."""
    tolerance: float = _number(0.1, at_least=0)
    """`balanced` leaves two workers as they are if a swap would narrow the gap between their loads
    by no more than this share of a worker's mean load in a layer."""
    allow_uneven: bool = False
    residents: list[int] = field(default_factory=list)
    """Experts of each layer for each worker, e.g. [12,8,8,4]; they add up to experts * overlap."""
    capacity_gib: list[float] = field(default_factory=list)
    """Memory of each worker for its training state; the numbers of residents follow from it."""
    capacity_reported: bool = False
    """Take that memory from what nodes report: their `capacity-gib`, or what they measure."""
    capacity_share: float = _number(0.5, above=0, at_most=1)
    """Part of a measured memory that the training state may take; the rest is for activations."""
    rehome_after: int = _number(2, at_least=0)
    """Rounds in a row without a reply that counts, or without a node, after which a worker's
    experts find other homes; 0 means never."""
    path: str = ""
    """File of an `explicit` layout."""


@dataclass
class LocalSettings:
    """What a worker does between two synchronisations."""

    steps: int = _number(32, at_least=1)
    optimizer: str = _choice("adamw", "adamw", "sgd")
    lr: float = _number(4e-3, above=0)
    warmup_steps: int = _number(32, at_least=0)
    schedule: str = _choice("cosine", "constant", "cosine", "wsd")
    min_lr_ratio: float = _number(0.1, at_least=0, at_most=1)
    decay_fraction: float = _number(0.2, above=0, at_most=1)
    """Share of the run's steps, at its end, in which `wsd` decays."""
    batch_size: int = _number(8, at_least=1)
    accumulate: int = _number(1, at_least=1)
    beta1: float = _number(0.9, at_least=0, below=1)
    beta2: float = _number(0.95, at_least=0, below=1)
    eps: float = _number(1e-8, above=0)
    weight_decay: float = _number(0.0, at_least=0)
    grad_clip: float = _number(1.0, at_least=0)
    precision: str = _choice("float32", "float32", "bfloat16", "bfloat16_parameters")
    """bfloat16: autocast over fp32 master weights; bfloat16_parameters: no masters, moments in
    bfloat16 too, half the memory. Both are meant for a GPU."""
    fresh_expert_warmup_steps: int = _number(8, at_least=0)
    keep_inner_state: bool = True
    device: str = _choice("auto", "auto", "cpu", "cuda")
    threads: int = _number(0, at_least=0)
    parallel: str = _choice("auto", "auto", "none", "ddp", "fsdp")
    """Processes that train a worker together: a replica in each (ddp), or every parameter parted
    among them (fsdp). auto: ddp if the training state fills at most half of a GPU, else fsdp."""
    processes: int = _number(0, at_least=0)
    """0: one for every GPU that the node shows."""


@dataclass
class ExecutionSettings:
    """How a worker computes its steps; what it computes does not depend on it, up to rounding."""

    experts: str = _choice("auto", "auto", "autograd", "fused", "static")
    """Core of the experts: `fused` has a backward pass of its own, `static` never waits for the
    device. auto: fused, and static under a CUDA graph."""
    loss: str = _choice("auto", "auto", "whole", "chunked")
    """chunked: never all logits at once. auto: chunked on a GPU, and for large vocabularies."""
    compile: str = _choice("auto", "auto", "on", "off")
    """Compile attention, norms and router losses. auto: on a GPU."""
    cuda_graph: bool = False
    """Capture a step's passes once a round and replay them: for models too small for their GPU."""
    checkpoint_activations: bool = False
    """Keep only the inputs of layers, and run layers again in the backward pass."""
    hold_heap: bool = True
    """On a CPU with glibc: what a step frees stays in the process until the round ends. Steps are
    faster, the resident set is somewhat larger. It is for the process, and for good."""


@dataclass
class BalanceSettings:
    """What keeps routers from collapsing."""

    loss: float = _number(0.01, at_least=0)
    """Coefficient of E * sum_i f_i P_i (Switch); f_i are shares of assignments, so 1 is balance."""
    form: str = _choice("local", "local", "global")
    """f_i from the micro-batch, or pooled over all workers in the round before."""
    z_loss: float = _number(0.0, at_least=0)
    """Coefficient of the mean squared logsumexp of the router logits."""
    bias_rate: float = _number(0.0, at_least=0)
    """Step of the loss-free selection bias; only for families whose router has one."""


@dataclass
class OuterSettings:
    """What the server does with the averaged pseudo-gradient."""

    name: str = _choice("average", "average", "nesterov", "local_adamw", "des_loc")
    lr: float = _number(1.0, above=0)
    expert_lr: float = _number(0.0, at_least=0)
    """Outer rate of experts; 0 means `lr`."""
    momentum: float = _number(0.0, at_least=0, below=1)
    sqrt_holders: bool = False
    """Multiply every averaged pseudo-gradient by the square root of its replies (DiPaCo)."""
    weighting: str = _choice("tokens", "tokens", "uniform", "routed")
    robust: str = _choice("none", "none", "trimmed_mean", "median")
    """Number by number over holders, in place of the mean; replies wait on the server's disk."""
    trim: float = _number(0.25, above=0, below=0.5)
    """Share of copies that `trimmed_mean` leaves out at either end, rounded down."""
    clip_to_median: float = _number(0.0, at_least=0)
    """A reply larger than so many times the median of the replies before is scaled down to that; 0
    believes all sizes."""
    router_rows: str = _choice("all", "all", "holders")
    """In `skip_token`: average a router row over all workers (paper) or its expert's holders."""
    first_moment_every: int = _number(3, at_least=1)
    second_moment_every: int = _number(6, at_least=1)
    fragments: int = _number(1, at_least=1)


@dataclass
class WireSettings:
    """How numbers travel: pseudo-gradients up, weights down."""

    up: str = _choice("float32", *CODECS)
    down: str = _choice("float32", *FLOATS, *INTEGERS)
    up_experts: str = _choice("", "", *CODECS)
    """Codec of experts where it is another than `up`; empty means the same."""
    down_experts: str = _choice("", "", *FLOATS, *INTEGERS)
    keep: int = _number(64, at_least=1, at_most=CHUNK)
    """Numbers that `topk` codecs keep of every 4096."""
    rounding: str = _choice("nearest", "nearest", "stochastic")
    """Of `int8` and `int4`; `stochastic` is unbiased and noisier."""
    feedback: float = _number(0.95, at_least=0, at_most=1)
    """Share of what `int8`, `int4` and `topk` codecs left behind that a worker adds to its next
    pseudo-gradient (error feedback); 0 forgets it."""
    zstd: int = _number(0, at_least=0, at_most=19)
    """Level of zstd on top of the codecs; 0 is off. Predicted bytes are those before it."""

    @property
    def codecs_up(self) -> CodecPair:
        return self._pair(self.up, self.up_experts)

    @property
    def codecs_down(self) -> CodecPair:
        return self._pair(self.down, self.down_experts)

    def _pair(self, shared: str, experts: str) -> CodecPair:
        stochastic = self.rounding == "stochastic"
        return CodecPair(
            Codec(shared, self.keep, stochastic, self.zstd),
            Codec(experts or shared, self.keep, stochastic, self.zstd),
        )


@dataclass
class EvalSettings:
    """Evaluation of the assembled global model on held-out text."""

    every: int = _number(1, at_least=1)
    batch_size: int = _number(16, at_least=1)
    max_tokens: int = _number(32768, at_least=1)
    probe_tokens: int = _number(512, at_least=0)
    """Held-out tokens on which the choices of routers are compared; 0 compares nothing."""
    sample_prompt: str = "The "
    sample_tokens: int = _number(80, at_least=0)
    keep_samples: int = _number(100, at_least=1)
    """Samples of text to keep, the newest ones."""


@dataclass
class CheckpointSettings:
    """When the server writes its state, and how much of the past it keeps."""

    every: int = _number(1, at_least=1)
    keep: int = _number(2, at_least=1)


@dataclass
class PrivacySettings:
    """Client-level differential privacy of what the server learns; off by default."""

    clip_norm: float = _number(0.0, at_least=0)
    """Largest norm of a worker's whole update; 0 clips nothing."""
    noise_multiplier: float = _number(0.0, at_least=0)
    """Noise on the sum of updates, in units of `clip_norm`; 0 adds none."""
    delta: float = _number(1e-5, above=0, below=1)
    max_epsilon: float = _number(0.0, at_least=0)
    """Refuse runs whose rounds would spend more at `delta`; 0 refuses none."""
    noise_seed: int = _number(-1, at_least=-1)
    """Repeats the noise, for experiments: protects nothing. -1 takes it from the system."""


@dataclass
class FederationSettings:
    """Patience, quorum, and what the simulation engine gives each worker."""

    min_workers: int = _number(1, at_least=1)
    """Replies that a round needs."""
    start_workers: int = _number(0, at_least=0)
    """Workers that must have a node before the first round; 0 means all. The others may join."""
    cpus_per_worker: int = _number(1, at_least=1)
    gpus_per_worker: float = _number(0.0, at_least=0)
    round_timeout_seconds: float = _number(3600, above=0)
    grace_seconds: float = _number(0, at_least=0)
    """How long a round waits for the others once `min_workers` have replied; 0: to its timeout.
    With a grace period replies are folded as they come, not in worker order."""
    node_wait_seconds: float = _number(30, at_least=0)


@dataclass
class CostSettings:
    """What the cost model assumes of the sites, all alike; no run depends on it."""

    topology: str = _choice("star", "star", "ring")
    """star: through a server, as Flower does; ring: all-reduce among the sites, as in the paper."""
    tokens: float = _number(0.0, at_least=0)
    """Token budget of the projected run; 0 means what `rounds` and `local` come to."""
    site_teraflops: float = _number(100.0, above=0)
    """Peak of all accelerators of a site together, in 10^12 FLOP/s."""
    mfu: float = _number(0.4, above=0, at_most=1)
    """Share of that peak that training reaches."""
    state_gb_per_second: float = _number(0.0, at_least=0)
    """How fast the optimizer passes over the training state, 10^9 B/s; 0 means in no time."""
    up_mbps: float = _number(1000.0, above=0)
    """A site's link to the others, in 10^6 bit/s."""
    down_mbps: float = _number(1000.0, above=0)
    server_mbps: float = _number(0.0, at_least=0)
    """The server's link, each way; 0 means as fast as those of all sites together."""
    latency_seconds: float = _number(0.05, at_least=0)
    """From a site to the server, or to the next site of the ring."""
    hidden_share: float = _number(0.0, at_least=0, at_most=1)
    """Share of communication that runs beside computation (the paper's alpha)."""
    resident_share: float = _number(0.0, at_least=0, at_most=1)
    """Measured share of assignments that go to residents; 0 means at uniform routing."""
    bytes_per_parameter: float = _number(0.0, at_least=0)
    """Training state; 0 means that of `local.optimizer` (the paper counts 18)."""


@dataclass
class Settings:
    """Everything a run depends on, and what its costs are reckoned with."""

    preset: str = "demo"
    experiment: str = "fomoe"
    engine: str = _choice("in_process", "in_process", "flower")
    output_dir: str = ""
    resume: str = ""
    tracker: str = _choice("tensorboard", "tensorboard", "wandb", "trackio", "none")
    """Where metrics go besides metrics.jsonl."""
    seed: int = _number(0, at_least=0, below=2**31)
    rounds: int = _number(8, at_least=1)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    local: LocalSettings = field(default_factory=LocalSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    outer: OuterSettings = field(default_factory=OuterSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    costs: CostSettings = field(default_factory=CostSettings)

    @property
    def tokens_per_worker_step(self) -> int:
        """Tokens of one optimizer step on one worker."""
        return self.local.batch_size * self.local.accumulate * self.data.sequence_length

    @property
    def tokens_per_worker_round(self) -> int:
        """Tokens that a round gives one worker."""
        return self.local.steps * self.tokens_per_worker_step

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML."""
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(self.to_dict())), encoding="utf-8")
