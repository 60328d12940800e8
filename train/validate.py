"""The loss on what is never trained on, the same number on every mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from data.batch import IGNORE, Batch, Row, collate
from data.corpus.dataset import PackedDataset
from model import Gemma4Config
from parallel.agree import summed_counts
from train.engine import Engine


class Validation:
    """Measures the loss on the first sequences of each dataset, dealt to the ranks; every rank must call it."""

    def __init__(
        self, datasets: Mapping[str, PackedDataset], most: int, engine: Engine, micro_batch_size: int, data_rank: int
    ) -> None:
        self.datasets, self.most, self.engine = datasets, most, engine
        self.micro_batch_size, self.data_rank = micro_batch_size, data_rank

    def measure(self, should_continue: Callable[[], bool]) -> dict[str, float] | None:
        """The mean loss of all supervised tokens, and that of each source if there are several.

        None if `should_continue`, asked between micro-batches, says no on this rank or another.
        """
        found: dict[str, float] = {}
        whole = torch.zeros(2, dtype=torch.float64)
        for name, dataset in self.datasets.items():
            sums = torch.zeros(2, dtype=torch.float64)
            for batches in self._batches(dataset):
                media = [batch.inputs.media for batch in batches]
                present = [part is not None for m in media for part in ((m.vision, m.audio) if m else (None, None))]
                stops, *have = summed_counts(not should_continue(), *present)
                if stops:
                    return None
                has_media = [(vision > 0, audio > 0) for vision, audio in zip(have[::2], have[1::2], strict=True)]
                got = self.engine.forward(batches, has_media)
                sums += torch.stack([got["loss"], got["count"]]).cpu()
            total = sums.to(self.engine.device)
            dist.all_reduce(total)
            sums = total.cpu()
            whole += sums
            found[f"validation_loss/{name}"] = _mean(sums)
        for part in self.engine.parallel.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # a forward without a backward leaves the root gathered
        return {"validation_loss": _mean(whole), **(found if len(found) > 1 else {})}

    def _batches(self, dataset: PackedDataset) -> Iterator[list[Batch]]:
        """This rank's micro-batches, as many as other ranks have, and with a pipeline several at once."""
        layout, config = self.engine.parallel.mesh.layout, dataset.config
        count = min(self.most, dataset.sequences_per_epoch)
        at_once = layout.pp if layout.pp > 1 else 1
        each = layout.dp * self.micro_batch_size
        for group in range(math.ceil(count / (each * at_once))):
            batches = []
            for number in range(group * at_once, (group + 1) * at_once):
                first = number * each + self.data_rank * self.micro_batch_size
                places = range(first, first + self.micro_batch_size)
                batches.append(collate([_row(dataset, place, count, config) for place in places], config))
            yield batches


def _row(dataset: PackedDataset, place: int, count: int, config: Gemma4Config) -> Row:
    """A sequence, or beyond the last one a row in which nothing is measured."""
    if place < count:
        return dataset[place]
    length = dataset.sequence_length
    tokens = torch.full((length,), config.pad_token_id)
    return Row(tokens, torch.full_like(tokens, IGNORE), torch.arange(length), torch.zeros_like(tokens))


def _mean(sums: torch.Tensor) -> float:
    loss, count = sums.tolist()
    return loss / max(count, 1.0)
