"""Weights of a released checkpoint folder: which tensor lies where, and streaming slices of them into memory.

Our names are those on disk without their prefix, so one table of prefixes is the whole key map
and its inverse. Headers are checked against the model before a byte of a tensor is read; each
tensor is then read once, only the rows that are wanted, a piece at a time. See docs/gemma4.md 11.1, 11.2.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import Gemma4Config
from model.encoders.config import ENCODERS
from model.errors import UserError
from model.gemma4 import Gemma4
from model.hf.config import read_json, unread_fields
from model.init import Slice, initialised_tensors

log = logging.getLogger("gemwright")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WHOLE_PREFIXES = (("", "model."),)
"""(ours, on disk) of checkpoints that hold the whole model."""
TEXT_PREFIXES = (("language_model.", "model."),)
"""(ours, on disk) of checkpoints that hold the text decoder alone."""

_KINDS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Names of files of weights, which are read or named as passed over."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ELEMENTS_PER_PIECE = 1 << 24
_ELEMENTS_MAPPED = 1 << 28
_IGNORED = re.compile(r"(^|\.)(lm_head\.weight|\w*inv_freq|embed_scale|inv_timescales|softcap)$")
_CONSUMER_KV = re.compile(r"^language_model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.weight$")


class WeightsError(UserError):
    """A checkpoint folder that cannot be loaded."""


@dataclass(frozen=True)
class Entry:
    """One tensor on disk."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def disk_key(name: str, *, text_only: bool) -> str:
    """Key on disk of one of our tensors."""
    return _swap(name, TEXT_PREFIXES if text_only else WHOLE_PREFIXES)


def our_name(key: str, *, text_only: bool) -> str:
    """The inverse of `disk_key`."""
    return _swap(key, [(disk, ours) for ours, disk in (TEXT_PREFIXES if text_only else WHOLE_PREFIXES)])


class Weights:
    """The tensors of a folder by our names. Raises `WeightsError` if files are missing or damaged.

    What of the folder is not read is named; with `strict` it is an error.
    """

    def __init__(self, folder: Path, config: Gemma4Config, *, strict: bool = False) -> None:
        self.folder, self.config = folder, config
        files = _files(folder)
        by_key = {entry.key: entry for file, keys in files.items() for entry in _read_header(file, keys)}
        unused = "; ".join(filter(None, (_unused_files(folder, files), _unread_fields(folder))))
        if unused and strict:
            raise WeightsError(f"{folder} holds what nothing reads ({unused}); drop it, or set model.strict=false.")
        if unused:
            log.warning("%s: %s", folder, unused)
        self.text_only = not any(key.startswith("model.language_model.") for key in by_key)
        self.entries = {our_name(key, text_only=self.text_only): entry for key, entry in by_key.items()}

    @cached_property
    def _wanted(self) -> dict[str, torch.Size]:
        """Shapes of the whole model's tensors, of which a rank may hold those of some layers only."""
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in initialised_tensors(Gemma4(self.config))}

    def _check(self) -> None:
        """Every tensor of the model is there in its shape, and nothing else is that should have a place."""
        for name, shape in self._wanted.items():
            entry = self.entries.get(name)
            if entry is None:
                raise WeightsError(self._missing(disk_key(name, text_only=self.text_only)))
            if entry.shape != tuple(shape):
                raise WeightsError(
                    f"{entry.key} in {entry.file} has shape {list(entry.shape)} where config.json makes it "
                    f"{list(shape)}; config and weights are of different models."
                )
        for name, entry in self.entries.items():
            if name not in self._wanted and not _may_be_left_out(name, self.config):
                raise WeightsError(
                    f"{entry.key} in {entry.file} has no place in this model; "
                    "config and weights are of different models."
                )

    def _missing(self, key: str) -> str:
        """Why a tensor is not there: the checkpoint lacks it, or has other prefixes."""
        tail = key.removeprefix("model.").removeprefix("language_model.")
        other = next((entry.key for entry in self.entries.values() if entry.key.endswith(tail)), None)
        if other is None:
            return f"{self.folder} has no tensor {key}; fetch the checkpoint again."
        return (
            f"{self.folder} has {other} where {key} is read; its keys have other prefixes than a released checkpoint: "
            "save it again with save_pretrained of transformers, or rename them."
        )

    def _require_tied(self) -> None:
        """Every Gemma 4 writes with its token table; a head of its own in the file would be lost."""
        head = next((entry for name, entry in self.entries.items() if name.endswith("lm_head.weight")), None)
        table = self.entries.get("language_model.embed_tokens.weight")
        if head is None or table is None:
            return
        with safe_open(head.file, framework="pt") as heads, safe_open(table.file, framework="pt") as tables:
            first, second = heads.get_slice(head.key), tables.get_slice(table.key)
            rows = max(1, _ELEMENTS_PER_PIECE // max(1, table.shape[-1]))
            same = head.shape == table.shape and all(
                torch.equal(first[start : start + rows], second[start : start + rows])
                for start in range(0, table.shape[0], rows)
            )
        if not same:
            raise WeightsError(
                f"{head.key} in {head.file} is another matrix than {table.key}, which Gemma 4 uses in its place; "
                "remove it from the file if it is a leftover, else this is another model."
            )

    def fill(self, slices: list[Slice]) -> None:
        """Read slices of the model's tensors, file after file; nothing is read if any tensor does not fit."""
        self._check()
        self._require_tied()
        by_file: dict[Path, list[Slice]] = {}
        unknown = [part.name for part in slices if part.name not in self.entries]
        if unknown:
            raise WeightsError(
                f"{self.folder} has no {unknown[0]}, which was added to its model; give values to what is added first."
            )
        for part in slices:
            by_file.setdefault(self.entries[part.name].file, []).append(part)
        for file, parts in by_file.items():
            try:
                for together in _batches(parts):
                    with safe_open(file, framework="pt") as opened:
                        for part in together:
                            _copy(opened, self.entries[part.name], part)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file} cannot be read ({error}); fetch it again.") from None


