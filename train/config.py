"""Every config key, typed, with its default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args, get_type_hints

from model import ConfigError, Gemma4Config
from model.hf_format import WeightsError
from model.hub import resolve
from model.media_config import AudioEmbedderConfig, VisionEmbedderConfig
from parallel.layout import AXES, Layout, resolve_layout

EXPORT_DTYPES = ("auto", "bfloat16", "float32")


@dataclass
class RunConfig:
    dir: str = "runs/default"
    seed: int = 0
    """Decides initial values, the order of data, and samples."""
    deterministic: bool = False
    """Two runs are bit-identical, at the price of slower kernels on a GPU."""
    device: str = "auto"
    """auto | cpu | cuda"""
    dtype: str = "auto"
    """Compute: bfloat16 | float32; auto is bfloat16 on a GPU and float32 on a CPU. Master weights are float32.

    float64 computes and keeps everything in it, slowly: in it meshes agree to 1e-10 or differ by a mistake.
    """
    resume: str = "auto"
    """auto (the newest whole checkpoint in dir, if any) | never | a checkpoint folder"""


@dataclass
class ParallelConfig:
    pp: int = 1
    """Pipeline stages, one or more on each rank."""
    pp_schedule: str = "1f1b"
    """1f1b | interleaved | zero_bubble"""
    pp_virtual: int = 2
    """Stages on each rank, for interleaved and zero_bubble."""
    dp_replicate: int = 1
    dp_shard: int = -1
    """Ranks that see different sequences and shard parameters among them; -1 takes all that are left."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share heads, feed-forward columns and vocabulary."""
    sequence_parallel: bool = True
    """With tp, the stream between blocks is split among its ranks by tokens."""
    ep: int = 1
    """Ranks, of dp_shard x cp x tp, that share the experts."""
    reshard_after_forward: bool = True
    gradient_sync: str = "last"
    """last: reduce once a step, whole gradients kept meanwhile | every: reduce each micro-batch, in less memory"""
    cpu_offload: bool = False


@dataclass
class TrainConfig:
    steps: int = 100
    global_batch_size: int = 16
    """Sequences in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 8
    """Sequences a rank runs at once; lowered by itself when a rank's share of the global batch is smaller."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm over all parameters; inf for no clipping."""
    objective: str = "cross_entropy"
    """cross_entropy (of the next token)"""
    z_loss: float = 0.0
    """Coefficient of the squared log-sum-exp of each token's scores."""
    moe_balance_loss: float = 0.0
    """Coefficient of the loss that evens out the experts' load."""
    moe_router_z_loss: float = 0.0
    log_every: int = 1
    sample_every: int = 50
    """Steps between generated samples; 0 for none."""
    sample_prompts: list[str] = field(default_factory=lambda: ["def ", "import ", "The "])
    """Texts that generated samples go on from."""
    sample_tokens: int = 48
    """Most tokens of a sample."""


@dataclass
class SourceConfig:
    path: str = ""
    weight: float = 1.0
    format: str | None = None
    """none is data.format."""


@dataclass
class DataConfig:
    source: str = "python_stdlib"
    """python_stdlib | a file, folder or glob of text or .jsonl files"""
    sources: list[SourceConfig] = field(default_factory=list)
    """Instead of data.source, several: {path: ..., weight: ..., format: ...}, mixed by weight, sequence by sequence."""
    format: str = "text"
    """text | chat (.jsonl lines {"messages": [...]} of conversations, with their media)"""
    thinking: bool = False
    """chat: render conversations with thinking switched on."""
    tokenizer: str | None = None
    """tokenizer.json or its folder; none takes that of model.weights, or trains one of tokenizer_vocab_size pieces."""
    tokenizer_vocab_size: int = 8192
    sequence_length: int = 256
    workers: int = 0
    cache: str | None = None
    """Where prepared corpora are kept; none is ~/.cache/gemwright."""


@dataclass
class OptimizerConfig:
    lr: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class ScheduleConfig:
    name: str = "cosine"
    """constant | linear | cosine | wsd (warm-up, stable, linear decay)"""
    warmup_steps: int | None = None
    """Linear warm-up; none is 5 % of the run, at most 2,000 steps."""
    decay_steps: int | None = None
    """Length of wsd's decay; none is 15 % of the run."""
    final_lr_ratio: float = 0.1


