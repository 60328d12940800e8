"""A training checkpoint as a folder that transformers and vLLM open.

Written by any number of processes from a checkpoint of any mesh, one output file at a time, so
memory holds one file's tensors. Everything is written aside, read back against the manifest,
and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data.chat.template import chat_template, template_size
from data.tokenizer import BOS, STOPS
from model import Gemma4Config, UserError
from model.hf.config import config_to_hf
from model.hf.weights import INDEX, SINGLE, disk_key
from parallel.agree import RankError, from_all, on_rank_0, together
from train.checkpoint import read_state
from train.checkpoint_reader import TensorReader
from train.manifest import MANIFEST as CHECKPOINT_MANIFEST
from train.manifest import checksum
from train.origin import DTYPES, KEPT_FILES, Origin, learned_turns, read_json

log = logging.getLogger("gemwright")

MANIFEST = "gemwright_export.json"
FILE_BYTES = 5 * 10**9
_READ_BYTES = 10**9
"""Float32 masters read at once, before they are cast."""
_MODEL = "model."


def export(
    checkpoint: Path,
    out: Path,
    config: Gemma4Config,
    *,
    tokenizer: Path | None = None,
    origin: Path | None = None,
    dtype: str = "auto",
    file_bytes: int = FILE_BYTES,
    replace: bool = False,
) -> Path:
    """Write `out`. With a process group, every rank must call it and writes its share of the files.

    tokenizer: a `tokenizer.json`; origin: the folder `Origin.remember` filled; dtype: of all
    tensors, or auto: as they came, and bfloat16 for a run from scratch; replace: an `out` made
    from another checkpoint. One made from this very checkpoint stays. Raises `UserError`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    out = out.parent.resolve() / out.name  # a link itself is not followed
    aside = out.with_name(f".{out.name}.partial")
    tensors: dict[str, Any] = {}
    try:
        if not on_rank_0(lambda: _begin(checkpoint, out, aside, replace)):
            return out
        files = together(lambda: _Files(checkpoint, config, Origin(origin) if origin else None, dtype, file_bytes))
        for turn in range(0, len(files.names), world):
            tensors |= together(partial(files.write, aside, turn + rank))
        for share in from_all(tensors):
            tensors |= share
        on_rank_0(lambda: files.finish(aside, out, tensors, tokenizer))
    except RankError as error:
        if rank == 0 and (aside / MANIFEST).is_file():
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"export to {out} failed ({error}); mend it and export again, the checkpoint is untouched."
        ) from None
    return out


def _begin(checkpoint: Path, out: Path, aside: Path, replace: bool) -> bool:
    """Whether there is anything to do; then `aside` is a folder with an unfinished manifest, by which it is ours."""
    for path in (out, aside):
        if path.is_symlink():
            raise FileExistsError(f"{path} is a link; choose another folder or remove it")
        if path.exists() and not is_export(path):
            raise FileExistsError(f"{path} is there already, and no export; choose another folder or remove it")
    if out.exists():
        same = read_json(out / MANIFEST).get("checkpoint_digest") == _digest(checkpoint)
        broken = damaged_file(out)
        if same and broken is None:
            return False
        if broken is not None:
            log.warning("%s is damaged (%s); it is written anew", out, broken)
        elif not replace:
            raise FileExistsError(f"{out} holds the export of another checkpoint; choose another folder or remove it")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    _write_json(aside / MANIFEST, {"unfinished": True})
    return True


def is_export(folder: Path) -> bool:
    """Whether a folder is empty, or was written by `export`, as its manifest shows."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    found = read_json(folder / MANIFEST)
    return not any(folder.iterdir()) or "checkpoint_digest" in found or found.get("unfinished") is True


def damaged_file(folder: Path) -> str | None:
    """A file of an export that is not what its manifest says, or None if all are."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        return f"{MANIFEST} lists no files"
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if checksum(folder / name) != sha256:
            return f"{name} has another checksum"
    return None


def _digest(checkpoint: Path) -> str:
    """Names one checkpoint by its content."""
    return hashlib.sha256((checkpoint / CHECKPOINT_MANIFEST).read_bytes()).hexdigest()


