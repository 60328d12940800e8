"""Records in archives: each the .json of a group of files that share their name up to the first dot, as webdataset has.

Media of a record are the other files of its group, under the name that each has in the archive.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from data.containers.json_texts import parsed
from data.containers.opened import DamagedError, in_batches, opened
from data.corpus.counts import add
from data.corpus.reading import Reading

_BLOCK = 1 << 19
_File: TypeAlias = tuple[PurePosixPath, bytes]
_HOLD_FILES = ("path", "url", "image", "video", "audio", "images", "videos", "audios")
"""Keys whose values may name files."""


class Samples(NamedTuple):
    """Some groups of files of an archive."""

    path: Path
    groups: list[list[_File]]
    columns: None = None

    def values(self, reading: Reading) -> Iterator[tuple[str, Any]]:
        """Place and value of each record, in which names of files of its group are objects with their bytes."""
        for group in self.groups:
            where = f"{self.path}: {_key(group[0])}"
            texts = [contents for name, contents in group if name.suffix == ".json"]
            if len(texts) != 1:
                kinds = ", ".join(name.name[name.name.find(".") :] for name, _ in group)
                reading.bad(f"{where} has {len(texts)} .json among {kinds}; write its record into one")
                continue
            files = {str(name): {"bytes": contents} for name, contents in group if name.suffix != ".json"}
            files |= {PurePosixPath(name).name: found for name, found in files.items()}
            for value in parsed(texts[0], where, reading):
                named = set[str]()
                yield where, _with_files(value, files, named)
                unnamed = [name.suffix for name, _ in group if name.suffix != ".json" and name.name not in named]
                add(reading.counts.files, (f"{kind} in archives that no record names" for kind in unnamed))


def samples_of(path: Path, reading: Reading) -> Iterator[Samples]:
    """The groups of files of an archive."""
    with opened(path, reading.advance) as file:
        groups = (list(group) for _, group in groupby(_files(path, file, reading), _key))
        for _, some in in_batches(groups, lambda group: sum(len(contents) for _, contents in group)):
            yield Samples(path, some)


def _files(path: Path, file: Any, reading: Reading) -> Iterator[_File]:
    """Files of an archive up to where it is damaged, which is noted as bad."""
    place = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r|") as whole:
            archive: Any = whole
            for member in archive:
                name, contents = PurePosixPath(member.name), archive.extractfile(member)
                if contents is not None and not name.name.startswith("."):
                    yield name, contents.read()
                place = member.name
                archive.members.clear()  # it would hold the headers of all
            if (
                archive.fileobj.tell() < archive.offset + tarfile.BLOCKSIZE
            ):  # nothing stands where a block of zeros ends it
                raise DamagedError("the file ends early")
        while file.read(_BLOCK):  # a checksum may stand at the end
            pass
    except (tarfile.TarError, DamagedError) as error:
        reading.bad(f"{path} cannot be unpacked behind {place} ({error})")


def _key(file: _File) -> str:
    name = file[0]
    return str(name.with_name(name.name.partition(".")[0]))


def _with_files(value: Any, files: Mapping[str, Any], named: set[str], holds: bool = False) -> Any:
    """A value in which the names of files are the files, where it `holds` any."""
    if isinstance(value, dict):
        return {key: _with_files(item, files, named, key in _HOLD_FILES) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_files(item, files, named, holds) for item in value]
    if holds and isinstance(value, str) and value in files:
        named.add(PurePosixPath(value).name)
        return files[value]
    return value
