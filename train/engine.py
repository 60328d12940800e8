"""One step's forward and backward over micro-batches, on any mesh: what the loop and the tests of meshes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import Batch
from model import Gemma4Config
from model.head import Head
from model.media import Media, pack_frames, pack_patches
from parallel.apply import ParallelModel
from parallel.fsdp import require_gradient_sync
from parallel.grad_norm import clip_grad_norm
from train.objective import Loss, Objective

if TYPE_CHECKING:
    from parallel.pipeline.schedule import Pipeline


_OF_SOURCES = ("source_loss", "source_count")


class Engine:
    """Runs whole batches, alike on all ranks that share one, through the plans of a model."""

    def __init__(
        self,
        parallel: ParallelModel,
        objective: Objective,
        device: torch.device,
        gradient_sync: str = "last",
        num_sources: int = 1,
    ) -> None:
        self.parallel, self.objective, self.device, self.gradient_sync = parallel, objective, device, gradient_sync
        self.num_sources = num_sources
        at = parallel.mesh.at
        self.is_batch_leader = at["tp"] == 0 and at["cp"] == 0 and at["pp"] == 0
        """Whether this rank counts for all ranks that see the same sequences."""

    def forward_backward(
        self,
        micro_batches: Sequence[Batch],
        units: int,
        has_media: Sequence[tuple[bool, bool]] | None = None,
        should_continue: Callable[[], bool] | None = None,
    ) -> dict[str, Tensor] | None:
        """Gradients of the summed loss over `units`, the objective's units of all ranks.

        has_media: for each micro-batch whether any rank has images, and sound; left out, other ranks have
        what this one has. should_continue: asked between
        micro-batches, as a large step may take longer than the time a scheduler leaves; if no,
        the result is None. Returns this rank's part of the sums of loss and other metrics; those
        of all ranks add up. If there are several sources, also source_loss/I and source_count/I of each.
        """
        has_media = has_media or [_has_media(batch) for batch in micro_batches]
        for router in self.parallel.routers:
            router.scale = 1 / len(micro_batches)
        if self.parallel.pipeline is not None:
            local = [self.local(batch, *media) for batch, media in zip(micro_batches, has_media, strict=True)]
            return self._through_stages(self.parallel.pipeline, local, units)
        model, found = self.parallel.whole, []
        for index, batch in enumerate(micro_batches):
            if index and should_continue is not None and not should_continue():
                return None
            last = index == len(micro_batches) - 1
            require_gradient_sync(model, last or self.gradient_sync == "every")
            local_batch = self.local(batch, *has_media[index])
            loss = self.objective(model.run(local_batch.inputs), model.head, model.head_weight, local_batch)
            (loss.total / max(units, 1)).backward()
            found.append(self._sums(loss, local_batch))
        return self._summed(found)

    @torch.no_grad()
    def forward(
        self, micro_batches: Sequence[Batch], has_media: Sequence[tuple[bool, bool]] | None = None
    ) -> dict[str, Tensor]:
        """The sums of loss and other metrics alone, without gradients; this rank's part, as `forward_backward`."""
        has_media = has_media or [_has_media(batch) for batch in micro_batches]
        local = [self.local(batch, *media) for batch, media in zip(micro_batches, has_media, strict=True)]
        if self.parallel.pipeline is not None:
            return self._through_stages(self.parallel.pipeline, local, 1, backward=False)
        model, found = self.parallel.whole, []
        for batch in local:
            hidden_TD = model.run(batch.inputs)
            # Detached, since the fused loss makes the gradients of what requires any.
            loss = self.objective(hidden_TD, model.head, model.head_weight.detach(), batch)
            found.append(self._sums(loss, batch))
        return self._summed(found)

    def _through_stages(
        self, pipeline: Pipeline, batches: Sequence[Batch], units: int, *, backward: bool = True
    ) -> dict[str, Tensor]:
        found = []

        def objective(hidden_TD: Tensor, head: Head, weight_VD: Tensor, number: int) -> Tensor:
            loss = self.objective(hidden_TD, head, weight_VD if backward else weight_VD.detach(), batches[number])
            found.append(self._sums(loss, batches[number]))
            return loss.total / max(units, 1)

        pipeline.step([batch.inputs for batch in batches], objective, self.device, backward=backward)
        return self._summed(found)

    def _sums(self, loss: Loss, batch: Batch) -> dict[str, Tensor]:
        sums = loss.sums()
        if self.num_sources == 1 or loss.nll_T is None:
            return sums
        of_T = batch.sources_T
        each_T = torch.stack([loss.nll_T.double(), torch.ones_like(loss.nll_T, dtype=torch.float64)])
        of_sources = each_T.new_zeros(2, self.num_sources).index_add_(1, of_T, each_T)
        for name, row in zip(_OF_SOURCES, of_sources, strict=True):
            sums |= {f"{name}/{source}": part for source, part in enumerate(row)}
        return sums

    def _summed(self, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The sums of all micro-batches, for all ranks to add up: one of tp's ranks, and a last stage, has them."""
        names = list(self.objective.sums)
        if self.num_sources > 1:
            names += [f"{name}/{source}" for name in _OF_SOURCES for source in range(self.num_sources)]
        nothing = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in names}
        if not found or self.parallel.mesh.at["tp"]:
            return nothing
        return {
            name: sum((sums[name].to(self.device) for sums in found if name in sums), zero)
            for name, zero in nothing.items()
        }

    def clip(self, max_norm: float) -> float:
        """Clip gradients to a global norm; returns the norm before."""
        pipeline = self.parallel.pipeline
        copies = pipeline.tied_copies() if pipeline is not None else []
        return clip_grad_norm(self.parallel.model.parameters(), max_norm, counted_elsewhere=copies)

    def local(self, batch: Batch, vision: bool, audio: bool) -> Batch:
        """What this rank runs of a batch, on its device."""
        parallel = self.parallel
        media = media_of_all_ranks(batch.inputs.media, parallel.config, vision=vision, audio=audio)
        inputs, labels_BS = replace(batch.inputs, media=media), batch.labels_BS
        for plan in parallel.plans:
            inputs = plan(inputs)
        if parallel.context is not None:
            labels_BS = parallel.context.part(labels_BS)
        return Batch(inputs, labels_BS, batch.sources_B).to(self.device)


def _has_media(batch: Batch) -> tuple[bool, bool]:
    media = batch.inputs.media or Media()
    return media.vision is not None, media.audio is not None


def media_of_all_ranks(media: Media | None, config: Gemma4Config, *, vision: bool, audio: bool) -> Media:
    """Media with empty parts for what only other ranks have, so that all ranks run the same encoders."""
    have, nowhere = media or Media(), torch.zeros(0, dtype=torch.long)
    return Media(
        pack_patches(config, (), nowhere) if vision and have.vision is None else have.vision,
        pack_frames(config, (), nowhere) if audio and have.audio is None else have.audio,
    )
