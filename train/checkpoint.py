"""Checkpoints that are whole or not there.

A step is written to `.step_N.partial`, checksummed, and becomes `step_N` by one rename once its
manifest is complete; `LATEST` moves after that, and old ones go last. Loading verifies the
manifest, names what is damaged and falls back to the newest whole one. Tensors go through
torch.distributed.checkpoint, so any mesh may load what any mesh saved. There is no random
state to keep: data, schedule and samples are functions of (config, step).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model.errors import UserError

log = logging.getLogger("gemwright")

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "LATEST"
_NAME = re.compile(r"step_(\d{8})")


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class _Background:
    """Checksums this rank's files once the writer is done, off the training thread."""

    def __init__(self, written: Future, folder: Path, rank: int) -> None:
        self.files: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(written, folder, rank), daemon=True)
        self.thread.start()

    def _run(self, written: Future, folder: Path, rank: int) -> None:
        try:
            written.result()
            self.files = _own_files(folder, rank)
        except BaseException as error:
            self.error = error


class Checkpointer:
    """One run's checkpoints in an existing folder. All methods are collective unless they say otherwise."""

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self.rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Path, _Background] | None = None
        if self.rank == 0:
            for leftover in folder.glob(".*.partial"):
                shutil.rmtree(leftover)
        dist.barrier(self._group)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint; asynchronous ones are committed by a later `commit`.

        Raises `CheckpointError` if it cannot be written; earlier checkpoints stay as they were.
        """
        self.commit()
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        tensors = _tensors(model, optimizer)
        try:
            if self.rank == 0:
                partial.mkdir(parents=True, exist_ok=True)
                _write(partial / STATE, json.dumps(state, indent=1))
            if self.asynchronous:
                future = dcp.async_save(tensors, checkpoint_id=partial, process_group=self._group)
                assert isinstance(future, Future)
            else:
                dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
                future = Future()
                future.set_result(None)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            raise self._failure(partial, error) from None
        self._pending = (partial, _Background(future, partial, self.rank))
        if not self.asynchronous:
            self.commit()

    @property
    def written(self) -> bool:
        """Whether this rank has written all of a pending checkpoint. Not collective."""
        return self._pending is not None and not self._pending[1].thread.is_alive()

    def commit(self) -> None:
        """Finish the pending checkpoint, if any, waiting for it as long as it takes."""
        if self._pending is None:
            return
        partial, background = self._pending
        self._pending = None
        background.thread.join()
        reports: list[Any] = [None] * dist.get_world_size()
        failure = None if background.error is None else _root_cause(background.error)
        dist.all_gather_object(reports, (background.files, failure), group=self._group)
        failure = next((f for _, f in reports if f is not None), None)
        if failure is None and self.rank == 0:
            files = {name: entry for own, _ in reports for name, entry in own.items()}
            try:
                self._publish(partial, files)
            except OSError as error:
                failure = str(error)
        if self._first(failure) is not None:
            raise self._failure(partial, RuntimeError(self._first(failure)))

    def _first(self, failure: str | None) -> str | None:
        """Rank 0's word on what happened."""
        box = [failure]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _publish(self, partial: Path, files: dict[str, Any]) -> None:
        _write(partial / MANIFEST, json.dumps({"files": files}, indent=1))
        _sync(partial)
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        if final.exists():  # damaged, or it would not have been written again
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.folder)
        _write(self.folder / f".{LATEST}", final.name)
        os.replace(self.folder / f".{LATEST}", self.folder / LATEST)
        _sync(self.folder)
        for old in _complete(self.folder)[: -self.keep]:
            (old / MANIFEST).unlink()  # from here on it does not count, even half deleted
            shutil.rmtree(old)

    def _failure(self, partial: Path, error: BaseException) -> CheckpointError:
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.name.removeprefix(".").removesuffix(".partial")
        cause = _root_cause(error)
        return CheckpointError(
            f"checkpoint {name} could not be written ({cause}); make room or rights in {self.folder} and start again: "
            "the run goes on from the checkpoint before."
        )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None if there is none; damaged ones are named and passed over.

        Raises `CheckpointError` if there are checkpoints and all are damaged: a fresh start would bury them.
        """
        found = _complete(self.folder)
        for folder in reversed(found):
            damage = self._verify(folder)
            if damage is None:
                return folder
            log.warning("checkpoint %s is damaged (%s); trying the one before", folder.name, damage)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; restore one, or choose another run.dir to start afresh."
            )
        return None

    def load(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Load tensors in place and return the saved state. Raises `CheckpointError` naming damaged files."""
        damage = self._verify(folder)
        if damage is not None:
            raise CheckpointError(f"checkpoint {folder} is damaged ({damage}); give another, or run.resume=auto.")
        tensors = _tensors(model, optimizer)
        dcp.load(tensors, checkpoint_id=folder, process_group=self._group)
        set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
        return read_state(folder)

    def _verify(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Each rank checks its share of the files."""
        found = _damage(folder, part=self.rank, parts=dist.get_world_size())
        reports: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, found, group=self._group)
        return next((report for report in reports if report), None)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def read_state(folder: Path) -> dict[str, Any]:
    """What was saved beside the tensors. Raises `CheckpointError` if there is no checkpoint."""
    try:
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder} cannot be read ({error}); give a folder like RUN/checkpoints/step_00000100."
        ) from None


def _complete(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / MANIFEST).exists())


def _damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first file that disagrees with the manifest, among every `parts`-th one."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, entry in sorted(files.items())[part::parts]:
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _checksum(path) != entry["sha256"]:
            return f"{name} has another checksum"
    return None


def _own_files(folder: Path, rank: int) -> dict[str, Any]:
    """Size and checksum of the files a rank wrote; rank 0 also answers for the shared ones."""
    own = [
        p for p in folder.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and not p.name.startswith("__"))
    ]
    return {p.name: {"bytes": p.stat().st_size, "sha256": _checksum(p)} for p in own}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__
