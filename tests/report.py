"""Tables that tests fill and pytest prints at the end."""

from __future__ import annotations

_tables: dict[str, list[dict[str, object]]] = {}


def report(title: str, row: dict[str, object]) -> None:
    _tables.setdefault(title, []).append(row)


def render() -> str:
    out = []
    for title, rows in _tables.items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [columns, *[[str(row.get(name, "")) for name in columns] for row in rows]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        out.append(f"\n{title}")
        out += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(out)
