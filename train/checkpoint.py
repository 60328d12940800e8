"""Checkpoints that are whole or not there.

A step is written to `.step_N.partial`, checksummed, and becomes `step_N` by one rename once its
manifest is complete; `LATEST` moves after that, and old ones go last. Loading verifies the
manifest, names what is damaged and falls back to the newest whole one. Tensors go through
torch.distributed.checkpoint, so any mesh may load what any mesh saved. There is no random
state to keep: data, schedule and samples are functions of (config, step).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.utils import canonical_fqn

from model.errors import UserError
from model.init import initialised_tensors
from parallel.agree import RankError, from_all, on_rank_0, together
from parallel.world import is_lost_rank
from train.checkpoint_reader import TensorReader
from train.files import replace_file, sync_folder
from train.manifest import MANIFEST, STATE, checkpoints, damage, entry, is_ours, leftovers

log = logging.getLogger("gemwright")

LATEST = "LATEST"
_VISIBLE_SECONDS = 10  # a network file system may show a new file late
_PATIENCE_SECONDS = 3  # the same, for files of an earlier job


class Checkpointer:
    """One run's checkpoints in an existing folder. All methods are collective unless they say otherwise."""

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool, writing: bool = True) -> None:
        """Raises `UserError` if the ranks do not see one and the same folder.

        writing: whether this is the run that owns the folder, and may clear away what a kill left behind.
        """
        self.folder, self.keep, self.asynchronous, self._writing = folder, keep, asynchronous, writing
        self.rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._checksums = ThreadPoolExecutor(1)  # off the training thread
        self._pending: tuple[Path, Future[dict[str, Any]]] | None = None
        self._damaged: set[str] = set()
        self._kept: set[Path] = set()
        if writing:
            self._require_shared_folder()
            on_rank_0(self._clear, self._group)  # what a killed save or prune left behind

    def _require_shared_folder(self) -> None:
        token = self.folder / on_rank_0(lambda: Path(tempfile.mkdtemp(".shared", ".", self.folder)).name, self._group)
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not token.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = from_all(token.exists(), self._group)
        on_rank_0(token.rmdir, self._group)
        if not all(seen):
            raise UserError(
                f"{self.folder} on rank 0 is not what rank {seen.index(False)} sees there; "
                "put run.dir on a file system that all nodes share."
            )

    def _clear(self) -> None:
        """Remove what killed saves and removals left. What is not ours, or cannot be removed, is named and stays."""
        for leftover in leftovers(self.folder):
            try:
                if not is_ours(leftover):
                    raise OSError("it is a link, or holds no state.json of a run")
                shutil.rmtree(leftover)
            except OSError as error:
                self._warn(leftover, error)

    def _warn(self, path: Path, error: OSError) -> None:
        if path not in self._kept:
            self._kept.add(path)
            log.warning("%s cannot be cleared away (%s); it is left as it is", path, error.strerror or error)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint; asynchronous ones are committed by a later `commit`.

        Raises `UserError` if it cannot be written; earlier checkpoints stay as they were.
        """
        self.commit()
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        tensors = _tensors(model, optimizer)
        self._require_finite(tensors, step)
        try:
            on_rank_0(lambda: _begin(partial, state), self._group)
            if self.asynchronous:
                written = dcp.async_save(tensors, checkpoint_id=partial, process_group=self._group)
                assert isinstance(written, Future)
            else:
                dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
                written = Future()
                written.set_result(None)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            cause = _root_cause(error)
            raise (cause if is_lost_rank(cause) else self._failure(partial, _said(cause))) from None
        self._pending = (partial, self._checksums.submit(_own_files, written, partial, self.rank))
        if not self.asynchronous:
            self.commit()

    @property
    def written(self) -> bool:
        """Whether this rank has written all of a pending checkpoint. Not collective."""
        return self._pending is not None and self._pending[1].done()

    def commit(self) -> None:
        """Finish the pending checkpoint, if any, waiting for it as long as it takes."""
        if self._pending is None:
            return
        (partial, pending), self._pending = self._pending, None
        try:
            shares = from_all(together(pending.result, self._group), self._group)
            on_rank_0(lambda: self._publish(partial, shares), self._group)
        except RankError as error:
            raise self._failure(partial, str(error)) from None

    def _publish(self, partial: Path, shares: list[dict[str, Any]]) -> None:
        """On rank 0. A kill between any two lines leaves every committed checkpoint as it was."""
        files = {name: entry for share in shares for name, entry in share.items()}
        replace_file(partial / MANIFEST, json.dumps({"files": files}, indent=1))
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        if final.exists():  # a damaged one, or it would have been gone on from
            final.rename(final.with_name(f".{final.name}.replaced"))
        partial.rename(final)
        sync_folder(self.folder)
        replace_file(self.folder / LATEST, final.name)
        self._damaged.discard(final.name)
        for old in self._superfluous(final):
            try:
                if not is_ours(old):
                    raise OSError("it is a link, or holds no state.json of a run")
                old.rename(old.with_name(f".{old.name}.old"))
            except OSError as error:
                self._warn(old, error)
        self._clear()

    def _superfluous(self, newest: Path) -> list[Path]:
        """Checkpoints beyond those to keep: damaged ones first, then the oldest, never what was just written."""
        others = [path for path in checkpoints(self.folder) if path.name != newest.name]
        others.sort(key=lambda path: (path.name not in self._damaged, path.name))
        return others[: max(len(others) - (self.keep - 1), 0)]

    def _require_finite(self, tensors: dict[str, Any], step: int) -> None:
        """Raises `UserError` if any rank has values that are not finite, which no later start could go on from."""
        found = [name for name in from_all(_first_not_finite(tensors), self._group) if name is not None]
        if found:
            raise UserError(
                f"{found[0]} holds values that are not finite after step {step}, so this step is not saved; lower "
                "optimizer.lr and start again: the run goes on from its last checkpoint."
            )

    def _failure(self, partial: Path, cause: str) -> UserError:
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        name = partial.name.removeprefix(".").removesuffix(".partial")
        return UserError(
            f"checkpoint {name} could not be written ({cause}); make room or rights in {self.folder} and start again: "
            "the run goes on from the checkpoint before."
        )

    def newest(self) -> Path | None:
        """The newest whole checkpoint, or None if there is none; damaged ones are named and passed over.

        Raises `UserError` if there are checkpoints and all are damaged: a fresh start would bury them.
        """
        found = on_rank_0(lambda: checkpoints(self.folder), self._group)  # nodes' listings may differ for a moment
        for folder in reversed(found):
            found_damage = self._damage(folder)
            if found_damage is None:
                if self.rank == 0 and self._writing:
                    replace_file(self.folder / LATEST, folder.name)  # a kill may have come between the rename and this
                return folder
            self._damaged.add(folder.name)
            log.warning("checkpoint %s is damaged (%s); trying the one before", folder.name, found_damage)
        if found:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged; restore one, or choose another run.dir to start afresh."
            )
        return None

    def verified(self, folder: Path) -> Path:
        """The folder itself. Raises `UserError` naming the damage if it is no whole checkpoint."""
        read_state(folder)
        found = self._damage(folder)
        if found is not None:
            raise UserError(f"checkpoint {folder} is damaged ({found}); give another, or run.resume=auto.")
        return folder

    def load(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, newly_trained: Collection[str] = ()
    ) -> dict[str, Any]:
        """Load the tensors of a verified checkpoint in place and return the state saved beside them.

        newly_trained: modules that were frozen when it was saved; their optimizer state stays as it is.
        """
        tensors = _tensors(model, optimizer)
        state = tensors["optimizer"]["state"]
        for name in [name for name in state if name.startswith(tuple(f"{module}." for module in newly_trained))]:
            del state[name]
        reader = TensorReader(folder)
        reader.read_metadata()  # a refusal is one sentence here, and a report of all ranks from within torch
        dcp.load(tensors, storage_reader=reader, process_group=self._group)
        found = [name for name in from_all(_first_not_finite(tensors), self._group) if name is not None]
        if found:
            raise UserError(
                f"{found[0]} of checkpoint {folder} holds values that are not finite; delete that folder to go on from "
                "the one before."
            )
        return read_state(folder)

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Each rank checks its share of the files."""
        found = from_all(damage(folder, self.rank, dist.get_world_size(), _PATIENCE_SECONDS), self._group)
        return next((said for said in found if said), None)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters, persistent buffers and optimizer state by name, whatever layer wraps or shards them.

    Learning rates and decay are functions of (config, step) and not kept.
    """
    named = {canonical_fqn(name): parameter for name, parameter in model.named_parameters()}
    tensors = {canonical_fqn(name): tensor.detach() for name, tensor in initialised_tensors(model)}
    state = {name: dict(optimizer.state[p]) for name, p in named.items() if p in optimizer.state}
    return {"model": tensors, "optimizer": {"state": state}}


def read_state(folder: Path) -> dict[str, Any]:
    """What was saved beside the tensors. Raises `UserError` if there is no checkpoint."""
    try:
        state = json.loads((folder / STATE).read_text())
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({error}); give a folder like RUN/checkpoints/step_00000100."
        ) from None


def _begin(partial: Path, state: dict[str, Any]) -> None:
    partial.mkdir(parents=True, exist_ok=True)
    replace_file(partial / STATE, json.dumps(state, indent=1))


def _own_files(written: Future, folder: Path, rank: int) -> dict[str, Any]:
    """Size and checksum of the files a rank wrote, once it has; rank 0 also answers for the shared ones."""
    try:
        written.result()
    except BaseException as error:  # CheckpointException is no Exception
        raise OSError(_said(_root_cause(error))) from None
    own = [
        p for p in folder.iterdir() if p.name.startswith(f"__{rank}_") or (rank == 0 and not p.name.startswith("__"))
    ]
    return {p.name: entry(p) for p in own}


def _first_not_finite(tensors: dict[str, Any], prefix: str = "") -> str | None:
    """The name of a tensor of which this rank's part is not finite, if there is one."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            found = _first_not_finite(value, f"{prefix}{name}.")
            if found is not None:
                return found
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            local = value.to_local() if isinstance(value, DTensor) else value
            if not bool(torch.isfinite(local).all()):
                return prefix + name
    return None


def _root_cause(error: BaseException) -> BaseException:
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "inline_container" in text:  # torch's writer does not say why it got no further
        return "a file could not be written to its end, as on a full disk"
    return text[:200] or type(error).__name__
