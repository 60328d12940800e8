"""Every config key, typed, with its default, its bounds and its meaning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

from data.chat.documents import ON_LONG
from data.chat.shapes import AUTO, SHAPES
from data.corpus.open import FORMATS
from data.corpus.packing import PACKINGS
from data.corpus.reading import ON_BAD
from model import Gemma4Config
from model.encoders.config import ENCODERS
from parallel.options import PlanConfig, at_least, one_of
from parallel.world import DEVICES, DTYPES
from train.objective import OBJECTIVES

INITS = ("reference", "stable")
EXPORT_DTYPES = ("auto", "bfloat16", "float32")


@dataclass
class RunConfig:
    """Where a run writes, on what device and in which dtype it computes, and where it goes on."""

    dir: str = "runs/default"
    seed: int = at_least(0, 0)
    """Decides initial values, the order of data, and samples."""
    deterministic: bool = False
    """Two runs are bit-identical, at the price of slower kernels on a GPU."""
    device: str = one_of("auto", *DEVICES)
    """auto | cpu | cuda"""
    dtype: str = one_of("auto", *DTYPES)
    """Compute: bfloat16 | float32; auto is bfloat16 on a GPU and float32 on a CPU. Master weights are float32.

    float64 computes and keeps everything in it, slowly: in it meshes agree to 1e-10 or differ by a mistake.
    """
    silence_seconds: float = at_least(60.0, 1)
    """Time after which a rank that shows no sign of life is named, while the others wait for it."""
    resume: str = "auto"
    """auto (the newest whole checkpoint in dir, if any) | never | a checkpoint folder"""


@dataclass
class TrainConfig:
    """How many steps of which batch size minimise what, and what is reported meanwhile."""

    steps: int | None = at_least(None, 1)
    """Optimizer steps of the whole run; unset: as many as train.epochs makes, else 100."""
    epochs: float | None = None
    """Times that the data is used, as in 3 or 0.5; with train.steps too, whichever comes first ends the run."""
    global_batch_size: int = at_least(16, 1)
    """Sequences in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = at_least(8, 1)
    """Sequences a rank runs at once; lowered by itself when a rank's share of the global batch is smaller."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm over all parameters; inf for no clipping."""
    objective: str = one_of("cross_entropy", *OBJECTIVES)
    """cross_entropy (of the next token)"""
    z_loss: float = at_least(0.0, 0)
    """Coefficient of the squared log-sum-exp of each token's scores."""
    log_every: int = at_least(1, 1)
    """Steps between lines of the log, which are the points of the metrics."""
    profile: bool = False
    """Record the third step after the start: traces and a table in the run's folder profile/."""
    validate_every: int = at_least(50, 0)
    """Steps between measurements of the loss on what data.held_out and data.validation keep from training; 0: none."""
    validate_sequences: int = at_least(64, 1)
    """Most sequences of each source on which it is measured."""
    sample_every: int = at_least(50, 0)
    """Steps between generated samples; 0 for none."""
    sample_prompts: list[str] | None = None
    """Texts that samples go on from, in a chat what a user says; unset: beginnings of the data's documents."""
    sample_tokens: int = at_least(48, 1)
    """Most tokens of a sample."""


@dataclass
class SourceConfig:
    """One source of a mixture (data.sources)."""

    path: str = ""
    weight: float = 1.0
    format: str | None = one_of(None, *FORMATS)
    """unset: data.format"""
    epochs: float | None = None
    """Most times that it is used; after that the others share its part."""
    max_tokens: int | None = at_least(None, 1)
    """Most tokens that are taken of it, padding included; after that the others share its part."""
    shape: str | None = one_of(None, AUTO, *SHAPES)
    """unset: data.shape"""
    columns: dict[str, str] | None = None
    """unset: data.columns"""


@dataclass
class WeightsConfig:
    """Weights of all sources from a step on (data.weight_schedule)."""

    step: int = at_least(1, 1)
    weights: list[float] = field(default_factory=list)


