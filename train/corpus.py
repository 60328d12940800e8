"""The data of a run, prepared by one process of each node while the others wait, then opened by all."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from data.corpus.mixture import Stage
from data.corpus.open import Data, Settings, Source, open_data
from data.corpus.prepare import Policy, default_cache
from data.media.features import FeatureCache
from model import ConfigError, UserError
from parallel.agree import from_all
from parallel.torch_private import default_store
from parallel.world import World
from train.resolve import Resolved, line_shape
from train.stop_request import StopRequest

log = logging.getLogger("gemwright")


def prepare_data(run: Resolved, world: World, stop: StopRequest) -> Data:
    """Collective. Raises `UserError` for data that cannot be used, or when told to stop meanwhile."""
    data = run.config.data
    sources, validation = (
        [Source(s.path, s.weight, s.format or data.format, s.epochs, s.max_tokens, line_shape(data, s)) for s in given]
        for given in (data.sources, data.validation)
    )
    sources = sources or [Source(data.source, 1, data.format)]

    def check_stop() -> None:
        if stop:
            raise UserError(f"told to stop by {stop.signal_name} before the data was prepared; nothing was trained.")

    first = world.local_rank == 0
    cache = Path(data.cache) if data.cache else None
    features = FeatureCache((cache or default_cache()) / "features") if data.cache_media else None
    settings = Settings(
        run.model,
        data.sequence_length,
        run.config.run.seed,
        run.tokenizer,
        data.tokenizer_vocab_size,
        data.thinking,
        line_shape(data),
        data.packing,
        data.on_long,
        cache,
        Policy(data.on_bad, data.strict, check_stop, first, data.prepare_workers),
        data.held_out,
        validation,
        data.temperature,
        features,
        data.max_media_tokens,
        [Stage(stage.step * run.config.train.global_batch_size, stage.weights) for stage in data.weight_schedule],
    )
    store = default_store()
    prepared = f"gemwright/prepared/{world.rank - world.local_rank}"
    if first:
        log.info("preparing %s", ", ".join(source.path for source in [*sources, *validation]))
        opened = open_data(sources, settings)
        if features is not None:
            count, size = features.size()
            log.info("features of %s media files are kept in %s (%.2f GB)", f"{count:,}", features.folder, size / 1e9)
        store.set(prepared, "yes")
    while not store.check([prepared]):  # a barrier would give up on a large corpus, and not hear a signal
        check_stop()
        time.sleep(0.1)
    if not first:
        opened = open_data(sources, settings)
    names = from_all(opened.name)
    if len(set(names)) > 1:
        other = next(rank for rank, name in enumerate(names) if name != names[0])
        raise ConfigError(
            f"rank {other} sees other data or another tokenizer than rank 0; "
            "give data.source and data.tokenizer on a file system that all nodes share."
        )
    return opened
