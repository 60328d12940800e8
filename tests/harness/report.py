"""Tables that tests fill and pytest prints at the end, whichever process ran them."""

from __future__ import annotations

from collections.abc import Mapping

Row = dict[str, str]
tables: dict[str, list[Row]] = {}


def report(title: str, row: Mapping[str, object]) -> None:
    tables.setdefault(title, []).append({name: str(value) for name, value in row.items()})


def merge(found: dict[str, list[Row]]) -> None:
    """Add what another process reported."""
    for title, rows in found.items():
        tables.setdefault(title, []).extend(rows)


def render() -> str:
    out = []
    for title, rows in sorted(tables.items()):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [columns, *[[row.get(name, "") for name in columns] for row in rows]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        out.append(f"\n{title}")
        out += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(out)
