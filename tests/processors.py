"""The numeric tests as other processors and numbers of threads would round them.

    python -m tests.processors            # every numeric test under every setting, and a table of worst errors
    python -m tests.processors --quick    # a few of them under two settings, as in `make test`

Each setting limits what ATen, MKL and oneDNN may use of this processor, so that sums run in other widths and orders.
What passes under all of them does not stand on one processor's rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def limited(aten: str, mkl: str, onednn: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl, "ONEDNN_MAX_CPU_ISA": onednn}


SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "AVX2": limited("avx2", "AVX2", "AVX2"),
    "SSE4.2": limited("default", "SSE4_2", "SSE41"),
    "MKL as on any processor": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    "2 threads": {"TEST_THREADS": "2", "OMP_NUM_THREADS": "2"},
    "2 threads a rank, AVX2": limited("avx2", "AVX2", "AVX2") | {"RANK_THREADS": "2"},
}
"""`TEST_THREADS` are those of the test process, `RANK_THREADS` of each rank that it starts.

Never both: a rank forked from a process whose threads have run must stay with one.
"""
QUICK_SETTINGS = ("SSE4.2",)
"""Unlike any processor that is likely to run this."""

NUMERIC = (
    "tests/model/test_parity.py",
    "tests/model/test_multimodal_parity.py",
    "tests/model/test_supervised.py",
    "tests/model/test_attention.py",
    "tests/model/test_generate.py",
    "tests/model/test_head.py::test_values_and_gradients_equal_the_plain_loss",
    "tests/parallel/context/test_plan.py",
    "tests/parallel/test_embedding_shards.py",
    "tests/parallel/test_expert.py",
    "tests/parallel/pipeline/test_schedule.py",
    "tests/parallel/tensor/test_vocabulary.py",
    "tests/parallel/test_any_mesh.py::test_any_mesh_loads_what_any_mesh_saved[e2b]",
    "tests/parallel/test_float8.py::test_loss_and_gradients_are_close_to_those_without_it",
    "tests/parallel/test_float8.py::test_gradients_of_a_model_that_has_learned_are_those_of_bfloat16",
    "tests/parallel/test_float8.py::test_a_mesh_equals_one_rank",
    "tests/parallel/test_media_mesh.py::test_media_on_any_mesh_give_the_gradients_of_one_process",
    "tests/parallel/test_mesh_parity.py::test_a_mesh_equals_one_process_in_float32",
    "tests/parallel/test_mesh_parity.py::test_options_change_no_number",
    "tests/train/test_chat_training.py::test_every_mesh_and_worker_count_gives_the_same_losses",
    "tests/train/test_resume.py::test_a_killed_run_goes_on",
    "tests/train/test_weights.py::test_the_first_loss_is_that_of_the_weights_and_every_mesh_goes_on_alike",
)
"""Each kind of comparison, and all that is in float32. The whole matrix is in float64, far within its bound."""
QUICK = (
    "tests/model/test_parity.py::test_logits_and_gradients_equal_the_reference",
    "tests/parallel/test_float8.py::test_gradients_of_a_model_that_has_learned_are_those_of_bfloat16",
    r"tests/parallel/test_mesh_parity.py::test_a_mesh_equals_one_process_in_float32[12b-dp2\xb7tp2+sp\xb7cp2]",
)


def run(setting: str, tests: tuple[str, ...]) -> tuple[bool, dict[str, tuple[float, float]], str]:
    """Whether they pass, the worst error and bound of each kind, and pytest's last words."""
    ours = ("ATEN_CPU_CAPABILITY", "MKL_", "ONEDNN_", "OMP_NUM_THREADS", "TEST_THREADS", "RANK_THREADS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--errors", str(errors), *tests],
            env=environment | SETTINGS[setting],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        found = json.loads(errors.read_text()) if errors.exists() else {}
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    summary = [line for line in lines if re.search(r"\d (passed|failed)", line)][-1:]
    return done.returncode == 0, found, "\n".join(failed + summary) or f"{done.stdout}\n{done.stderr}"[-2000:]


def table(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """A row for each kind of comparison: its worst error under each setting, and the bound of the worst of all."""
    kinds = sorted({kind for errors in found.values() for kind in errors})
    lines = [f"| what | {' | '.join(found)} | bound |", "|---" * (len(found) + 2) + "|"]
    for kind in kinds:
        pairs = {setting: errors[kind] for setting, errors in found.items() if kind in errors}
        bound = max(pairs.values(), key=lambda pair: pair[0] / pair[1])[1]
        cells = [f"{pairs[setting][0]:.1e}" if setting in pairs else "" for setting in found]
        lines.append(f"| {kind} | {' | '.join(cells)} | {bound:.1e} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=SETTINGS, help="this setting alone")
    arguments = parser.parse_args()
    settings = [arguments.only] if arguments.only else list(QUICK_SETTINGS if arguments.quick else SETTINGS)
    found, good = {}, True
    for setting in settings:
        started = time.perf_counter()
        passed, found[setting], words = run(setting, QUICK if arguments.quick else NUMERIC)
        good = good and passed
        print(f"{setting}: {words} | {time.perf_counter() - started:.0f} s", flush=True)
    print(table(found))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
