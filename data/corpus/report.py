"""What a prepared corpus holds, in numbers and as a picture of its documents' lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus.shards import Shards

REPORT, _PICTURE = "report.json", "report.svg"
_BEGIN = '<svg xmlns="http://www.w3.org/2000/svg" '
_STYLE = "<style>rect{fill:#4a7ab5}text{font:10px sans-serif;text-anchor:middle;fill:#333}svg{background:#fff}</style>"

Class = tuple[int, int, int]
"""Least and most tokens, and the number of documents."""


def histogram(lengths: Sequence[int] | NDArray[np.int64]) -> list[Class]:
    """Least and most tokens of each class of lengths, two to a doubling, and the number of documents in it."""
    kinds, counts = np.unique(np.floor(2 * np.log2(np.asarray(lengths, np.float64))).astype(int), return_counts=True)
    found = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
    classes = range(min(found), max(found) + 1) if found else range(0)
    edges = [(ceil(2 ** (k / 2)), ceil(2 ** ((k + 1) / 2)) - 1, found.get(k, 0)) for k in classes]
    return [(least, most, count) for least, most, count in edges if least <= most]


def bars(classes: Sequence[Class]) -> str:
    """A histogram as SVG; each bar tells its numbers."""
    most, step, height = max(count for _, _, count in classes), 44, 64
    drawn = ""
    for i, (least, last, count) in enumerate(classes):
        tall = height * count / most
        drawn += (
            f"<g><title>{least:,} to {last:,} tokens: {count:,} documents</title>"
            f'<rect x="{i * step + 4}" y="{height - tall + 16:.1f}" width="{step - 8}" height="{tall:.1f}" rx="2"/>'
            f'<text x="{i * step + step / 2:g}" y="{height - tall + 11:.1f}">{f"{count:,}" if count else ""}</text>'
            f'<text class="edge" x="{i * step + step / 2:g}" y="{height + 30}">{least:,}</text></g>'
        )
    width = len(classes) * step
    return (
        f'<svg viewBox="0 0 {width} {height + 36}" width="{width}" height="{height + 36}" '
        f'role="img" aria-label="documents by length">{drawn}</svg>'
    )


def write_report(shards: Shards, size: int) -> None:
    """Write both beside the shards, which were made of files of `size` bytes."""
    classes = histogram(shards.lengths)
    report: dict[str, Any] = {"documents": shards.num_documents, "tokens": shards.num_tokens, "bytes_of_files": size}
    report |= {"bytes_per_token": size / max(shards.num_tokens, 1), "counts": asdict(shards.counts), "lengths": classes}
    (shards.folder / REPORT).write_text(json.dumps(report, indent=1))
    (shards.folder / _PICTURE).write_text(bars(classes).replace("<svg ", _BEGIN).replace("<g>", f"{_STYLE}<g>", 1))


def report_lines(shards: Shards) -> str:
    """The same in two lines."""
    lengths, left_out = shards.lengths, f" | {shards.counts}" if str(shards.counts) else ""
    return (
        f"{shards.folder}: {shards.num_documents} documents, {shards.num_tokens} tokens{left_out}\n"
        f"half of the documents have {int(np.median(lengths)):,} tokens or more, the longest {int(lengths.max()):,} "
        f"({REPORT}, {_PICTURE})"
    )
