"""The settings of a run: one tree of dataclasses, their defaults and their bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fomoe_flwr.codecs.sizes import CHUNK, CODECS, FLOATS, INTEGERS, Codec, CodecPair
from fomoe_flwr.config.cost_settings import CostSettings
from fomoe_flwr.config.fields import choice, number
from fomoe_flwr.config.literals import literal
from fomoe_flwr.config.local_settings import ExecutionSettings, LocalSettings

SHARED_EXPERT_FAMILIES = ("deepseek_v3", "glm4_moe")
"""Families of DeepSeek-V3's block: shared experts, sigmoid scores, group-limited routing."""

SHAPED_FAMILIES = ("olmoe", "qwen3_moe", "mixtral", *SHARED_EXPERT_FAMILIES, "fomoe")
"""Families whose whole shape the fields of `model` name."""

BIASED_FAMILIES = (*SHARED_EXPERT_FAMILIES, "fomoe")
"""Those whose router has a selection bias."""


class RoutingMode(StrEnum):
    """How a worker's router treats experts that the worker does not hold (paper section 3.2)."""

    SKIP_TOKEN = "skip_token"
    """Full router on every worker, top-k over all experts; a chosen ghost adds nothing."""

    PARTITIONED = "partitioned"
    """Router rows travel with their experts, top-k over the residents only."""


FAMILYS_OWN = ("norm_eps", "rope_theta", "max_positions")
"""Fields of a model of which 0 says nothing: a family has its own."""


@dataclass
class ModelSettings:
    """Shape of the model, with the same names for every family."""

    name: str = "olmoe-demo"
    """Name of the preset that gave the shape."""
    family: str = "olmoe"
    """Architecture, by its name in transformers; `fomoe` is the paper's own block. Presets are of
    `olmoe`, `qwen3_moe`, `mixtral`, `deepseek_v3`, `glm4_moe` or `fomoe`; `config` makes others."""
    config: str = ""
    """Any family of transformers, by its name there: a new model of its default shape, with the
    fields that are given."""
    entries: dict[str, Any] = field(default_factory=dict)
    """More entries of that family's configuration, by their names in transformers."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """What the stock class says of a model of `config` or `pretrained`; nobody sets it."""
    routing: str = choice("skip_token", *(mode.value for mode in RoutingMode))
    """What a router does about ghosts: choose and skip them, or not see them."""
    num_layers: int = number(4, at_least=1)
    hidden_size: int = number(256, at_least=8)
    expert_size: int = number(256, at_least=1)
    """Hidden width of one expert."""
    num_heads: int = number(4, at_least=1)
    num_kv_heads: int = number(4, at_least=1)
    """Heads of keys and values; their number must divide `num_heads`."""
    head_size: int = number(0, at_least=0)
    """Width of an attention head; 0 means hidden_size / num_heads."""
    num_experts: int = number(16, at_least=1)
    num_shared_experts: int = number(0, at_least=0)
    """Experts that every token passes and every worker holds; presets of `deepseek_v3` and
    `glm4_moe` only."""
    top_k: int = number(2, at_least=1)
    """Experts that a router chooses for a token."""
    vocab_size: int = number(4096, at_least=260)
    tie_embeddings: bool = True
    norm_topk: bool = False
    """Renormalise the weights of the chosen experts to 1."""
    init_std: float = number(0.02, above=0)
    """Standard deviation of initial weights."""
    pretrained: str = ""
    """Folder of a transformers checkpoint to go on from (continued pre-training)."""
    upcycle: str = ""
    """Folder of a dense Llama, Mistral or Qwen3 checkpoint to make a MoE of."""
    upcycle_granularity: int = number(1, at_least=1)
    """Experts into which each copy of the dense block is cut."""
    upcycle_noise: float = number(0.0, at_least=0)
    """Noise on each copy, in standard deviations of the weight."""
    rope_theta: float = number(0.0, at_least=0)
    """Base of the rotary angles; 0 means the family's own."""
    max_positions: int = number(0, at_least=0)
    """Longest text that an export's configuration names; 0 means a window, at least 2048."""
    norm_eps: float = number(0.0, at_least=0)
    """0 means the family's own."""
    base_hidden_size: int = number(256, at_least=1)
    """Width of the proxy from which CompleteP transfers learning rate and scales; `fomoe` only."""
    base_num_layers: int = number(4, at_least=1)
    """Its depth."""

    @property
    def routing_mode(self) -> RoutingMode:
        return RoutingMode(self.routing)

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router adds a bias of each expert to its score when it chooses."""
        return bool(self.architecture.get("has_bias", self.family in BIASED_FAMILIES))


@dataclass
class DataSettings:
    """Where text comes from. No path and no data set means the embedded corpus."""

    path: str = ""
    """A file of text, JSON lines or Parquet, or a folder of them."""
    dataset: str = ""
    """Data set on the hub, streamed; or `parquet`, `json`, `text` to stream the files of `path`."""
    dataset_config: str = ""
    """Configuration of that data set."""
    dataset_revision: str = ""
    """Its revision on the hub; empty means the newest."""
    text_key: str = "text"
    """Column that holds the text."""
    domain_key: str = "domain"
    """Column that names a row's domain."""
    partition: str = choice("iid", "iid", "by_domain")
    """Which text a worker gets: a random share of all, or whole domains."""
    sequence_length: int = number(128, at_least=8)
    """Tokens of a window."""
    holdout_fraction: float = number(0.02, above=0, below=0.5)
    """Share of the documents for validation, and again as many for test; see the tutorial."""
    tokenizer: str = ""
    """Folder or hub name of a tokenizer; empty means to train one on the text."""


