"""One step of a run looked at closely: a trace of each rank, and a table of where its time went."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

log = logging.getLogger("gemwright")

STEPS = ("data", "exchange", "forward_backward", "clip", "optimizer")
"""Parts of a step, in order; the trainer marks them."""
_WARM = 2
"""Steps of this start before the one that is recorded."""
_OPERATIONS = 25


class Profiler:
    """Records the third step after a start, where it is asked for.

    The folder gets `trace_rank_N.json.gz` of each rank, for Perfetto or chrome://tracing, and `table.txt` of rank 0:
    parts of the step, forwards of the model's modules by their class, and the operations that took longest.
    """

    def __init__(self, folder: Path | None, rank: int, device: torch.device, model: nn.Module) -> None:
        """folder: where the files go; None records nothing."""
        self.folder, self.rank, self.device, self.model = folder, rank, device, model
        self._left = _WARM

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step."""
        if self.folder is None or self._left < 0:
            yield
            return
        self._left -= 1
        if self._left >= 0:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with _named(self.model), profile(activities=activities) as found:
            yield
        self.folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.folder / f"trace_rank_{self.rank}.json.gz"))
        if self.rank == 0:
            (self.folder / "table.txt").write_text(_table(found))
            log.info("profile of this step in %s", self.folder)


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """Forwards of modules are ranges in the trace, under the names of their classes, while inside."""
    with ExitStack() as stack:
        for module in model.modules():
            if module is model or isinstance(module, nn.ModuleDict | nn.ModuleList):
                continue
            ranges: list[record_function] = []

            def begin(module: nn.Module, _: object, ranges: list[record_function] = ranges) -> None:
                ranges.append(record_function(f"module {type(module).__name__.removeprefix('FSDP')}"))
                ranges[-1].__enter__()

            def end(module: nn.Module, *_: object, ranges: list[record_function] = ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end, always_call=True).remove)
        yield


def _table(found: profile) -> str:
    events = {event.key: event for event in found.key_averages()}
    whole = sum(events[part].cpu_time_total for part in STEPS if part in events)
    lines = [f"{'part':<40} {'ms':>10} {'share':>6} {'calls':>6}"]
    modules = sorted(key for key in events if key.startswith("module "))
    for key in (*(part for part in STEPS if part in events), *modules):
        event = events[key]
        lines.append(
            f"{key:<40} {event.cpu_time_total / 1e3:>10.1f} {event.cpu_time_total / whole:>6.1%} {event.count:>6}"
        )
    lines.append("Modules: their forwards, with what lies in them; on a GPU the time to launch them.\n")
    device = any(event.self_device_time_total for event in events.values())
    sort = "self_device_time_total" if device else "self_cpu_time_total"
    return "\n".join(lines) + found.key_averages().table(sort_by=sort, row_limit=_OPERATIONS, max_name_column_width=60)
