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
import time
import uuid
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn

from model.errors import UserError
from model.init import initialised_tensors
from parallel.mesh import is_lost_rank

log = logging.getLogger("gemwright")

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "LATEST"
_NAME = re.compile(r"step_\d{8}")
_VISIBLE_SECONDS = 10  # a network file system may show a new file late


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

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool, writing: bool = True) -> None:
        """Raises `CheckpointError` if the ranks do not see one and the same folder.

        writing: whether this is the run that owns the folder, and may clear away what a kill left behind.
        """
        self.folder, self.keep, self.asynchronous, self._writing = folder, keep, asynchronous, writing
        self.rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Path, _Background] | None = None
        if writing:
            self._require_shared_folder()
        if writing and self.rank == 0:  # what a killed save or prune left behind
            for leftover in folder.glob(".step_*"):
                shutil.rmtree(leftover)
        dist.barrier(self._group)

    def _require_shared_folder(self) -> None:
        token = self.folder / f".shared-{self._from_rank_0(uuid.uuid4().hex)}"
        if self.rank == 0:
            token.touch()
        dist.barrier(self._group)
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not token.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = self._from_all(token.exists())
        if self.rank == 0:
            token.unlink()
        if not all(seen):
            raise CheckpointError(
                f"{self.folder} on rank 0 is not what rank {seen.index(False)} sees there; "
                "put run.dir on a file system that all nodes share."
            )

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
            cause = _root_cause(error)
            raise (cause if is_lost_rank(cause) else self._failure(partial, _said(cause))) from None
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
        failure = None if background.error is None else _said(_root_cause(background.error))
        reports = self._from_all((background.files, failure))
        failure = next((f for _, f in reports if f is not None), None)
        if failure is None and self.rank == 0:
            files = {name: entry for own, _ in reports for name, entry in own.items()}
            try:
                self._publish(partial, files)
            except OSError as error:
                failure = str(error)
        failure = self._from_rank_0(failure)
        if failure is not None:
            raise self._failure(partial, failure)

    def _from_rank_0(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _from_all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _publish(self, partial: Path, files: dict[str, Any]) -> None:
        """On rank 0. A kill between any two lines leaves every committed checkpoint as it was."""
        _write(partial / MANIFEST, json.dumps({"files": files}, indent=1))
        _sync(partial)
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        if final.exists():  # a damaged one, or it would have been gone on from
            final.rename(final.with_name(f".{final.name}.replaced"))
        partial.rename(final)
        _sync(self.folder)
        self._point_latest(final)
        for old in _complete(self.folder)[: -self.keep]:
            old.rename(old.with_name(f".{old.name}.old"))
        for gone in self.folder.glob(".step_*"):
            shutil.rmtree(gone)

    def _point_latest(self, newest: Path) -> None:
        _write(self.folder / f".{LATEST}", newest.name)
        os.replace(self.folder / f".{LATEST}", self.folder / LATEST)
        _sync(self.folder)

    def _failure(self, partial: Path, cause: str) -> CheckpointError:
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.name.removeprefix(".").removesuffix(".partial")
        return CheckpointError(
            f"checkpoint {name} could not be written ({cause}); make room or rights in {self.folder} and start again: "
            "the run goes on from the checkpoint before."
        )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None if there is none; damaged ones are named and passed over.

        Raises `CheckpointError` if there are checkpoints and all are damaged: a fresh start would bury them.
        """
        found = self._from_rank_0(_complete(self.folder))  # listings may differ between nodes for a moment
        for folder in reversed(found):
            damage = self._damage(folder)
            if damage is None:
                if self.rank == 0 and self._writing:
                    self._point_latest(folder)  # a kill may have come between the rename and this
                return folder
            log.warning("checkpoint %s is damaged (%s); trying the one before", folder.name, damage)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; restore one, or choose another run.dir to start afresh."
            )
        return None

    def verified(self, folder: Path) -> Path:
        """The folder itself. Raises `CheckpointError` naming the damage if it is no whole checkpoint."""
        read_state(folder)
        damage = self._damage(folder)
        if damage is not None:
            raise CheckpointError(f"checkpoint {folder} is damaged ({damage}); give another, or run.resume=auto.")
        return folder

    def load(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, newly_trained: Collection[str] = ()
    ) -> dict[str, Any]:
        """Load the tensors of a verified checkpoint in place and return the state saved beside them.

        newly_trained: top modules that were frozen when it was saved; their optimizer state stays as it is.
        """
        tensors = _tensors(model, optimizer)
        state = tensors["optimizer"]["state"]
        for name in [name for name in state if name.partition(".")[0] in newly_trained]:
            del state[name]
        dcp.load(tensors, checkpoint_id=folder, process_group=self._group)
        return read_state(folder)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Each rank checks its share of the files."""
        found = self._from_all(_damage(folder, part=self.rank, parts=dist.get_world_size()))
        return next((damage for damage in found if damage), None)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters, persistent buffers and optimizer state by name, whatever layer wraps or shards them.

    Learning rates and decay are functions of (config, step) and not kept.
    """
    named = {canonical_fqn(name): parameter for name, parameter in model.named_parameters()}
    tensors = {canonical_fqn(name): tensor.detach() for name, tensor in initialised_tensors(model)}
    state = {name: dict(optimizer.state[p]) for name, p in named.items() if p in optimizer.state}
    return {"model": tensors, "optimizer": {"state": state}}


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


def _damage(folder: Path, part: int, parts: int) -> str | None:
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


def _root_cause(error: BaseException) -> BaseException:
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "inline_container" in text:  # torch's writer does not say why it got no further
        return "a file could not be written to its end, as on a full disk"
    return text[:200] or type(error).__name__
