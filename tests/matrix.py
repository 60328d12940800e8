"""The support matrix: which meshes are held against one process, for which variants.

python -m tests.matrix     # runs them all and writes what it found into README.md
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from parallel.layout import Layout
from tests.harness.meshes import VARIANTS, Case, Errors, run_all, worst_of

README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)
_NAMES = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b_a4b": "26B-A4B", "31b": "31B"}


class Kind(NamedTuple):
    layout: Layout
    variants: tuple[str, ...] = VARIANTS


MOE = ("26b_a4b",)
MESHES: dict[str, Kind] = {
    "dp2": Kind(Layout(dp_shard=2)),
    "hsdp 2x2": Kind(Layout(dp_replicate=2, dp_shard=2)),
    "tp2": Kind(Layout(tp=2, sequence_parallel=False)),
    "tp2+sp": Kind(Layout(tp=2)),
    "cp2": Kind(Layout(cp=2)),
    "pp2": Kind(Layout(pp=2)),
    "ep2": Kind(Layout(dp_shard=2, ep=2), MOE),
    "dp2·tp2": Kind(Layout(dp_shard=2, tp=2, sequence_parallel=False)),
    "dp2·tp2+sp·cp2": Kind(Layout(dp_shard=2, tp=2, cp=2)),
    "tp4": Kind(Layout(tp=4, sequence_parallel=False)),
    "tp8+sp": Kind(Layout(tp=8)),
    "ep4·dp4": Kind(Layout(dp_shard=4, ep=4), MOE),
    "ep2·tp2·dp2": Kind(Layout(dp_shard=2, tp=2, ep=2), MOE),
    "ep4·cp2": Kind(Layout(dp_shard=2, cp=2, ep=4), MOE),
    "pp2·dp2·tp2": Kind(Layout(pp=2, dp_shard=2, tp=2)),
    "pp2·cp2": Kind(Layout(pp=2, cp=2)),
    "hsdp 2x2·tp2": Kind(Layout(dp_replicate=2, dp_shard=2, tp=2)),
}


def case_of(variant: str, layout: Layout, steps: int = 5) -> Case:
    """On eight ranks a layer less, of which the last shares keys and values where the variant does."""
    fewer = (("num_hidden_layers", 3), *((("num_kv_shared_layers", 1),) if variant in ("e2b", "e4b") else ()))
    return Case(variant, layout, sizes=fewer if layout.world_size == 8 else (), steps=steps)


@cache
def on_mesh(mesh: str, steps: int, dtype: torch.dtype = torch.float64) -> dict[str, Errors]:
    """Every variant of a mesh."""
    kind = MESHES[mesh]
    cases = [replace(case_of(variant, kind.layout, steps), dtype=dtype) for variant in kind.variants]
    return dict(zip(kind.variants, run_all(cases), strict=True))


def written() -> dict[str, set[str]]:
    """Mesh to the variants that README says yes for."""
    block = _BLOCK.search(README.read_text(encoding="utf-8"))
    assert block is not None
    found = {}
    for line in block[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in MESHES:
            found[cells[0]] = {v for v, cell in zip(VARIANTS, cells[1:], strict=False) if cell.startswith("yes")}
    return found


def main() -> int:
    torch.set_num_threads(1)
    rows, failed = [], 0
    for mesh, kind in MESHES.items():
        found = {dtype: on_mesh(mesh, 5, dtype) for dtype in (torch.float64, torch.float32)}
        cells = []
        for variant in VARIANTS:
            good = variant not in kind.variants or all(by[variant].within(dtype) for dtype, by in found.items())
            failed += not good
            cells.append(("yes" if good else "**no**") if variant in kind.variants else "")
        worst = (worst_of(list(by.values())) for by in found.values())
        cells += [f"{errors.loss:.0e}, {errors.norm:.0e}, {errors.gradient:.0e}" for errors in worst]
        rows.append(f"| {mesh} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    header = f"| mesh | {' | '.join(_NAMES[v] for v in VARIANTS)} | float64: loss, norm, gradient | float32 |"
    table = "\n".join((header, "|---" * (len(VARIANTS) + 3) + "|", *rows)) + "\n"
    README.write_text(_BLOCK.sub(lambda block: block[1] + table + block[2], README.read_text(encoding="utf-8")))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