@dataclass
class LayoutSettings:
    """Who holds which experts."""

    kind: str = choice("fixed", "fixed", "random", "rolling", "balanced", "weighted", "explicit")
    """How residents are drawn: see the presets of `layout`."""
    num_workers: int = number(4, at_least=1)
    """Workers in all (the paper's M)."""
    overlap: int = number(2, at_least=1)
    """Workers that hold each expert (the paper's Oe)."""
    draw: str = choice("per_layer", "per_layer", "same")
    """Whether every layer has a ring of its own, or all have the same."""
    reshuffle_every: int = number(1, at_least=1)
    """Rounds between two moves of a layout that moves."""
    warm_rounds: int = number(0, at_least=0)
    """Rounds of full replicas before the experts are parted."""
    roll_by: int = number(1, at_least=1)
    """Experts by which `rolling` advances at every reshuffle."""
    tolerance: float = number(0.1, at_least=0)
    """`balanced` leaves two workers as they are if a swap would narrow the gap between their loads
    by no more than this share of a worker's mean load in a layer."""
    allow_uneven: bool = False
    """Let workers hold numbers of experts that differ by one."""
    residents: list[int] = field(default_factory=list)
    """Experts of each layer for each worker, e.g. [12,8,8,4]; they add up to experts * overlap."""
    capacity_gib: list[float] = field(default_factory=list)
    """Memory of each worker for its training state; the numbers of residents follow from it."""
    capacity_reported: bool = False
    """Take that memory from what nodes report: their `capacity-gib`, or what they measure."""
    capacity_share: float = number(0.5, above=0, at_most=1)
    """Part of a measured memory that the training state may take; the rest is for activations."""
    rehome_after: int = number(2, at_least=0)
    """Rounds in a row without a reply that counts, or without a node, after which a worker's
    experts find other homes; 0 means never."""
    path: str = ""
    """File of an `explicit` layout."""


@dataclass
class BalanceSettings:
    """What keeps routers from collapsing."""

    loss: float = number(0.01, at_least=0)
    """Coefficient of E * sum_i f_i P_i (Switch); f_i are shares of assignments, so 1 is balance."""
    form: str = choice("local", "local", "global")
    """f_i from the micro-batch, or pooled over all workers in the round before."""
    z_loss: float = number(0.0, at_least=0)
    """Coefficient of the mean squared logsumexp of the router logits."""
    bias_rate: float = number(0.0, at_least=0)
    """Step of the loss-free selection bias; only for families whose router has one."""


