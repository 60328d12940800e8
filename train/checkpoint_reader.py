"""Reading the tensors of a checkpoint without running anything that it holds.

torch.distributed.checkpoint unpickles `.metadata` whole, and unpickles whatever a checkpoint calls no tensor. Here only
the classes of that file's own format are admitted, and only tensors; torch reads those with `weights_only`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from model.errors import UserError

ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
"""What `.metadata` may name, by module."""


class TensorReader(dcp.FileSystemReader):
    """Reads a checkpoint folder's tensors. Raises `UserError` from `read_metadata` for anything else in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, every entry a tensor in a file of this folder."""
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Metadata(file).load()
            entries = metadata.state_dict_metadata
            files = {info.relative_path for info in metadata.storage_data.values()}
        except _Foreign as error:
            raise UserError(
                f"{path} names {error}, which no checkpoint of a run holds; nothing of it was run. Give another "
                "checkpoint."
            ) from None
        except Exception as error:  # on damage, pickle raises whatever it stumbles over
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {error}); give another checkpoint."
            ) from None
        for name, entry in entries.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{path} holds {name}, which is no tensor and is not read; give another checkpoint.")
        strange = sorted(str(file) for file in files if not isinstance(file, str) or Path(file).name != file)
        if strange:
            raise UserError(f"{path} names {strange[0]}, a file outside of the checkpoint; give another checkpoint.")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def files(self) -> set[str]:
        """Names of the files that hold tensors."""
        return {info.relative_path for info in self.read_metadata().storage_data.values()}


class _Foreign(Exception):
    """A name that `.metadata` may not have."""


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look a name up, if it is of the format."""
        if name not in ADMITTED.get(module, ()):
            raise _Foreign(f"{module}.{name}")
        return super().find_class(module, name)