class _Files:
    """Which tensors go into which file."""

    def __init__(
        self, checkpoint: Path, config: Gemma4Config, origin: Origin | None, dtype: str, file_bytes: int
    ) -> None:
        self.checkpoint, self.config, self.origin = checkpoint, config, origin
        self.text_only = config.vision is None and config.audio is None
        stored = TensorReader(checkpoint).read_metadata().state_dict_metadata
        self.shapes = {
            name.removeprefix(_MODEL): entry.size
            for name, entry in stored.items()
            if name.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        self.dtypes = {name: self._dtype(name, dtype) for name in self.shapes}
        self.names: list[list[str]] = [[]]
        room = file_bytes
        for name, shape in self.shapes.items():
            size = shape.numel() * self.dtypes[name].itemsize
            if size > room and self.names[-1]:
                self.names.append([])
                room = file_bytes
            self.names[-1].append(name)
            room -= size

    def _dtype(self, name: str, wanted: str) -> torch.dtype:
        if wanted != "auto":
            return DTYPES[wanted]
        return (self.origin.dtypes if self.origin else {}).get(name, torch.bfloat16)

    def file_name(self, number: int) -> str:
        count = len(self.names)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def write(self, folder: Path, number: int) -> dict[str, Any]:
        """Read one file's tensors from the checkpoint and write them; their entries of the manifest."""
        if number >= len(self.names):
            return {}
        written: dict[str, Tensor] = {}
        pending: dict[str, Tensor] = {}
        for name in self.names[number]:
            pending[name] = torch.empty(self.shapes[name])
            if sum(tensor.nbytes for tensor in pending.values()) > _READ_BYTES or name == self.names[number][-1]:
                with warnings.catch_warnings():  # it says that it reads alone, which is what is asked of it
                    warnings.simplefilter("ignore")
                    reader = TensorReader(self.checkpoint)
                    dcp.load({_MODEL.rstrip("."): pending}, storage_reader=reader, no_dist=True)
                while pending:
                    read, tensor = pending.popitem()
                    written[disk_key(read, text_only=self.text_only)] = tensor.to(self.dtypes[read])
                    del tensor
        file = folder / self.file_name(number)
        save_file(written, file, metadata={"format": "pt"})
        file.chmod(0o644)  # whoever serves it need not be who trained it
        entries = {key: _entry(tensor, file.name) for key, tensor in written.items()}
        del written
        with safe_open(file, framework="pt") as opened:  # what a reader will see, against what was meant
            for key, entry in entries.items():
                if _entry(opened.get_tensor(key), file.name) != entry:
                    raise OSError(f"{key} in {file.name} does not read back as it was written")
        return entries

    def finish(self, folder: Path, out: Path, tensors: dict[str, Any], tokenizer: Path | None) -> None:
        """Add index, config, tokenizer, chat template, generation config and last the manifest; move it to `out`."""
        assert len(tensors) == len(self.shapes)
        if len(self.names) > 1:
            total = sum(entry["bytes"] for entry in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": {key: e["file"] for key, e in tensors.items()}}
            _write_json(folder / INDEX, index)
        if self.origin is not None:
            for name in KEPT_FILES:
                if (self.origin.folder / name).is_file():
                    shutil.copyfile(self.origin.folder / name, folder / name)
        base = self.origin.config if self.origin else None
        _write_json(folder / "config.json", config_to_hf(self.config, base, dtype=self._main_dtype()))
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder / "tokenizer.json", add_begin=self.origin is None)
        for name, content in _companions(self.config).items():
            if not (folder / name).exists():
                if isinstance(content, str):
                    (folder / name).write_text(content, encoding="utf-8")
                else:
                    _write_json(folder / name, content)
        if learned_turns(read_state(self.checkpoint).get("config", {})):
            _stop_at_turns(folder / "generation_config.json")
        made_from = {"checkpoint": self.checkpoint.name, "checkpoint_digest": _digest(self.checkpoint)}
        written = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST)
        files = {path.name: checksum(path) for path in written}
        _write_json(folder / MANIFEST, made_from | {"files": files, "tensors": tensors})
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)

    def _main_dtype(self) -> str:
        """The dtype of most numbers."""
        sizes: dict[str, int] = {}
        for name, dtype in self.dtypes.items():
            kind = str(dtype).removeprefix("torch.")
            sizes[kind] = sizes.get(kind, 0) + self.shapes[name].numel()
        return max(sizes, key=lambda kind: sizes[kind])


def _write_tokenizer(source: Path, out: Path, *, add_begin: bool) -> None:
    """A copy of a tokenizer; one that was trained here gets the begin of text that a released one puts first."""
    tokenizer = Tokenizer.from_file(str(source))
    if add_begin and tokenizer.post_processor is None:
        tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
        )
        tokenizer.save(str(out))
    else:
        shutil.copyfile(source, out)


def _stop_at_turns(path: Path) -> None:
    """Add the tokens that end a turn to those at which generation stops."""
    content = read_json(path)
    found = content.get("eos_token_id", [])
    stops = [found] if isinstance(found, int) else list(found or [])
    _write_json(path, content | {"eos_token_id": list(dict.fromkeys([*stops, *STOPS]))})


def _companions(config: Gemma4Config) -> dict[str, Any]:
    """Small files a folder needs beside weights, for a run that began with none."""
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {
        "tokenizer_config.json": special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "padding_side": "left",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(STOPS),
            "pad_token_id": config.pad_token_id,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 64,
            "top_p": 0.95,
        },
        "chat_template.jinja": chat_template(template_size(config)),
    }


def _entry(tensor: Tensor, file: str) -> dict[str, Any]:
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return {
        "file": file,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "bytes": tensor.numel() * tensor.element_size(),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