@dataclass
class OuterSettings:
    """What the server does with the averaged pseudo-gradient."""

    name: str = choice("average", "average", "nesterov", "local_adamw", "des_loc")
    """The outer optimizer: see the presets of `outer`."""
    lr: float = number(1.0, above=0)
    """Outer learning rate."""
    expert_lr: float = number(0.0, at_least=0)
    """Outer rate of experts; 0 means `lr`."""
    momentum: float = number(0.0, at_least=0, below=1)
    """Of `nesterov`."""
    sqrt_holders: bool = False
    """Multiply every averaged pseudo-gradient by the square root of its replies (DiPaCo)."""
    weighting: str = choice("tokens", "tokens", "uniform", "routed")
    """Weight of a reply: its tokens, all alike, or for each expert the tokens that it was given."""
    robust: str = choice("none", "none", "trimmed_mean", "median")
    """Number by number over holders, in place of the mean; replies wait on the server's disk."""
    trim: float = number(0.25, above=0, below=0.5)
    """Share of copies that `trimmed_mean` leaves out at either end, rounded down."""
    clip_to_median: float = number(0.0, at_least=0)
    """A reply larger than so many times the median of the replies before is scaled down to that; 0
    believes all sizes."""
    router_rows: str = choice("all", "all", "holders")
    """In `skip_token`: average a router row over all workers (paper) or its expert's holders."""
    first_moment_every: int = number(3, at_least=1)
    """Synchronisations between two averages of Adam's first moment; `des_loc` only."""
    second_moment_every: int = number(6, at_least=1)
    """The same for the second moment."""
    fragments: int = number(1, at_least=1)
    """Parts of the model, of which each round synchronises one, in turn."""
    delay_steps: int = number(0, at_least=0)
    """Steps that a worker takes between the moment whose pseudo-gradient it sends and the moment it
    merges the answer: the links work meanwhile. Less than `local.steps`."""
    merge_alpha: float = number(0.0, at_least=0, at_most=1)
    """Share of its own weights that a worker keeps when it merges the answer; 0 keeps nothing."""
    late_replies: str = choice("drop", "drop", "use")
    """What becomes of a reply that comes after its round has closed: `use` folds it into the round
    in which it comes."""
    staleness_decay: float = number(0.5, above=0, at_most=1)
    """What the weight of a late reply is multiplied by for every round that it is late."""


@dataclass
class WireSettings:
    """How numbers travel: pseudo-gradients up, weights down."""

    up: str = choice("float32", *CODECS)
    """Codec of pseudo-gradients."""
    down: str = choice("float32", *FLOATS, *INTEGERS)
    """Codec of weights."""
    up_experts: str = choice("", "", *CODECS)
    """Codec of experts where it is another than `up`; empty means the same."""
    down_experts: str = choice("", "", *FLOATS, *INTEGERS)
    keep: int = number(64, at_least=1, at_most=CHUNK)
    """Numbers that `topk` codecs keep of every 4096."""
    rounding: str = choice("nearest", "nearest", "stochastic")
    """Of `int8` and `int4`; `stochastic` is unbiased and noisier."""
    feedback: float = number(0.95, at_least=0, at_most=1)
    """Share of what `int8`, `int4` and `topk` codecs left behind that a worker adds to its next
    pseudo-gradient (error feedback); 0 forgets it."""
    zstd: int = number(0, at_least=0, at_most=19)
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

    every: int = number(1, at_least=1)
    """Rounds between two evaluations; the last round is always evaluated."""
    batch_size: int = number(16, at_least=1)
    """Windows scored at once."""
    device: str = choice("auto", "auto", "cpu", "cuda")
    """Where the assembled model computes. auto: on a GPU, which takes it layer by layer."""
    max_tokens: int = number(32768, at_least=1)
    """Held-out tokens to score."""
    probe_tokens: int = number(512, at_least=0)
    """Held-out tokens on which the choices of routers are compared; 0 compares nothing."""
    sample_prompt: str = "The "
    sample_tokens: int = number(80, at_least=0)
    keep_samples: int = number(100, at_least=1)
    """Samples of text to keep, the newest ones."""


