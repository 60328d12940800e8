"""Host memory while a released checkpoint is loaded: `python -m launch.benchmarks.compare load`.

Writes a checkpoint of three layers of 26B-A4B (6.3 GB in bfloat16), loads it on two ranks into
float32 masters, and reports each rank's peak beyond the slices it keeps.
"""

from __future__ import annotations

import json
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from launch.arguments import run
from launch.torchrun import start
from model import Gemma4, Gemma4Config
from model.hf.weights import INDEX, Weights, disk_key
from model.init import initialised_tensors
from parallel.agree import from_all
from parallel.apply import build_parallel_model
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.world import World, init_process_group

RANKS = 2
_GB = 10**9


@dataclass
class Options:
    folder: str


def write_checkpoint(folder: Path, layers: int) -> int:
    """Random bfloat16 weights, one file for each layer and one for the rest; bytes written."""
    config = Gemma4Config.from_name("gemma4_26b_a4b").replace(num_hidden_layers=layers, vision=None)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with torch.device("meta"):
        tensors = initialised_tensors(Gemma4(config))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[disk_key(name, text_only=True)] = tensor
    for file, metas in files.items():
        save_file(
            {key: torch.randn(1).bfloat16().expand(meta.shape).contiguous() for key, meta in metas.items()},
            folder / file,
        )
    index = {"weight_map": {key: file for file, metas in files.items() for key in metas}}
    (folder / INDEX).write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(options: Options) -> None:
    """On each rank: load and print the peak beyond what was there before."""
    folder = Path(options.folder)
    world, device = World.from_environment(), torch.device("cpu")
    init_process_group(world, device)
    mesh = build_mesh(device, Layout(dp_shard=world.size))
    config = Gemma4Config.from_hf(folder)
    before = _peak()
    model = build_parallel_model(config, mesh, device, Weights(folder, config).fill).model
    grown = _peak() - before
    kept = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for _, t in initialised_tensors(model))
    found = from_all((grown, kept))
    if world.rank == 0:
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        for rank, (peak, own) in enumerate(found):
            print(
                f"rank {rank}: peak {peak / _GB:.2f} GB, of it its own slices {own / _GB:.2f} GB; "
                f"beyond them {(peak - own) / _GB:.2f} GB (largest file {largest / _GB:.2f} GB)"
            )
    dist.destroy_process_group()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(layers: int = 3) -> None:
    with tempfile.TemporaryDirectory(prefix="gemwright-load-") as name:
        written = write_checkpoint(Path(name), layers)
        print(f"loading {written / _GB:.1f} GB of bfloat16 on {RANKS} ranks into float32 masters", flush=True)
        start("launch.benchmarks.load_memory", RANKS, f"folder={name}")


if __name__ == "__main__":
    run(Options, measure, __doc__)
