"""The loop: config to trained model. Pretraining and fine-tuning differ in data and objective, not here."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from data.loader import BatchLoader, StepSampler
from model import ConfigError, UserError
from model.hf.weights import Weights
from model.init import Fill, random_fill, reference_vector, stable_vector
from model.media import Media
from parallel.agree import RankError, summed_counts, together
from parallel.apply import build_parallel_model
from parallel.kernels import check_kernels, choose_kernels
from parallel.mesh import build_mesh
from parallel.router_losses import read_balance
from parallel.world import World, compute_dtype
from train import screen
from train.checkpoint import Checkpointer, read_state
from train.corpus import prepare_data
from train.engine import Engine
from train.export import export
from train.flops import media_flops, peak_flops, training_flops
from train.metrics import Meter, step_line
from train.objective import OBJECTIVES
from train.optimizer import build_optimizer, set_learning_rate
from train.origin import Origin, check_origin
from train.plots import write_loss_curve
from train.profile import Profiler
from train.resolve import Resolved
from train.resume import Progress, changes, find_checkpoint, progress_from, saved_progress
from train.run_folder import RunFolder
from train.sampling import sample_prompts, write_samples
from train.schedule import check_schedule, learning_rate, run_length
from train.stop_request import StopRequest
from train.trackers import Tracker, build_trackers
from train.validate import Validation
from train.watch import Watch

log = logging.getLogger("gemwright")


class Trainer:
    """One run on this process. The process group must exist; every rank builds one and calls `train`."""

    progress: Progress
    steps: int

    def __init__(self, run: Resolved, world: World, device: torch.device) -> None:
        self.run, self.world, self.device = run, world, device
        config = self.config = run.config
        self.model_config, self.layout = run.model, run.layout
        self.stop = StopRequest()
        self.dtype = compute_dtype(config.run.dtype, device)
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        self.watch = Watch(world, self.stop, config.run.silence_seconds)
        try:  # before any rank waits for another
            self.folder = together(lambda: RunFolder(config, world.rank))
        except RankError as error:
            raise ConfigError(str(error)) from None
        self.checkpointer = Checkpointer(
            self.folder.checkpoints, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        self.data = prepare_data(run, world, self.stop)
        checkpoint, changed = self._find_progress()
        self.exported: Path | None = None
        self.saved_step = self.progress.step if checkpoint is not None else None
        self._forecast_at = self.progress.step + 2  # the first step is slower
        self._saved_at, self._checkpoint_due = time.monotonic(), False
        self.trackers: list[Tracker] = []
        if world.rank == 0 and not self.complete:
            self.folder.describe(config, self.data.tokenizer_file)
            self.trackers = build_trackers(config, self.folder.path, self.progress.step)
        screen.show(run, world, device, self.dtype, screen.Outlook(self.data, self.progress, checkpoint, changed))
        if choose_kernels(config.parallel.kernels, device):
            log.info("kernels of Triton, beside torch's: %s", check_kernels(self.model_config, device, self.dtype))
        self.parallel = build_parallel_model(
            self.model_config,
            build_mesh(device, self.layout),
            device,
            self._initial_values(checkpoint),
            config,
            frozen=run.frozen,
            compute_dtype=self.dtype,
            sequence_length=config.data.sequence_length,
        )
        if world.rank == 0 and (run.weights is not None or checkpoint is not None):
            self.progress = replace(self.progress, origin=Origin(config.origin).digest)
        self.model = self.parallel.model
        self.optimizer = build_optimizer(self.model, config.optimizer, self.parallel.mesh.shards)
        self.objective = OBJECTIVES[config.train.objective](config.train)
        self.engine = Engine(
            self.parallel, self.objective, device, config.parallel.gradient_sync, len(self.data.sources)
        )
        if checkpoint is not None:
            newly_trained = set(read_state(checkpoint).get("frozen", ())) - set(self.run.frozen)
            self.checkpointer.load(checkpoint, self.model, self.optimizer, newly_trained=newly_trained)
        self.validation: Validation | None = None
        if self.data.validation and config.train.validate_every:
            self.validation = Validation(
                self.data.validation,
                config.train.validate_sequences,
                self.engine,
                run.micro_batch_size,
                self.layout.data_rank(world.rank),
            )
        self.prompts = sample_prompts(run, self.data) if config.train.sample_every else []
        log.info(screen.kernels(run, device, self.dtype, self.parallel.products))

    def _find_progress(self) -> tuple[Path | None, list[str]]:
        """Where the run goes on, how long it is, and what has changed since."""
        config, run = self.config, self.run
        checkpoint = find_checkpoint(config.run.resume, self.checkpointer)
        self.progress = Progress.fresh(run, self.data)
        if checkpoint is not None:
            self.progress = progress_from(checkpoint, self.progress)
            self.data = self.data.going_on(self.progress.since, self.progress.used_before)
        # Only now is it known where the limits of sources end the run.
        self.steps = run_length(config.train, self.data.sequences_per_epoch, self.data.turns.length)
        self.progress = replace(self.progress, steps=self.steps)
        check_schedule(config.schedule, self.steps)
        return checkpoint, [] if checkpoint is None else changes(saved_progress(checkpoint), self.progress)

    def _initial_values(self, checkpoint: Path | None) -> Fill:
        """Drawn, or the slices of a released checkpoint; a resumed run reads its own checkpoint afterwards."""
        config, model = self.config, self.model_config
        if self.run.weights is None or checkpoint is not None:
            if checkpoint is not None:
                self._find_origin(checkpoint)
            stable = config.model.init == "stable"
            vector = stable_vector(model.num_hidden_layers) if stable else reference_vector
            return random_fill(config.run.seed, model.initializer_range, model.pad_token_id, vector)
        weights = Weights(self.run.weights, model, strict=self.config.model.strict)
        if self.world.rank == 0:
            dtypes = {name: entry.dtype for name, entry in weights.entries.items()}
            Origin.remember(config.origin, self.run.weights, dtypes)
        return weights.fill

    def _find_origin(self, checkpoint: Path) -> None:
        """On rank 0: what exports need of the weights that the checkpoint's run began with; or they are refused now."""
        if self.world.rank != 0:
            return
        Origin.inherit(self.config.origin, checkpoint)
        try:
            check_origin(read_state(checkpoint), self.config.origin, self.config.export.dtype)
        except UserError as error:
            if self.config.export.every or self.config.export.at_end:
                raise
            log.warning("no export is possible yet: %s", error)

    @property
    def complete(self) -> bool:
        """Whether all steps were taken."""
        return self.progress.step >= self.steps

    def train(self) -> None:
        """Run to the last step, or to the first stop request; leave a checkpoint either way."""
        config = self.config
        if self.complete:
            if config.export.at_end:
                self._export()
            log.info(
                "done: already at step %d of %d in %s; raise train.steps or train.epochs, or choose another run.dir",
                self.progress.step,
                self.steps,
                self.folder.path,
            )
            return
        meter = Meter(self.world.size, self.steps, peak_flops(self.device, self.dtype), self.device)
        sampler = StepSampler(
            self.progress.sequences_seen,
            self.steps - self.progress.step,
            config.train.global_batch_size,
            self.run.micro_batch_size,
            self.layout.data_rank(self.world.rank),
            self.layout.dp,
        )
        batches = BatchLoader(self.data.dataset, sampler, config.data.workers, self.model_config)
        meter.started = time.perf_counter()
        folder = self.folder.path / "profile" if config.train.profile else None
        profiler = Profiler(folder, self.world.rank, self.device, self.model)
        if self.progress.step == 0:
            self._validate(meter)
        while not self.complete:
            with profiler.step():
                if not self._step(batches, sampler.accumulation, meter):
                    break
            step = self.progress.step
            if step % (config.train.validate_every or 1) == 0 or self.complete:
                self._validate(meter)
            paused = time.perf_counter()
            if self.prompts and (step % config.train.sample_every == 0 or self.complete):
                self._sample()
            if self._checkpoint_due or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self._save()
            if config.export.every and step % config.export.every == 0:
                self._export()
            meter.pause(time.perf_counter() - paused)
        self._save()
        self.checkpointer.commit()
        if config.export.at_end and self.complete:
            self._export()
        self._finish()

    def _step(self, batches: BatchLoader, accumulation: int, meter: Meter) -> bool:
        """One optimizer step; False, with the weights as they were, if any rank was asked to stop."""
        config = self.config
        waited = time.perf_counter()
        with record_function("data"):
            micro_batches = [next(batches) for _ in range(accumulation)]
        waited = time.perf_counter() - waited
        given = [batch.inputs for batch in micro_batches]
        parts = [inputs.media or Media() for inputs in given]
        leader = self.engine.is_batch_leader  # of the ranks that share these sequences, one counts them
        # Everything ranks must agree on before the step, in one small exchange.
        counts = (
            leader * sum(map(self.objective.units, micro_batches)),
            leader * sum(batch.kept.count for batch in micro_batches),
            leader * sum(len(inputs.tokens_T) for inputs in given),
            leader
            * (
                sum(training_flops(self.model_config, inputs) for inputs in given)
                + sum(media_flops(self.model_config, media, self.run.frozen) for media in parts)
            ),
            bool(self.stop),
            self.world.rank == 0 and 0 < 60 * config.checkpoint.every_minutes <= time.monotonic() - self._saved_at,
            self.checkpointer.written,
            *(part is not None for media in parts for part in (media.vision, media.audio)),
        )
        with record_function("exchange"):
            units, supervised, tokens, flops, stops, due, written, *present = summed_counts(*counts)
        if stops:
            return False
        self._checkpoint_due = bool(due)
        if written == self.world.size:
            self.checkpointer.commit()
        has_media = [(vision > 0, audio > 0) for vision, audio in zip(present[::2], present[1::2], strict=True)]
        with record_function("forward_backward"):
            sums = self.engine.forward_backward(
                micro_batches, units, has_media, should_continue=lambda: not summed_counts(bool(self.stop))[0]
            )
        if sums is None:
            return False
        with record_function("clip"):
            grad_norm = self.engine.clip(config.train.max_grad_norm)
        if not math.isfinite(grad_norm):
            self.checkpointer.commit()
            raise UserError(self._way_back(grad_norm))
        rate = learning_rate(config.schedule, config.optimizer.lr, self.progress.step, self.steps)
        set_learning_rate(self.optimizer, rate)
        with record_function("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens_seen=self.progress.tokens_seen + tokens,
            sequences_seen=batches.sequences_seen,
        )
        meter.add(tokens, flops, waited)
        if self.progress.step % config.train.log_every == 0 or self.progress.step in (1, self.steps):
            self._log(sums, {"grad_norm": grad_norm, "lr": rate, "supervised_tokens": supervised}, meter)
        return True

    def _way_back(self, grad_norm: float) -> str:
        """What to do about a step whose gradients are not finite."""
        said = f"gradient norm is {grad_norm} at step {self.progress.step + 1}; the weights were not touched: "
        lower = f"lower optimizer.lr (now {self.config.optimizer.lr})"
        if self.progress.step and self.progress.step == self.saved_step:
            spoilt = self.folder.checkpoints / f"step_{self.progress.step:08d}"
            return f"{said}those of {spoilt} give it already; delete that folder, {lower} and start again."
        return f"{said}{lower} and start again: the run goes on from its last checkpoint."

    def _log(self, sums: dict[str, Tensor], values: dict[str, float], meter: Meter) -> None:
        reduced = torch.stack([value.to(self.device) for value in sums.values()])
        dist.all_reduce(reduced)
        named = dict(zip(sums, reduced.tolist(), strict=True))
        count = max(named.pop("count"), 1.0)
        of_sources = self._source_metrics(named)
        means = {name: value / count for name, value in named.items()}
        load = read_balance(self.parallel.routers, self.model_config) if self.model_config.enable_moe_block else {}
        values |= {"tokens_seen": self.progress.tokens_seen, **of_sources}
        record = meter.record(self.progress.step, {**means, **values, **load})
        log.info(step_line(record, self.steps))
        if self._forecast_at <= self.progress.step < self.steps:
            self._forecast_at = self.steps
            log.info(screen.forecast(record, self.steps))
        for tracker in self.trackers:
            tracker.log(record)

    def _source_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The loss of each source in this step, taken out of `sums`, its tokens and its epochs so far."""
        found: dict[str, float] = {}
        if len(self.data.sources) < 2:
            return found
        seen = self.progress.sequences_seen
        counts, epochs = self.data.turns.counts(seen), self.data.epochs(seen)
        for source, name in enumerate(self.data.names):
            loss, count = (sums.pop(f"source_{what}/{source}") for what in ("loss", "count"))
            if count:
                found[f"source_loss/{name}"] = loss / count
            found[f"source_tokens/{name}"] = counts[source] * self.config.data.sequence_length
            found[f"source_epochs/{name}"] = round(epochs[source], 4)
        return found

    def _validate(self, meter: Meter) -> None:
        """Measure the loss on what is held out, unless told to stop."""
        if self.validation is None:
            return
        paused = time.perf_counter()
        losses = self.validation.measure(lambda: not self.stop)
        meter.pause(time.perf_counter() - paused)
        if losses is None:
            return
        several = " | ".join(f"{name.partition('/')[2]} {loss:.4f}" for name, loss in losses.items() if "/" in name)
        log.info("validation | loss %.4f%s", losses["validation_loss"], f" | {several}" if several else "")
        for tracker in self.trackers:
            tracker.log_validation({"step": self.progress.step, **losses})

    def _sample(self) -> None:
        config = self.config
        samples = write_samples(
            self.parallel,
            self.data.tokenizer,
            self.prompts,
            config.train.sample_tokens,
            device=self.device,
            seed=config.run.seed,
            step=self.progress.step,
        )
        for sample in samples:
            log.info("sample | %s | %s", *(sample[part].replace("\n", "\\n") for part in ("prompt", "text")))
        for tracker in self.trackers:
            tracker.log_samples(samples)

    def _save(self) -> None:
        step = self.progress.step
        if step == self.saved_step:
            return
        progress = replace(self.progress, used=self.data.used(self.progress.sequences_seen))
        self.checkpointer.save(step, self.model, self.optimizer, asdict(progress))
        self.saved_step, self._saved_at, self._checkpoint_due = step, time.monotonic(), False
        log.info("checkpoint step %d%s", step, " (writing)" if self.config.checkpoint.asynchronous else "")

    def _export(self) -> None:
        """The checkpoint of this step as a folder for transformers and vLLM, unless it is there."""
        self._save()
        self.checkpointer.commit()
        checkpoint = self.folder.checkpoints / f"step_{self.progress.step:08d}"
        out = self.folder.path / "export" / checkpoint.name
        if out == self.exported:
            return
        origin = self.config.origin if self.config.origin.is_dir() else None
        export(
            checkpoint,
            out,
            self.model_config,
            tokenizer=self.folder.path / "tokenizer.json",
            origin=origin,
            dtype=self.config.export.dtype,
            replace=True,
        )
        self.exported = out
        log.info("exported to %s", out)

    def _finish(self) -> None:
        if self.world.rank == 0:
            curve = write_loss_curve(self.folder.path)
            if curve is not None:
                log.info("loss curve in %s", curve)
        for tracker in self.trackers:
            tracker.finish()
        step, tokens = self.progress.step, f"{self.progress.tokens_seen:,}"
        if self.complete:
            log.info("done: step %d, %s tokens, run folder %s", step, tokens, self.folder.path)
        else:
            log.info("stopped as asked at step %d; the same command goes on from there", step)