def _batches(parts: list[Slice]) -> Iterator[list[Slice]]:
    """Groups of slices of one file, which is opened anew for each: pages that were read count as memory till then."""
    batch: list[Slice] = []
    for part in parts:
        batch.append(part)
        if sum(p.local.numel() for p in batch) > _ELEMENTS_MAPPED:
            yield batch
            batch = []
    yield batch


@torch.no_grad()
def _copy(opened: Any, entry: Entry, part: Slice) -> None:
    local = part.local
    if local.numel() == 0:
        return
    if local.dim() == 0:
        local.copy_(opened.get_tensor(entry.key))
        return
    source = opened.get_slice(entry.key)
    columns = tuple(slice(o, o + n) for o, n in zip(part.offset[1:], local.shape[1:], strict=True))
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, local[0].numel()))
    for start in range(0, local.shape[0], rows):
        stop = min(start + rows, local.shape[0])
        local[start:stop].copy_(source[(slice(part.offset[0] + start, part.offset[0] + stop), *columns)])


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Files that hold weights, and the keys the index promises in each (None where there is no index)."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder; give one that holds config.json and {SINGLE} or {INDEX}.")
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # what transformers opens too
        return {folder / SINGLE: None}
    if not index.is_file():
        shards = sorted(folder.glob("*.safetensors"))
        if shards:
            raise WeightsError(f"{folder} holds {len(shards)} weight shards but no {INDEX}; fetch that file too.")
        raise WeightsError(f"{folder} holds no {SINGLE} and no {INDEX}; give a folder with safetensors weights.")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        promised: dict[Path, set[str] | None] = {}
        for key, name in weight_map.items():
            keys = promised.setdefault(folder / name, set())
            assert keys is not None
            keys.add(key)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{index} is no index of weights ({error!r}); fetch it again.") from None
    return promised


def _unused_files(folder: Path, used: Iterable[Path]) -> str:
    """Files of weights that are passed over."""
    names = {file.name for file in used}
    found = sorted({path.name for pattern in _KINDS for path in folder.glob(pattern)} - names - {INDEX})
    return f"read from {min(names)}; {_listed(found)} not read" if found else ""


def _unread_fields(folder: Path) -> str:
    """Fields of config.json that are passed over."""
    raw = read_json(folder / "config.json")
    found = unread_fields(raw, Gemma4Config.from_hf(raw))
    return f"config.json has {_listed(found)}, which nothing reads" if found else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_header(file: Path, promised: set[str] | None) -> Iterator[Entry]:
    if not file.is_file():
        raise WeightsError(f"{file} is missing, though {INDEX} names it; fetch it.")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
            lacking = (promised or keys) - keys
            if lacking:
                raise WeightsError(
                    f"{file} has no tensor {min(lacking)}, though {INDEX} promises it; fetch both again."
                )
            for key in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(key)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise WeightsError(
                        f"{key} in {file} is of dtype {dtype}; weights must be {', '.join(_DTYPES)}: "
                        "give the checkpoint that is not quantised."
                    )
                yield Entry(key, file, tuple(part.get_shape()), _DTYPES[dtype])
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is damaged or cut short ({error}); fetch it again.") from None


def _may_be_left_out(name: str, config: Gemma4Config) -> bool:
    """Tensors with no part in the result: tied head, recomputed tables, consumers' dead K and V, dropped encoders."""
    if _IGNORED.search(name):
        return True
    consumer = _CONSUMER_KV.match(name)
    if consumer:
        index = int(consumer[1])
        return index < config.num_hidden_layers and config.layer(index).is_kv_consumer
    return any(name.partition(".")[0] in parts and getattr(config, kind) is None for kind, parts in ENCODERS.items())


def _swap(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
