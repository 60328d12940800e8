"""One step's forward and backward over micro-batches, on any mesh: what the loop and the tests of meshes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import Batch
from model.config import LayerType
from model.head import Head
from model.masks import AttentionMask, layer_masks
from model.media import Media, token_types
from parallel.apply import ParallelModel
from parallel.context import ContextParallel
from parallel.fsdp import require_gradient_sync
from parallel.grad_norm import clip_grad_norm
from parallel.stage import MicroBatch
from train.objective import Loss, Objective, hidden_states

if TYPE_CHECKING:
    from parallel.pipeline import Pipeline


class Engine:
    """Runs whole batches, alike on all ranks that share one, through the plans of a model."""

    def __init__(
        self, parallel: ParallelModel, objective: Objective, device: torch.device, gradient_sync: str = "last"
    ) -> None:
        self.parallel, self.objective, self.device, self.gradient_sync = parallel, objective, device, gradient_sync
        at = parallel.mesh.at
        self.leads = at["tp"] == 0 and at["cp"] == 0 and at["pp"] == 0
        """Whether this rank speaks for the ranks that see the same sequences."""

    def forward_backward(
        self,
        micro_batches: Sequence[Batch],
        units: int,
        present: Sequence[tuple[bool, bool]],
        go_on: Callable[[], bool] | None = None,
    ) -> dict[str, Tensor] | None:
        """Gradients of the summed loss over `units`, the objective's units of all ranks.

        present: for each micro-batch whether any rank has images, and sound. go_on: asked between
        micro-batches, as a large step may take longer than the time a scheduler leaves; if no,
        the result is None. Returns this rank's part of the sums of loss and other metrics; those
        of all ranks add up.
        """
        sums: dict[str, Tensor] = {}
        for router in self.parallel.routers:
            router.scale = 1 / len(micro_batches)
        if self.parallel.pipeline is not None:
            self._through_stages(self.parallel.pipeline, micro_batches, units, present, sums)
            return sums
        model = self.parallel.whole
        for index, batch in enumerate(micro_batches):
            if index and go_on is not None and not go_on():
                return None
            last = index == len(micro_batches) - 1
            require_gradient_sync(model, last or self.gradient_sync == "every")
            local = self.local(batch, *present[index])
            loss = self.objective(hidden_states(model, local), model.head, model.head_weight, local)
            self._add(sums, loss)
            (loss.total / max(units, 1)).backward()
        return sums

    def _through_stages(
        self,
        pipeline: Pipeline,
        micro_batches: Sequence[Batch],
        units: int,
        present: Sequence[tuple[bool, bool]],
        sums: dict[str, Tensor],
    ) -> None:
        batches = [self.local(batch, *media) for batch, media in zip(micro_batches, present, strict=True)]

        def loss(hidden_TD: Tensor, head: Head, weight_VD: Tensor, number: int) -> Tensor:
            found = self.objective(hidden_TD, head, weight_VD, batches[number])
            self._add(sums, found)
            return found.total / max(units, 1)

        given = [MicroBatch(b.tokens_BS, b.positions_BS, b.supervised_BS, b.media, self._masks(b)) for b in batches]
        pipeline.step(given, loss, self.device)
        if not sums:  # stages before the last see no loss
            sums |= {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in self.objective.sums}

    def clip(self, max_norm: float) -> float:
        """Clip gradients to a global norm; returns the norm before."""
        pipeline = self.parallel.pipeline
        copies = pipeline.tied_copies() if pipeline is not None else []
        return clip_grad_norm(self.parallel.model.parameters(), max_norm, counted_elsewhere=copies)

    def local(self, batch: Batch, vision: bool, audio: bool) -> Batch:
        """What this rank runs of a batch, on its device."""
        media = Media.on_all_ranks(batch.media, self.parallel.config, vision=vision, audio=audio)
        batch = replace(batch, media=media)
        if self.parallel.context is not None:
            batch = cut(batch, self.parallel.context)
        return batch.to(self.device)

    def _masks(self, batch: Batch) -> dict[LayerType, AttentionMask]:
        """Once for all stages of this rank."""
        config = self.parallel.config
        return batch.masks or layer_masks(config, token_types(config, batch.tokens_BS), batch.document_ids_BS)

    def _add(self, sums: dict[str, Tensor], loss: Loss) -> None:
        for name, value in {"loss": loss.nll, "count": loss.count, **loss.metrics}.items():
            value = value.detach().double()
            if self.parallel.mesh.at["tp"]:  # ranks of tp compute the same loss
                value = torch.zeros_like(value)
            sums[name] = sums.get(name, 0) + value


def cut(batch: Batch, context: ContextParallel) -> Batch:
    """This rank's positions of every sequence, with masks that see all of it."""
    types_BS = token_types(context.config, batch.tokens_BS)

    def local_rows(rows: Tensor) -> Tensor:
        return context.local_rows(rows, *batch.tokens_BS.shape)

    media = batch.media
    if media is not None:
        media = Media(
            None if media.vision is None else replace(media.vision, rows=local_rows(media.vision.rows)),
            None if media.audio is None else replace(media.audio, rows=local_rows(media.audio.rows)),
        )
    return Batch(
        context.cut(batch.tokens_BS),
        context.cut(batch.labels_BS),
        context.cut(batch.positions_BS),
        context.cut(batch.document_ids_BS),
        media,
        context.masks(types_BS, batch.document_ids_BS, batch.positions_BS),
    )
