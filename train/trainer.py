"""The loop: config to trained model. Pretraining and fine-tuning differ in data and objective, not here."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data.batch import Batch
from data.loader import StepSampler, build_loader
from data.packing import PackedDataset
from data.prepare import Corpus, prepare
from model import ConfigError, Gemma4, Gemma4Config, UserError
from model.attention_kernels import kernel_for
from parallel.apply import build_parallel_model
from parallel.fsdp import require_gradient_sync
from parallel.grad_norm import clip_grad_norm
from parallel.mesh import World, build_mesh, data_parallel_sizes, micro_batch_size
from train.checkpoint import Checkpointer, read_state
from train.config import Config
from train.faults import StopRequest
from train.flops import batch_work, peak_flops, training_flops
from train.metrics import Meter, step_line
from train.objective import Loss, build_objective
from train.optimizer import build_optimizer, set_learning_rate
from train.plots import write_loss_curve
from train.sampling import write_samples
from train.schedule import learning_rate
from train.trackers import Tracker, build_trackers

log = logging.getLogger("gemwright")


class Trainer:
    """One run on this process. The process group must exist; every rank builds one and calls `train`."""

    def __init__(self, config: Config, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.stop = StopRequest()
        self.folder = Path(config.run.dir)
        self.model_config: Gemma4Config = config.gemma4()
        sizes = data_parallel_sizes(world.size, config.parallel.dp_replicate, config.parallel.dp_shard)
        self.micro_batch_size = micro_batch_size(
            config.train.global_batch_size, config.train.micro_batch_size, world.size
        )
        self.dtype = _compute_dtype(config.run.dtype, device)
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.run.deterministic)
        torch.backends.cudnn.benchmark = not config.run.deterministic

        self._make_folder()
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )
        resume_from = self._resume_folder()
        if world.rank == 0:
            OmegaConf.save(OmegaConf.structured(config), self.folder / "config.yaml")
        self.corpus = self._prepare_corpus()
        self.model = build_parallel_model(
            self.model_config,
            build_mesh(device, *sizes),
            device,
            compute_dtype=self.dtype,
            seed=config.run.seed,
            activation_checkpoint=config.activation_checkpoint.mode,
            reshard_after_forward=config.parallel.reshard_after_forward,
            cpu_offload=config.parallel.cpu_offload,
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.objective = build_objective(config.train.z_loss)
        self.step, self.tokens_seen, self.sequences_seen = 0, 0, 0
        if resume_from is not None:
            state = self.checkpointer.load(resume_from, self.model, self.optimizer)
            self.step, self.tokens_seen = state["step"], state["tokens_seen"]
            self.sequences_seen = state["sequences_seen"]
        self.saved_step = self.step if resume_from is not None else None
        self._describe(sizes, resume_from)

    def train(self) -> None:
        """Run to `train.steps`, or to the first stop request; leave a checkpoint either way."""
        config, steps = self.config, self.config.train.steps
        if self.step >= steps:
            log.info(
                "already at step %d of %d in %s: raise train.steps or choose another run.dir",
                self.step,
                steps,
                self.folder,
            )
            return
        trackers = build_trackers(config, self.folder, self.step) if self.world.rank == 0 else []
        meter = Meter(self.world.size, steps, peak_flops(self.device, self.dtype), self.device)
        sampler = StepSampler(
            self.sequences_seen,
            steps - self.step,
            config.train.global_batch_size,
            self.micro_batch_size,
            self.world.rank,
            self.world.size,
        )
        dataset = PackedDataset(self.corpus.shard, config.data.sequence_length, config.run.seed)
        batches = iter(build_loader(dataset, sampler, config.data.workers))
        meter.started = time.perf_counter()
        stopped = False
        while self.step < steps:
            stopped = self._step(batches, sampler.accumulation, meter, trackers)
            if stopped:
                break
            paused = time.perf_counter()
            if config.train.sample_every and (self.step % config.train.sample_every == 0 or self.step == steps):
                self._sample(trackers)
            if config.checkpoint.every and self.step % config.checkpoint.every == 0:
                self._save()
            meter.pause(time.perf_counter() - paused)
        self._save()
        self.checkpointer.commit()
        self._finish(trackers, stopped)

    def _step(self, batches: Iterator[Batch], accumulation: int, meter: Meter, trackers: list[Tracker]) -> bool:
        """One optimizer step; True (and nothing done) if any rank was asked to stop."""
        config = self.config
        waited = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        waited = time.perf_counter() - waited
        works = [batch_work(self.model_config, batch) for batch in micro_batches]
        flops = sum(training_flops(self.model_config, work) for work in works)
        # Everything ranks must agree on before the step, in one small exchange.
        agreed = torch.tensor(
            [
                sum(work.supervised for work in works),
                sum(work.tokens for work in works),
                flops,
                bool(self.stop),
                self.checkpointer.written,
            ]
        )
        dist.all_reduce(agreed)
        supervised, tokens, flops, stops, written = agreed.tolist()
        if stops:
            return True
        if written == self.world.size:
            self.checkpointer.commit()

        nll = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches):
            last = index == accumulation - 1
            require_gradient_sync(self.model, last or config.parallel.gradient_sync == "every")
            loss: Loss = self.objective(self.model, batch.to(self.device))
            (loss.total / max(supervised, 1)).backward()
            nll += loss.nll
        grad_norm = float(clip_grad_norm(self.model.parameters(), config.train.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise UserError(
                f"gradient norm is {grad_norm} at step {self.step + 1}; the weights were not touched: lower "
                f"optimizer.lr (now {config.optimizer.lr}) and start again from the checkpoint before."
            )
        rate = learning_rate(config.schedule, config.optimizer.lr, self.step, config.train.steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens_seen += tokens
        self.sequences_seen += config.train.global_batch_size
        meter.add(tokens, flops, waited)
        if self.step % config.train.log_every == 0 or self.step in (1, config.train.steps):
            dist.all_reduce(nll)
            values = {
                "loss": nll.item() / max(supervised, 1),
                "grad_norm": grad_norm,
                "lr": rate,
                "tokens_seen": self.tokens_seen,
                "supervised_tokens": supervised,
            }
            record = meter.record(self.step, values)
            log.info(step_line(record, config.train.steps))
            for tracker in trackers:
                tracker.log(record)
        return False

    def _sample(self, trackers: list[Tracker]) -> None:
        config = self.config
        samples = write_samples(
            self.model,
            self.corpus.tokenizer,
            config.train.sample_prompts,
            config.train.sample_tokens,
            config.run.seed,
            self.step,
        )
        for sample in samples:
            log.info("sample | %s%s", sample["prompt"], sample["text"].replace("\n", "\\n"))
        for tracker in trackers:
            tracker.log_samples(samples)

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        state = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "sequences_seen": self.sequences_seen,
            "model": asdict(self.model_config),
            "world_size": self.world.size,
        }
        self.checkpointer.save(self.step, self.model, self.optimizer, state)
        self.saved_step = self.step
        log.info("checkpoint step %d%s", self.step, " (writing)" if self.config.checkpoint.asynchronous else "")

    def _finish(self, trackers: list[Tracker], stopped: bool) -> None:
        if self.world.rank == 0:
            curve = write_loss_curve(self.folder)
            if curve is not None:
                log.info("loss curve in %s", curve)
        for tracker in trackers:
            tracker.finish()
        if stopped:
            log.info("stopped as asked at step %d; the same command goes on from there", self.step)
        else:
            log.info("done: step %d, %s tokens, run folder %s", self.step, f"{self.tokens_seen:,}", self.folder)

    def _make_folder(self) -> None:
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.dir={self.folder} cannot be made ({error.strerror}); choose a folder you may write to."
            ) from None

    def _resume_folder(self) -> Path | None:
        """The checkpoint to go on from, checked to be of this model. Raises `UserError` if it is not."""
        wanted = self.config.run.resume
        newest = self.checkpointer.newest() if wanted in ("auto", "never") else Path(wanted)
        if wanted == "never" and newest is not None:
            raise ConfigError(
                f"run.resume=never, but {self.folder} holds checkpoints of another run; choose another run.dir."
            )
        if newest is not None:
            saved = read_state(newest)["model"]
            for key, value in asdict(self.model_config).items():
                if saved.get(key) != value:
                    raise ConfigError(
                        f"checkpoint {newest} has model.{key}={saved.get(key)}, this run {value}; "
                        "use that value, or choose another run.dir."
                    )
        return newest

    def _prepare_corpus(self) -> Corpus:
        """Tokenise on one process of each node while the others wait, then open the result."""
        data = self.config.data
        tokenizer = Path(data.tokenizer) if data.tokenizer else None
        cache = Path(data.cache) if data.cache else None
        if self.world.local_rank == 0:
            log.info("preparing %s", data.source)
            prepare(data.source, tokenizer, data.tokenizer_vocab_size, cache)
        dist.barrier()
        corpus = prepare(data.source, tokenizer, data.tokenizer_vocab_size, cache)
        if corpus.shard.vocab_size > self.model_config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {corpus.shard.vocab_size} pieces, more than model.vocab_size="
                f"{self.model_config.vocab_size}; give a smaller tokenizer or a larger variant."
            )
        return corpus

    def _describe(self, sizes: tuple[int, int], resume_from: Path | None) -> None:
        config, model = self.config, self.model_config
        shard = self.corpus.shard
        sliding = sum(kind == "sliding_attention" for kind in model.layer_types)
        kernel = kernel_for(self.device.type).__name__
        parameters = sum(p.numel() for p in self.model.parameters())
        log.info(
            "%s: %s parameters | %d %s ranks, dp_replicate %d x dp_shard %d | compute %s, masters float32",
            config.model.name,  # type: ignore[attr-defined]
            f"{parameters:,}",
            self.world.size,
            self.device.type,
            *sizes,
            str(self.dtype).removeprefix("torch."),
        )
        log.info(
            "kernels: attention %s (%d sliding layers of window %d, %d full) | experts %s | loss chunked linear "
            "cross entropy | activation checkpoint %s",
            kernel,
            sliding,
            model.sliding_window,
            model.num_hidden_layers - sliding,
            "torch grouped_mm" if model.enable_moe_block else "none",
            config.activation_checkpoint.mode,
        )
        log.info(
            "data: %s documents, %s tokens, %d pieces | %d sequences of %d a step, %d x %d a rank",
            f"{shard.num_documents:,}",
            f"{len(shard.tokens):,}",
            shard.vocab_size,
            config.train.global_batch_size,
            config.data.sequence_length,
            config.train.global_batch_size // (self.micro_batch_size * self.world.size),
            self.micro_batch_size,
        )
        if resume_from is not None:
            log.info("resumed from %s at step %d", resume_from, self.step)


def _compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def run(config: Config, world: World, device: torch.device) -> dict[str, Any]:
    """Build a Trainer, train, and say where it ended; for callers that hold a process group already."""
    trainer = Trainer(config, world, device)
    trainer.train()
    return {"step": trainer.step, "tokens_seen": trainer.tokens_seen}


__all__ = ["Gemma4", "Trainer", "run"]
