"""What each kernel takes of a GPU, as its compiler says: shared memory, registers, spills. No GPU is needed.

python -m launch.benchmarks.kernels                      # a table each for A100, H100 and B200
python -m launch.benchmarks.kernels json=kernels.json
python -m launch.benchmarks.kernels write=true           # the tables of docs/kernels.md

Every case of every module of model/kernels is compiled, at a size of a released model. The exit status is 1 where one
does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import model.kernels
from launch.arguments import run
from model import UserError
from model.kernels.case import Case

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
_TABLES = re.compile(r"(<!-- kernels -->\n).*(<!-- /kernels -->)", re.DOTALL)
_PROCESSES = 2
_LARGEST_TENSOR_MEMORY = 512
"""Columns of a multiprocessor's tensor memory, which kernels for Blackwell have."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU: what a block may take, and its peaks by its maker's data sheet, dense."""

    name: str
    capability: int
    shared_memory: int
    """Bytes that one block may take."""
    operations: float
    """Additions and multiplications a second in bfloat16."""
    bandwidth: float
    """Bytes a second of its memory."""


GPUS = (
    GPU("A100", 80, 166_912, 312e12, 2.04e12),
    GPU("H100", 90, 232_448, 989e12, 3.35e12),
    GPU("B200", 100, 232_448, 2250e12, 8.0e12),
)


@dataclass(frozen=True)
class Budget:
    """What one kernel takes on one kind of GPU."""

    gpu: str
    kernel: str
    num_warps: int
    num_stages: int
    shared_memory: int
    registers: int
    spilled_bytes: int
    operations: float
    bytes: float
    least_seconds: float
    """Whichever is longer at the GPU's peak: the operations, or reading and writing."""
    problem: str | None

    @property
    def cells(self) -> dict[str, str]:
        """A row of its GPU's table."""
        return {
            "kernel": self.kernel,
            "warps, stages": f"{self.num_warps}, {self.num_stages}",
            "shared memory": f"{self.shared_memory:,}",
            "registers": f"{self.registers}",
            "spilled bytes": f"{self.spilled_bytes}",
            "Gflop": f"{self.operations / 1e9:,.2f}",
            "MB": f"{self.bytes / 1e6:,.0f}",
            "estimated µs": f"{self.least_seconds * 1e6:,.0f}",
            "verdict": f"does not fit: {self.problem}" if self.problem else "fits",
        }


def budgets() -> list[Budget]:
    """Compile every case for every kind of GPU, in processes."""
    if find_spec("triton") is None:
        raise UserError("Triton is not installed; install it: pip install 'gemwright[kernels]'.")
    from triton import knobs

    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET=1 runs kernels without compiling them; unset TRITON_INTERPRET.")
    places = [
        (module, gpu, index) for gpu in GPUS for module in kernel_modules() for index in range(len(_cases(module, gpu)))
    ]
    with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_budget, *zip(*places, strict=True), chunksize=4))


def kernel_modules() -> list[str]:
    """Modules of model/kernels that name cases."""
    names = [f"{model.kernels.__name__}.{found.name}" for found in pkgutil.iter_modules(model.kernels.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "cases")]


def _cases(module: str, gpu: GPU) -> list[Case]:
    cases: list[Case] = importlib.import_module(module).cases(gpu.capability)
    return cases


def _budget(module: str, gpu: GPU, index: int) -> Budget:
    """One case, which is found again here, since a kernel does not go from process to process."""
    case = _cases(module, gpu)[index]
    compiled = _compiled(case, gpu)
    registers, spilled = _registers(compiled.asm["ptx"], gpu)
    return Budget(
        gpu.name,
        case.name,
        case.num_warps,
        case.num_stages,
        compiled.metadata.shared,
        registers,
        spilled,
        case.operations,
        case.bytes,
        max(case.operations / gpu.operations, case.bytes / gpu.bandwidth),
        "; ".join(_problems(case, gpu, compiled.metadata, spilled)) or None,
    )


def _compiled(case: Case, gpu: GPU) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    attributes = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = triton.compiler.ASTSource(case.kernel, case.signature, case.constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", gpu.capability, 32), options=options)


def _registers(ptx: str, gpu: GPU) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills, as the assembler in Triton's package reports them."""
    triton = find_spec("triton")
    assert triton is not None and triton.origin is not None
    # Triton has a second assembler for what the first one does not know.
    assembler = "ptxas-blackwell" if gpu.capability >= 100 else "ptxas"
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / assembler
    target = _number(r"^\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command: list[str | Path] = [path, "-v", f"--gpu-name={target}", file, "-o", file.with_suffix(".cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(_number(r"Used (\d+) registers", said)), int(_number(r"(\d+) bytes spill stores", said))


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, f"{pattern} is not in:\n{text}"
    return found[1]


def _problems(case: Case, gpu: GPU, metadata: Any, spilled: int) -> Iterator[str]:
    if metadata.shared > gpu.shared_memory:
        yield f"{metadata.shared:,} bytes of shared memory, a block may take {gpu.shared_memory:,}"
    columns = getattr(metadata, "tmem_size", None) or 0
    if columns > _LARGEST_TENSOR_MEMORY:
        yield f"{columns} columns of tensor memory, there are {_LARGEST_TENSOR_MEMORY}"
    if spilled > case.spilled_bytes:
        yield f"spills {spilled} bytes, allowed are {case.spilled_bytes}"


def document(found: list[Budget]) -> str:
    """The tables in Markdown, as docs/kernels.md has them."""
    lines: list[str] = []
    for gpu in GPUS:
        cells = [budget.cells for budget in found if budget.gpu == gpu.name]
        lines += [f"**{_heading(gpu)}**", "", _row(cells[0]), _row("---" for _ in cells[0])]
        lines += [*(_row(row.values()) for row in cells), ""]
    return "\n".join(lines)


def _heading(gpu: GPU) -> str:
    return (
        f"{gpu.name}: a block may take {gpu.shared_memory:,} bytes of shared memory; estimated at "
        f"{gpu.operations / 1e12:,.0f} Tflop/s and {gpu.bandwidth / 1e12:.2f} TB/s"
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _print(found: list[Budget]) -> None:
    widths = {name: max(len(name), *(len(budget.cells[name]) for budget in found)) for name in found[0].cells}
    for gpu in GPUS:
        print(_heading(gpu))
        print("  ".join(name.ljust(width) for name, width in widths.items()).rstrip())
        for budget in (budget for budget in found if budget.gpu == gpu.name):
            cells = budget.cells.items()
            print("  ".join(cell.ljust(widths[name]) for name, cell in cells).rstrip())
        print()


@dataclass
class Options:
    """Arguments of the command."""

    json: str | None = None
    write: bool = False


def command(options: Options) -> None:
    """Print the tables, and put them where they are asked for."""
    found = budgets()
    _print(found)
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(budget) for budget in found], indent=1))
    if options.write:
        tables = document(found)
        DOCUMENT.write_text(_TABLES.sub(lambda match: match[1] + tables + match[2], DOCUMENT.read_text()))
    if any(budget.problem for budget in found):
        sys.exit(1)


def main() -> None:
    """Run the command line."""
    run(Options, command, __doc__)


if __name__ == "__main__":
    main()