@dataclass
class CheckpointSettings:
    """When the server writes its state, and how much of the past it keeps."""

    every: int = number(1, at_least=1)
    """Rounds between two checkpoints; the last round always writes one."""
    keep: int = number(2, at_least=1)
    """Checkpoints to keep, the newest ones."""
    server_state: str = choice("auto", "auto", "memory", "files")
    """Where the server keeps weights and outer state. files: in mapped files, so that it never
    holds the model in memory. auto: in memory where that has room for it."""


@dataclass
class PrivacySettings:
    """Client-level differential privacy of what the server learns; off by default."""

    clip_norm: float = number(0.0, at_least=0)
    """Largest norm of a worker's whole update; 0 clips nothing."""
    noise_multiplier: float = number(0.0, at_least=0)
    """Noise on the sum of updates, in units of `clip_norm`; 0 adds none."""
    delta: float = number(1e-5, above=0, below=1)
    """Chance that the promise of epsilon does not hold."""
    max_epsilon: float = number(0.0, at_least=0)
    """Refuse runs whose rounds would spend more at `delta`; 0 refuses none."""
    noise_seed: int = number(-1, at_least=-1)
    """Repeats the noise, for experiments: protects nothing. -1 takes it from the system."""


@dataclass
class FederationSettings:
    """Patience, quorum, and what the simulation engine gives each worker."""

    min_workers: int = number(1, at_least=1)
    """Replies that a round needs."""
    start_workers: int = number(0, at_least=0)
    """Workers that must have a node before the first round; 0 means all. The others may join."""
    cpus_per_worker: int = number(1, at_least=1)
    """CPUs that the simulation engine gives a worker."""
    gpus_per_worker: float = number(0.0, at_least=0)
    """GPUs that it gives a worker; a part of one is allowed."""
    round_timeout_seconds: float = number(3600, above=0)
    """How long a round waits for replies."""
    grace_seconds: float = number(0, at_least=0)
    """How long a round waits for the others once `min_workers` have replied; 0: to its timeout.
    With a grace period replies are folded as they come, not in worker order."""
    offline_seconds: float = number(300, at_least=0)
    """How long a round waits for a node that is out of touch; what it sends until then counts."""
    node_wait_seconds: float = number(30, at_least=0)
    """How long the server waits for nodes before the first round."""
    late_script: list[list[int]] = field(default_factory=list)
    """`[[round, worker, rounds], ...]`: replies that come so many rounds late. Only in one process,
    to see what late replies do."""


@dataclass
class Settings:
    """Everything a run depends on, and what its costs are reckoned with."""

    preset: str = "demo"
    """Size of the run."""
    experiment: str = "fomoe"
    """Method: FoMoE or a baseline."""
    engine: str = choice("in_process", "in_process", "flower")
    """This process, or Flower's simulation through `flwr run`."""
    output_dir: str = ""
    """The run directory; empty makes one in `outputs/`."""
    resume: str = ""
    """Run directory to go on with."""
    tracker: str = choice("tensorboard", "tensorboard", "wandb", "trackio", "none")
    """Where metrics go besides metrics.jsonl."""
    seed: int = number(0, at_least=0, below=2**31)
    """Seed of initial weights, layouts and data order."""
    rounds: int = number(8, at_least=1)
    """Rounds in all."""
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

    def has_checkpoint(self, server_round: int) -> bool:
        """Tell whether a checkpoint is written at the end of a round."""
        return server_round % self.checkpoint.every == 0 or server_round == self.rounds

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dictionaries, ready for YAML or JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML."""
        path.write_text(
            OmegaConf.to_yaml(OmegaConf.create(literal(self.to_dict()))), encoding="utf-8"
        )
