"""Datasets as the hub and `datasets` keep them: fetched, and their records told from what lies beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from data.containers.opened import COMPRESSIONS
from data.corpus.reading import SourceError

HUB = "hf:"
_SOURCE = re.compile(
    r"hf:(?://datasets/)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[\w.-]+|[^/]+))?(?:/(?P<path>.+))?"
)
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?=[/_.\d-]|$)", re.IGNORECASE)
_DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")


def fetched(source: str, types: Sequence[str]) -> tuple[Path, Path]:
    """Folder of a dataset's local copy, of which the files of these types are fetched, and what the source names in it.

    The source is hf://datasets/OWNER/NAME or hf:OWNER/NAME, with @REVISION and /PATH if wanted, which is a file, a
    folder or a glob. Raises `SourceError` for a source of another form, and where the hub cannot be reached and nothing
    is cached.
    """
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise SourceError(
            f"data.source={source} names no dataset of the hub; write hf:OWNER/NAME, with @REVISION and /FILE, /FOLDER "
            "or a glob behind it if wanted."
        )
    path = (found["path"] or "").strip("/")
    ends = [f"*{kind}{packed}" for kind in types for packed in ("", *COMPRESSIONS)]
    wanted = [path, path.replace("**/", ""), *(f"{path}/{end}" for end in ends)] if path else ends
    folder = _snapshot(found["id"], unquote(found["revision"] or "main"), tuple(wanted))
    return folder, folder / path


@cache
def _snapshot(name: str, revision: str, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # imports slowly, so only when asked for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(wanted)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SourceError(
            f"dataset {name} at {revision} could not be fetched from the hub ({reason}); log in and accept its terms, "
            "or give files that are on this machine."
        ) from None


def is_description(file: Path) -> bool:
    """Whether a file in a folder that `datasets` saved describes it, or is left of work on it, and holds no records."""
    if file.name in _DESCRIPTIONS:
        return any((file.parent / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return file.name.startswith("cache-") and file.suffix == ".arrow" and (file.parent / "state.json").is_file()


def check_splits(source: str, folder: Path, files: Sequence[Path]) -> None:
    """Raises `SourceError` if files in a folder are those of several splits, which would all be learned."""
    splits = {found[1].lower() for file in files if (found := _SPLIT.search(file.relative_to(folder).as_posix()))}
    if len(splits) > 1:
        raise SourceError(
            f"data.source={source} holds the splits {', '.join(sorted(splits))}; name the files of one, by a folder or "
            "a glob behind it."
        )