@dataclass
class DataConfig:
    """Which texts or conversations are read, and how they become sequences."""

    source: str = "python_stdlib"
    """python_stdlib | a file, folder or glob of texts or records (.jsonl, .parquet, ...) | hf:OWNER/NAME of the hub"""
    sources: list[SourceConfig] = field(default_factory=list)
    """Instead of data.source, several: {path: ..., weight: ..., format: ...}, mixed by weight, sequence by sequence."""
    held_out: float = at_least(0.0, 0)
    """Share of each source's documents, chosen by their contents, that is never trained on and measures the loss."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Sources that measure the loss, as data.sources; a document that training sources have too is not trained on."""
    temperature: float | None = None
    """Weights are multiplied by the sources' sizes in tokens to the power 1 / temperature: 1 by size, 5 more even."""
    weight_schedule: list[WeightsConfig] = field(default_factory=list)
    """Other weights of data.sources from a step on: [{step: 9000, weights: [1, 4]}]"""
    format: str = one_of("text", *FORMATS)
    """text | chat (records {"messages": [...]} of conversations, with their media)"""
    shape: str = one_of(AUTO, AUTO, *SHAPES)
    """chat: auto (each line by its keys) | messages | sharegpt | alpaca | query | completion | gemini | text"""
    columns: dict[str, str] = field(default_factory=dict)
    """chat: names that a shape gives its keys, with those that the lines have, as {output: best_answer}."""
    thinking: bool = False
    """chat: render conversations with thinking switched on."""
    tokenizer: str | None = None
    """tokenizer.json or its folder; unset takes that of model.weights, or trains one of tokenizer_vocab_size pieces."""
    tokenizer_vocab_size: int = 8192
    sequence_length: int = at_least(256, 2)
    packing: str = one_of("split", *PACKINGS)
    """text: split (end to end, cut at each sequence's end) | best_fit (cut only if longer than a sequence, padded)"""
    on_long: str = one_of("cut", *ON_LONG)
    """chat: cut (to the whole turns that fit a sequence, and its media) | drop | refuse"""
    max_media_tokens: int | None = at_least(None, 1)
    """chat: most soft tokens of pictures, video and sound in a sequence; unset: as many as it holds."""
    cache_media: bool = False
    """Keep what encoders take of media in data.cache, so that a file is decoded once: 2 MB a picture, 51 KB a second of
    sound."""
    workers: int = at_least(0, 0)
    prepare_workers: int = at_least(0, 0)
    """Processes of a node that prepare a corpus that is not in the cache yet; 0 is one for each of its processors."""
    on_bad: str = one_of("refuse", *ON_BAD)
    """refuse | skip: what becomes of lines and media that cannot be read; skipped ones are counted and named."""
    strict: bool = False
    """Whether keys, files and parts of media that nothing reads are an error; else they are named and counted."""
    cache: str | None = None
    """Where prepared corpora are kept; unset is ~/.cache/gemwright."""


@dataclass
class OptimizerConfig:
    """The optimizer, its step size, weight decay and moment decay rates."""

    name: str = one_of("adamw", "adamw", "muon")
    """adamw | muon (for matrices of layers; the rest keeps AdamW)"""
    state_dtype: str = one_of("float32", "float32", "bfloat16", "float8")
    """float32 (float64 in a float64 model) | bfloat16 | float8 (moments of matrices in 16 or in 8 bits and scales)"""
    lr: float = at_least(5e-3, 0)
    momentum: float = 0.95
    """Decay rate of muon's momentum."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = at_least(0.1, 0)


@dataclass
class ScheduleConfig:
    """The learning rate over the steps of a run."""

    name: str = one_of("cosine", "constant", "linear", "cosine", "wsd")
    """constant | linear | cosine | wsd (warm-up, stable, linear decay)"""
    warmup_steps: int | None = at_least(None, 0)
    """Linear warm-up; unset is 5 % of the run, at most 2,000 steps."""
    decay_steps: int | None = at_least(None, 0)
    """Length of wsd's decay; unset is 15 % of the run."""
    final_lr_ratio: float = 0.1


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    every: int = at_least(50, 0)
    """Steps between checkpoints; 0 saves only at the end or when told to stop."""
    every_minutes: float = at_least(0.0, 0)
    """Longest time between checkpoints, besides checkpoint.every, for runs of slow steps; 0 for no such limit."""
    keep: int = at_least(2, 1)
    asynchronous: bool = False


@dataclass
class WandbConfig:
    """Weights & Biases; the names are those of wandb.init."""

    mode: str = one_of("disabled", "disabled", "offline", "online")
    """disabled | offline | online"""
    project: str = "gemwright"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrackersConfig:
    """Where metrics go besides the run's folder."""

    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class ExportConfig:
    """When and in which dtype a run writes folders for transformers and vLLM."""

    every: int = at_least(0, 0)
    """Steps between exports of the newest checkpoint as a folder for transformers and vLLM; 0 for none."""
    at_end: bool = False
    dtype: str = one_of("auto", *EXPORT_DTYPES)
    """auto (each tensor as in model.weights, else bfloat16) | bfloat16 | float32"""


# Every field of Gemma4Config as an override: unset keeps the named variant's value.
ModelOverrides = dataclasses.make_dataclass(
    "ModelOverrides",
    [
        (name, hint if type(None) in get_args(hint) else hint | None, field(default=None))
        for name, hint in get_type_hints(Gemma4Config).items()
        if name not in ENCODERS
    ],
)


@dataclass
class ModelConfig(ModelOverrides):  # type: ignore[misc, valid-type]
    """A named variant with some sizes changed, the weights it starts from, and its encoders."""

    name: str = "gemma4_tiny_e4b"
    init: str = one_of("stable", *INITS)
    """stable (norms of queries and after blocks start below 1) | reference: how drawn weights start"""
    weights: str | None = None
    """A checkpoint folder, hub id or registered name to start from; its config.json then gives the sizes."""
    strict: bool = False
    """Refuse a folder of weights with files of weights, or fields of config.json, that nothing reads."""
    vision: str | None = one_of(None, "none", "freeze", "projector", "train")
    """none | freeze | projector (tower frozen, projector trained) | train; unset: freeze with weights, else none"""
    audio: str | None = one_of(None, "none", "freeze", "projector", "train")
    """The same for sound."""
    per_layer_table: str = one_of("train", "train", "freeze")
    """train | freeze: the embeddings of each layer of e2b and e4b, half and a third of their parameters"""


@dataclass
class Config(PlanConfig):
    """All options of a training run, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

    @property
    def origin(self) -> Path:
        """Where a run keeps the small files of the checkpoint it began with."""
        return Path(self.run.dir) / "origin"
