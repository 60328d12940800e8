"""What a config means: its weights, files, model and mesh, looked up and checked once, before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from data.chat.shapes import AUTO, LineShape
from data.corpus.mixture import whole_parts
from model import ConfigError, Gemma4Config
from model.encoders.config import ENCODERS
from model.hf.hub import resolve as resolve_weights
from model.hf.weights import WeightsError
from parallel.layout import AXES, Layout, micro_batch_size, resolve_layout
from parallel.pipeline.layout import check_pipeline
from train.config import Config, DataConfig, ModelConfig, SourceConfig
from train.schedule import DEFAULT_STEPS, check_schedule


@dataclass(frozen=True)
class Resolved:
    """A config and the facts of a run that follow from it; who has them asks neither the config nor the hub again."""

    config: Config
    model: Gemma4Config
    """Sizes of the weights or the named variant, with the overrides that are set."""
    weights: Path | None
    """The folder of the checkpoint to start from."""
    tokenizer: Path | None
    """The `tokenizer.json` asked for, or that of the weights; None to train one."""
    frozen: tuple[str, ...]
    """Modules of the model that are not trained."""
    layout: Layout
    micro_batch_size: int


def resolve(config: Config, world_size: int) -> Resolved:
    """Look up what a config names, and check all that depends on more than one key.

    Raises `ConfigError` or `WeightsError` with the nearest legal choice.
    """
    weights = _weights(config)
    model = _model(config, weights)
    tokenizer = _tokenizer(config, weights)
    _check_encoders(config, model)
    _check_training(config)
    _check_data(config, model, tokenizer)
    sizes = {axis: getattr(config.parallel, axis) for axis in (*AXES, "ep", "sequence_parallel")}
    layout = resolve_layout(world_size, Layout(**sizes), model, config.data.sequence_length)
    micro = micro_batch_size(config.train.global_batch_size, config.train.micro_batch_size, layout.dp, layout.pp)
    if layout.pp > 1:
        _check_pipeline(config, model, layout, micro)
    return Resolved(config, model, weights, tokenizer, _frozen(config, model), layout, micro)


def _weights(config: Config) -> Path | None:
    source = config.model.weights
    if source is None:
        return None
    try:
        return resolve_weights(source)
    except WeightsError:
        if (config.origin / "config.json").is_file():  # the run goes on though its source is gone
            return config.origin
        raise


def _model(config: Config, weights: Path | None) -> Gemma4Config:
    own = {field.name for field in fields(Gemma4Config)} - set(ENCODERS)
    overrides = {key: value for key, value in vars(config.model).items() if key in own and value is not None}
    if weights is None:
        model = Gemma4Config.from_name(config.model.name, **overrides)
    else:
        released = Gemma4Config.from_hf(weights)
        _check_variant(config.model, released)
        model = released.replace(**overrides)
    absent = {name: None for name in ENCODERS if _training_of(config.model, name) == "none"}
    return model.replace(**absent)


def _tokenizer(config: Config, weights: Path | None) -> Path | None:
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    if weights is None:
        return None
    path = weights / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{weights} holds no tokenizer.json; set data.tokenizer.")
    return path


def _training_of(model: ModelConfig, encoder: str) -> str:
    """none | freeze | projector | train."""
    return getattr(model, encoder) or ("none" if model.weights is None else "freeze")


def _frozen(config: Config, model: Gemma4Config) -> tuple[str, ...]:
    names = ["language_model.embed_tokens_per_layer"] if config.model.per_layer_table == "freeze" else []
    for encoder in ENCODERS:
        sizes, mode = getattr(model, encoder), _training_of(config.model, encoder)
        if sizes is None or mode == "train":
            continue
        if sizes.module is not None:
            names.append(sizes.module)
        if mode == "freeze":
            names.append(f"embed_{encoder}")
    return tuple(names)


def _check_variant(asked: ModelConfig, released: Gemma4Config) -> None:
    """A recipe of one variant must not run on the weights of another unnoticed."""
    if asked.name == ModelConfig().name:  # none was named
        return
    named = Gemma4Config.from_name(asked.name)
    for size in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if getattr(named, size) != getattr(released, size):
            raise ConfigError(
                f"model.weights={asked.weights} has {size}={getattr(released, size)}, but model.name={asked.name} has "
                f"{getattr(named, size)}; take the variant of the weights, or none."
            )


def _check_encoders(config: Config, model: Gemma4Config) -> None:
    for encoder in ENCODERS:
        wanted = getattr(config.model, encoder)
        if wanted not in (None, "none") and getattr(model, encoder) is None:
            raise ConfigError(f"model.{encoder}={wanted}, but this model has no {encoder} encoder; legal: none.")
        if wanted in ("freeze", "projector") and config.model.weights is None:
            raise ConfigError(
                f"model.{encoder}={wanted} would keep a tower of random weights; give model.weights, or set train."
            )
    if config.model.per_layer_table == "freeze" and not model.hidden_size_per_layer_input:
        raise ConfigError("model.per_layer_table=freeze, but this model has no such table; legal: train.")


def _check_training(config: Config) -> None:
    train, optimizer, schedule = config.train, config.optimizer, config.schedule
    if config.run.dtype == "float64" and config.float8.recipe != "none":
        raise ConfigError(
            f"float8.recipe={config.float8.recipe} rounds what run.dtype=float64 would prove; set float8.recipe=none."
        )
    if train.epochs is not None and not train.epochs > 0:
        raise ConfigError(f"train.epochs={train.epochs} trains on nothing; give a number above 0, as 3 or 0.5.")
    if train.epochs is None:  # else the data says how many steps there are
        check_schedule(schedule, train.steps or DEFAULT_STEPS)
    if not 0.0 <= schedule.final_lr_ratio <= 1.0:
        raise ConfigError(f"schedule.final_lr_ratio={schedule.final_lr_ratio} lies outside 0 to 1.")
    for name in ("beta1", "beta2", "momentum"):
        if not 0.0 <= getattr(optimizer, name) < 1.0:
            raise ConfigError(f"optimizer.{name}={getattr(optimizer, name)} lies outside 0 to 1 (1 excluded).")
    if optimizer.eps <= 0:
        raise ConfigError(f"optimizer.eps={optimizer.eps} must be above 0; usual: 1e-8.")
    if train.max_grad_norm <= 0:
        raise ConfigError(
            f"train.max_grad_norm={train.max_grad_norm} zeroes every gradient; for no clipping set it to inf."
        )
    if train.sample_every and train.sample_prompts == []:
        raise ConfigError("train.sample_prompts is empty; give one, or set train.sample_every=0.")


def _check_data(config: Config, model: Gemma4Config, tokenizer: Path | None) -> None:
    data = config.data
    if data.sources and data.source != DataConfig().source:
        raise ConfigError("data.source and data.sources exclude each other; leave one out.")
    for index, source in enumerate(data.sources):
        if not source.path:
            raise ConfigError(
                f"data.sources[{index}] has no path; name a file, folder or glob, as in {{path: texts, weight: 2}}."
            )
    _check_mixture(data)
    for index, source in enumerate(data.validation):
        if not source.path:
            raise ConfigError(f"data.validation[{index}] has no path; name a file, folder or glob.")
        for name in ("weight", "epochs", "max_tokens"):
            if getattr(source, name) != getattr(SourceConfig(), name):
                raise ConfigError(
                    f"data.validation[{index}].{name} has no meaning where nothing is trained on; drop it."
                )
    if data.held_out >= 1:
        raise ConfigError(f"data.held_out={data.held_out} is a share of the documents; give one below 1, as 0.01.")
    if data.sources:
        whole_parts([source.weight for source in data.sources])
    _check_shapes(data)
    _check_formats(data, model)
    if data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={data.sequence_length} exceeds the model's max_position_embeddings; "
            f"largest legal: {model.max_position_embeddings}."
        )
    if tokenizer is None and data.tokenizer_vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} exceeds model.vocab_size; "
            f"largest legal: {model.vocab_size}."
        )


def _check_mixture(data: DataConfig) -> None:
    steps = [0, *(stage.step for stage in data.weight_schedule)]
    if steps != sorted(set(steps)):
        said = ", ".join(map(str, steps[1:]))
        raise ConfigError(f"data.weight_schedule has steps {said}; each must be above the one before.")
    for index, stage in enumerate(data.weight_schedule):
        if len(stage.weights) != len(data.sources):
            raise ConfigError(
                f"data.weight_schedule[{index}] has {len(stage.weights)} weights for the {len(data.sources)} of "
                "data.sources; give one for each."
            )
    stages = [[source.weight for source in data.sources], *(stage.weights for stage in data.weight_schedule)]
    for weights in stages if data.sources else []:
        whole_parts(weights)
    for index, source in enumerate(data.sources):
        if not any(weights[index] for weights in stages):
            raise ConfigError(f"data.sources[{index}] has a weight of {source.weight}; give a number above 0.")
        if source.epochs is not None and source.epochs <= 0:
            raise ConfigError(f"data.sources[{index}].epochs={source.epochs} uses nothing; give a number above 0.")
    if not all(map(any, stages)) and data.sources:
        raise ConfigError("data.weight_schedule has weights of 0 alone; give one source a number above 0.")
    if data.temperature is not None and not data.sources:
        raise ConfigError("data.temperature weighs several sources; give data.sources, or leave it out.")
    if data.temperature is not None and data.temperature <= 0:
        raise ConfigError(f"data.temperature={data.temperature} must be above 0; usual: 1 to 5.")


def line_shape(data: DataConfig, source: SourceConfig | None = None) -> LineShape:
    """How lines of conversations are written: what a source leaves unset, all data have. Raises `ConfigError`."""
    if source is None:
        return LineShape(data.shape, data.columns)
    columns = data.columns if source.columns is None else source.columns
    return LineShape(source.shape or data.shape, columns)


def _check_shapes(data: DataConfig) -> None:
    line_shape(data)
    sources = {f"data.sources[{index}]": source for index, source in enumerate(data.sources)}
    sources |= {f"data.validation[{index}]": source for index, source in enumerate(data.validation)}
    formats = [source.format or data.format for source in sources.values()]
    if "chat" not in (formats if data.sources else [*formats, data.format]) and (data.shape != AUTO or data.columns):
        raise ConfigError("data.shape and data.columns are for conversations; set data.format=chat, or leave them out.")
    for (name, source), form in zip(sources.items(), formats, strict=True):
        line_shape(data, source)
        if form != "chat" and (source.shape or source.columns):
            raise ConfigError(
                f"{name} has a shape or columns, which are for conversations; set its format: chat, or leave them out."
            )


def _check_formats(data: DataConfig, model: Gemma4Config) -> None:
    """Raises `ConfigError` for a key that no source has a use for."""
    given = [*data.sources, *data.validation] if data.sources else [SourceConfig(), *data.validation]
    formats = {source.format or data.format for source in given}
    default = DataConfig()
    if data.packing != default.packing and "text" not in formats:
        raise ConfigError(
            f"data.packing={data.packing} is for texts, and conversations are packed whole; leave it out, or add a "
            "source of format text."
        )
    if data.on_long != default.on_long and "chat" not in formats:
        raise ConfigError(
            f"data.on_long={data.on_long} is for conversations, and data.packing cuts texts; leave it out, or set "
            "data.format=chat."
        )
    most, cached = data.max_media_tokens, data.cache_media
    if (most or cached) and ("chat" not in formats or (model.vision is None and model.audio is None)):
        said = "data.cache_media=true" if cached else f"data.max_media_tokens={most}"
        raise ConfigError(
            f"{said} is for conversations with media; leave it out, or set data.format=chat and model.vision or "
            "model.audio."
        )
    if most is not None and most >= data.sequence_length:
        raise ConfigError(
            f"data.max_media_tokens={most} limits nothing, as a sequence has data.sequence_length="
            f"{data.sequence_length} tokens; largest that does: {data.sequence_length - 1}."
        )


def _check_pipeline(config: Config, model: Gemma4Config, layout: Layout, micro: int) -> None:
    if config.train.sample_every:
        raise ConfigError(
            f"train.sample_every={config.train.sample_every} needs every layer on each rank, unlike "
            f"parallel.pp={layout.pp}; nearest legal: train.sample_every=0."
        )
    check_pipeline(
        config.parallel.pp_schedule,
        config.parallel.pp_virtual,
        layout.pp,
        model.num_hidden_layers,
        config.train.global_batch_size // (layout.dp * micro),
        config.float8.recipe,
    )