@dataclass
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; 0 saves only at the end or when told to stop."""
    keep: int = 2
    asynchronous: bool = False


@dataclass
class ActivationCheckpointConfig:
    mode: str = "none"
    """none | full (recompute whole layers) | selective (keep attention and every second product, recompute the rest)"""
    every: int = 1
    """Recompute in every n-th layer; the others keep all."""


@dataclass
class Float8Config:
    recipe: str = "none"
    """none | tensorwise | rowwise: products of the decoder's dense layers and experts, by torchao"""


@dataclass
class WandbConfig:
    mode: str = "disabled"
    """disabled | offline | online"""
    project: str = "gemwright"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrackersConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class ExportConfig:
    every: int = 0
    """Steps between exports of the newest checkpoint as a folder for transformers and vLLM; 0 for none."""
    at_end: bool = False
    dtype: str = "auto"
    """auto (each tensor as in model.weights, else bfloat16) | bfloat16 | float32"""


ENCODERS = ("vision", "audio")


# Every field of Gemma4Config as an override: none keeps the named variant's value.
ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [
        ("name", str, field(default="gemma4_tiny_e4b")),
        # A checkpoint folder, hub id or registered name to start from; its config.json then gives the sizes.
        ("weights", str | None, field(default=None)),
        # none | freeze | projector (tower frozen, its projector trained) | train; unset: freeze with weights, else none
        ("vision", str | None, field(default=None)),
        ("audio", str | None, field(default=None)),
        *[
            (name, hint if type(None) in get_args(hint) else hint | None, field(default=None))
            for name, hint in get_type_hints(Gemma4Config).items()
            if name not in ENCODERS
        ],
    ],
)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)  # type: ignore[valid-type]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    float8: Float8Config = field(default_factory=Float8Config)
    export: ExportConfig = field(default_factory=ExportConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

    @cached_property
    def weights(self) -> Path | None:
        """The folder of the checkpoint to start from; looked up once, as it may be on the hub."""
        source = self.model.weights  # type: ignore[attr-defined]
        if source is None:
            return None
        try:
            return resolve(source)
        except WeightsError:
            if (self.origin / "config.json").is_file():  # the run goes on though its source is gone
                return self.origin
            raise

    @property
    def origin(self) -> Path:
        """Where a run keeps the small files of the checkpoint it began with."""
        return Path(self.run.dir) / "origin"

    @property
    def tokenizer(self) -> Path | None:
        """The `tokenizer.json` asked for, or that of the weights; None to train one."""
        if self.data.tokenizer is not None:
            return Path(self.data.tokenizer)
        if self.weights is None:
            return None
        path = self.weights / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{self.weights} holds no tokenizer.json; set data.tokenizer.")
        return path

    def gemma4(self) -> Gemma4Config:
        """The model's sizes: those of the weights or the named variant, with the overrides that are set."""
        own = ("name", "weights", *ENCODERS)
        fields = {k: v for k, v in vars(self.model).items() if k not in own and v is not None}
        if self.weights is not None:
            config = Gemma4Config.from_hf(self.weights).replace(**fields)
        else:
            config = Gemma4Config.from_name(self.model.name, **fields)  # type: ignore[attr-defined]
        return config.replace(**{name: None for name in ENCODERS if self._encoder(name) == "none"})

    def layout(self, world_size: int) -> Layout:
        """The mesh asked for, checked against the model. Raises `ConfigError` naming the nearest legal one."""
        sizes = {axis: getattr(self.parallel, axis) for axis in (*AXES, "ep", "sequence_parallel")}
        return resolve_layout(world_size, Layout(**sizes), self.gemma4(), self.data.sequence_length)

    def frozen(self) -> tuple[str, ...]:
        """Modules of the model that are not trained."""
        config, names = self.gemma4(), []
        for encoder, tower in (("vision", "vision_tower"), ("audio", "audio_tower")):
            sizes, mode = getattr(config, encoder), self._encoder(encoder)
            if sizes is None or mode == "train":
                continue
            if not isinstance(sizes, AudioEmbedderConfig):  # which is nothing but its projector
                names.append("vision_embedder" if isinstance(sizes, VisionEmbedderConfig) else tower)
            if mode == "freeze":
                names.append(f"embed_{encoder}")
        return tuple(names)

    def _encoder(self, name: str) -> str:
        return getattr(self.model, name) or ("none" if self.model.weights is None else "freeze")  # type: ignore[attr-defined]
