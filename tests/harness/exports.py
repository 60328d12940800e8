"""The export command, run in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.export import Options, export_run
from parallel.world import World
from tests.harness.distributed import run_ranks


def export_of(folder: Path, out: Path, **more: Any) -> None:
    """Export the run in `folder/run`."""

    def command(world: World) -> None:
        dist.destroy_process_group()  # the command makes its own
        try:
            export_run(Options(str(folder / "run"), str(out), **more))
        finally:
            if not dist.is_initialized():
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    run_ranks(1, command)
