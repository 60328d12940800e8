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


class Engine:
    """Runs whole batches, alike on all ranks that share one, through the plans of a model."""

    def __init__(
        self, parallel: ParallelModel, objective: Objective, device: torch.device, gradient_sync: str = "last"
    ) -> None:
        self.parallel, self.objective, self.device, self.gradient_sync = parallel, objective, device, gradient_sync
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

        has_media: for each micro-batch whether any rank has images, and sound; by default what these
        micro-batches have, on every rank alike. should_continue: asked between
        micro-batches, as a large step may take longer than the time a scheduler leaves; if no,
        the result is None. Returns this rank's part of the sums of loss and other metrics; those
        of all ranks add up.
        """
        sums: dict[str, Tensor] = {}
        if has_media is None:
            media = [batch.inputs.media or Media() for batch in micro_batches]
            has_media = [(part.vision is not None, part.audio is not None) for part in media]
        for router in self.parallel.routers:
            router.scale = 1 / len(micro_batches)
        if self.parallel.pipeline is not None:
            self._through_stages(self.parallel.pipeline, micro_batches, units, has_media, sums)
            return sums
        model = self.parallel.whole
        for index, batch in enumerate(micro_batches):
            if index and should_continue is not None and not should_continue():
                return None
            last = index == len(micro_batches) - 1
            require_gradient_sync(model, last or self.gradient_sync == "every")
            local = self.local(batch, *has_media[index])
            loss = self.objective(model.run(local.inputs), model.head, model.head_weight, local)
            self._add(sums, loss)
            (loss.total / max(units, 1)).backward()
        return sums

    def _through_stages(
        self,
        pipeline: Pipeline,
        micro_batches: Sequence[Batch],
        units: int,
        has_media: Sequence[tuple[bool, bool]],
        sums: dict[str, Tensor],
    ) -> None:
        batches = [self.local(batch, *media) for batch, media in zip(micro_batches, has_media, strict=True)]

        def loss(hidden_TD: Tensor, head: Head, weight_VD: Tensor, number: int) -> Tensor:
            found = self.objective(hidden_TD, head, weight_VD, batches[number])
            self._add(sums, found)
            return found.total / max(units, 1)

        pipeline.step([batch.inputs for batch in batches], loss, self.device)
        if not sums:  # stages before the last see no loss
            sums |= {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in self.objective.sums}

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
        return Batch(inputs, labels_BS).to(self.device)

    def _add(self, sums: dict[str, Tensor], loss: Loss) -> None:
        for name, value in {"loss": loss.nll, "count": loss.count, **loss.metrics}.items():
            value = value.detach().double()
            if self.parallel.mesh.at["tp"]:  # ranks of tp compute the same loss
                value = torch.zeros_like(value)
            sums[name] = sums.get(name, 0) + value


def media_of_all_ranks(media: Media | None, config: Gemma4Config, *, vision: bool, audio: bool) -> Media:
    """Media with empty parts for what only other ranks have, so that all ranks run the same encoders."""
    have, nowhere = media or Media(), torch.zeros(0, dtype=torch.long)
    return Media(
        pack_patches(config, (), nowhere) if vision and have.vision is None else have.vision,
        pack_frames(config, (), nowhere) if audio and have.audio is None else have.audio,
    )
