"""What became of the lines, files and documents of a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_KINDS = 1000
_NAMED = 8
"""Kinds of what was ignored that are listed by name."""


@dataclass
class Counts:
    """Documents that were kept or left out, and all that was read without being used."""

    kept: int = 0
    cut: int = 0
    """Conversations that were kept, but lost turns at the end."""
    too_long: int = 0
    """Left out: nothing supervised in the turns that fit."""
    too_many_media: int = 0
    """Left out: their media alone are more than a sequence may have."""
    unsupervised: int = 0
    """Left out: nothing supervised at all."""
    bad: int = 0
    """Left out because they cannot be read, as data.on_bad=skip allows."""
    keys: dict[str, int] = field(default_factory=dict)
    """Keys of lines that nothing reads, each with the number of lines."""
    files: dict[str, int] = field(default_factory=dict)
    """Files of the source that were passed over, by what they are."""
    twice: int = 0
    """Files that are read although another has the same bytes."""
    media: dict[str, int] = field(default_factory=dict)
    """What was left out of pictures, sounds and videos."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Lines of conversations by the shape in which they are written."""

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Counts:
        """Counts that were written with their names. Raises `ValueError` for anything else."""
        counts = cls(**found)
        for name, default in vars(cls()).items():
            value = getattr(counts, name)
            numbers = [*value.items()] if isinstance(default, dict) and isinstance(value, dict) else [("", value)]
            if not all(isinstance(key, str) and type(number) is int for key, number in numbers):
                raise ValueError(f"{name}={value} is no count")
            if isinstance(default, dict) != isinstance(value, dict):
                raise ValueError(f"{name}={value} is no count")
        return counts

    def add(self, other: Counts) -> None:
        """Count what another has counted too."""
        for name, theirs in vars(other).items():
            ours = getattr(self, name)
            if isinstance(theirs, dict):
                for key, number in theirs.items():
                    add(ours, [key], number)
            else:
                setattr(self, name, ours + theirs)

    def ignored(self) -> str:
        """All that was read, or lay in the folder, without being used; empty if there is nothing."""
        parts = ((self.keys, "keys of lines"), (self.files, "files"), (self.media, "media"))
        return "; ".join(f"{what}: {_listed(found)}" for found, what in parts if found)

    def lines(self) -> str:
        """How many lines were read as which shape, the most first."""
        numbers = [f"{count:,} of {shape}" for shape, count in _by_number(self.shapes)]
        return ", ".join(numbers).replace(" of ", " lines of ", 1)

    def __str__(self) -> str:
        out = (
            (self.too_long, "too long"),
            (self.too_many_media, "with too many media"),
            (self.unsupervised, "with nothing supervised"),
            (self.bad, "that cannot be read"),
        )
        left_out = ", ".join(f"{count:,} {why}" for count, why in out if count)
        parts = [f"{self.cut:,} cut" if self.cut else "", f"left out: {left_out}" if left_out else ""]
        parts.append(f"{self.twice:,} files with the bytes of another" if self.twice else "")
        ignored = self.ignored()
        return "; ".join(filter(None, [*parts, f"ignored {ignored}" if ignored else ""]))


def add(counts: dict[str, int], names: Iterable[str], number: int = 1) -> None:
    """Count each name that often more; past a thousand names, others count as one."""
    for name in names:
        name = name if name in counts or len(counts) < _KINDS else "others"
        counts[name] = counts.get(name, 0) + number


def _listed(counts: Mapping[str, int]) -> str:
    common = _by_number(counts)
    named = ", ".join(f"{name} ({count:,})" for name, count in common[:_NAMED])
    return named + (f" and {len(common) - _NAMED} more" if len(common) > _NAMED else "")


def _by_number(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
