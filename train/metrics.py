"""The step line and the metrics record: what happened since the last one, and how long is left."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Meter:
    """Accumulates between log points. `flops` and `tokens` are global sums, `peak_flops` per device."""

    world_size: int
    steps: int
    peak_flops: float
    device: torch.device
    tokens: int = 0
    flops: int = 0
    steps_since: int = 0
    data_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, tokens: int, flops: int, data_seconds: float) -> None:
        """Count one optimizer step; `data_seconds` is the time spent waiting for its batches."""
        self.tokens += tokens
        self.flops += flops
        self.data_seconds += data_seconds
        self.steps_since += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training: sampling, saving."""
        self.started += seconds

    def record(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """The metrics of this log point, and a fresh start for the next."""
        now = time.perf_counter()
        step_seconds = (now - self.started) / self.steps_since
        tokens_per_second = self.tokens / (now - self.started)
        per_device = self.flops / (now - self.started) / self.world_size
        record = {
            "step": step,
            **values,
            "tokens_per_second": round(tokens_per_second, 1),
            "tokens_per_second_per_device": round(tokens_per_second / self.world_size, 1),
            "model_tflops_per_device": round(per_device / 1e12, 4),
            "mfu": round(per_device / self.peak_flops, 4),
            **memory(self.device),
            "step_seconds": round(step_seconds, 4),
            "data_seconds": round(self.data_seconds / self.steps_since, 4),
            "eta_seconds": round(step_seconds * (self.steps - step), 1),
        }
        self.tokens = self.flops = self.steps_since = 0
        self.data_seconds, self.started = 0.0, now
        return record


def memory(device: torch.device) -> dict[str, float]:
    """The highest point in GiB: allocated on the GPU, or resident in this process.

    On a GPU also what its allocator holds, and how often it had to give memory back and try again.
    """
    if device.type == "cuda":
        return {
            "peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3),
            "reserved_memory_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 3),
            "memory_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)}


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m" if whole >= 3600 else f"{whole // 60}m{whole % 60:02d}s"


def step_line(record: dict[str, Any], steps: int) -> str:
    """A record of metrics as one line for the terminal."""
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps} | loss {record['loss']:.4f} | "
        f"grad_norm {record['grad_norm']:.3f} | lr {record['lr']:.2e} | "
        f"tokens/s/device {record['tokens_per_second_per_device']:,.0f} | "
        f"TFLOP/s/device {record['model_tflops_per_device']:.3f} | MFU {100 * record['mfu']:.1f} % | "
        f"peak {record['peak_memory_gib']:.2f} GiB | data {1000 * record['data_seconds']:.1f} ms | "
        f"eta {duration(record['eta_seconds'])}"
    )
