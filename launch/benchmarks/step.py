"""A training step beside those of other libraries, on the same weights and batches, by turns in one run.

python -m launch.benchmarks.step                         # every shape, all positions supervised and a fifth of them
python -m launch.benchmarks.step shapes=e_like lengths=1024 shares=1 shares=0.2 json=step.json
python -m launch.benchmarks.step lengths=2560 documents=8     # eight documents packed into a row

A step is forward, loss and backward, from gradients that are not there to gradients that are; float32. Each library
runs in a process of its own. Times are medians; a round in which the machine's own speed, a product of matrices
measured beside every step, was more than a fifth below its best is repeated. Memory is the peak above weights and
gradients, counted from after loading. Rivals that are not installed are named and left out:

transformers   its model with SDPA and its own loss
cut_ce         the same, its loss by cut-cross-entropy (compiled by torch)
trl            TRL's trainer on that model: its fused head, and the metrics that it makes of each batch
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.arguments import run
from launch.benchmarks.shapes import SHAPES, Batch, batch
from model import Gemma4, Gemma4Config, UserError
from model.hf.config import config_to_hf
from model.hf.weights import disk_key
from model.init import initialised_tensors
from model.inputs import make_inputs
from parallel.world import prepare_allocators
from train.flops import training_flops

Step = Callable[[], Tensor]
"""Forward and backward; the mean loss."""

RIVALS = {
    "transformers": ("transformers",),
    "cut_ce": ("transformers", "cut_cross_entropy", "triton"),
    "trl": ("transformers", "trl", "datasets"),
}
"""Packages that each rival needs."""
_BUSY = 0.8
"""Share of the best speed of the machine below which a round does not count."""
_TRIES = 3


def drawn_model(config: Gemma4Config) -> Gemma4:
    """The same values for every library."""
    model = Gemma4(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def ours(config: Gemma4Config, given: Batch) -> tuple[torch.nn.Module, Step]:
    """This project's step, which skips what nothing supervised depends on."""
    model = drawn_model(config)
    tokens, keep, positions = given
    labels = tokens.roll(-1, 1)[keep]

    def step() -> Tensor:
        hidden = model(tokens, positions, given.documents, supervised=keep)
        loss = model.head(hidden, model.head_weight, labels).total / len(labels)
        loss.backward()
        return loss

    return model, step


def reference(config: Gemma4Config) -> torch.nn.Module:
    """The model of `transformers` with the same values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        disk_key(name, text_only=True): tensor.detach() for name, tensor in initialised_tensors(drawn_model(config))
    }
    described = AutoConfig.for_model(**config_to_hf(config, dtype="float32"))
    model = AutoModelForCausalLM.from_config(described, attn_implementation="sdpa", dtype=torch.float32)
    left = model.load_state_dict(values, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left
    model.tie_weights()
    return model.train()


def shifted_labels(given: Batch) -> Tensor:
    """Labels as `transformers` takes them, -100 where nothing is learned."""
    return given.tokens.masked_fill(~given.keep.roll(1, 1), -100)


def inputs_of(given: Batch) -> dict[str, Tensor]:
    """Tokens as `transformers` takes them; from positions that start anew it knows packed documents."""
    return {"input_ids": given.tokens} | ({"position_ids": given.positions} if given.is_packed else {})


def transformers(config: Gemma4Config, given: Batch) -> tuple[torch.nn.Module, Step]:
    """The step of `transformers`, with the labels that its own trainer would give."""
    model = reference(config)
    labels = shifted_labels(given)  # it shifts them by itself

    def step() -> Tensor:
        loss = model(**inputs_of(given), labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return model, step


def cut_ce(config: Gemma4Config, given: Batch) -> tuple[torch.nn.Module, Step]:
    """The step of `transformers` with the loss of cut-cross-entropy, which never holds all scores."""
    from cut_cross_entropy import linear_cross_entropy

    model: Any = reference(config)
    labels = shifted_labels(given)

    def step() -> Tensor:
        hidden = model.model(**inputs_of(given), use_cache=False).last_hidden_state
        loss = linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            labels,
            softcap=config.final_logit_softcapping,
            shift=1,
            impl="torch_compile",
        )
        loss.backward()
        return loss.detach()

    return model, step


def trl(config: Gemma4Config, given: Batch) -> tuple[torch.nn.Module, Step]:
    """The step of TRL's trainer for supervised fine-tuning, with its own fused head and the metrics that it makes."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    labels = shifted_labels(given)
    vocabulary = {"<pad>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    folder = tempfile.TemporaryDirectory(prefix="gemwright-trl-")
    trainer = SFTTrainer(
        model=reference(config),
        args=SFTConfig(
            output_dir=folder.name,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset(
            InMemoryTable.from_pydict({"input_ids": given.tokens.tolist(), "labels": labels.tolist()}),
            fingerprint="one",
        ),
        processing_class=tokenizer,
    )
    model: Any = trainer.model.train()
    inputs = inputs_of(given) | {"labels": labels}
    if not given.is_packed:
        inputs["attention_mask"] = torch.ones_like(labels)

    def step() -> Tensor:
        assert Path(folder.name).is_dir()  # for as long as the step is
        loss = trainer.compute_loss(model, dict(inputs))
        trainer.accelerator.backward(loss)
        return loss.detach()

    return model, step


def matrix_speed() -> float:
    """Operations a second of a product of matrices, now."""
    a, b, out = torch.randn(1536, 1536), torch.randn(1536, 1536), torch.empty(1536, 1536)
    torch.mm(a, b, out=out)
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b, out=out)
    return 4 * 2 * 1536**3 / (time.perf_counter() - start)


def _serve(name: str, config: Gemma4Config, given: Batch, pipe: Any) -> None:
    """A library's process: a step for every word from the pipe. Ours has the settings that a run makes."""
    if name == "ours":
        prepare_allocators()
    builders = {"ours": ours, "transformers": transformers, "cut_ce": cut_ce, "trl": trl}
    model, step = builders[name](config, given)
    step()  # compiles, and brings files and libraries in
    model.zero_grad()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    while asked(pipe):
        speed = matrix_speed()
        start = time.perf_counter()
        loss = step().item()
        seconds = time.perf_counter() - start
        model.zero_grad()
        pipe.send((seconds, loss, status("VmHWM") - before - gradients, max(speed, matrix_speed())))


def asked(pipe: Any) -> bool:
    """Whether one more step is asked for; not if who asks is gone."""
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


def status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024


@dataclass
class Measured:
    """Rounds of one library that count: seconds, loss, peak bytes above weights and gradients, speed of the machine."""

    rounds: list[tuple[float, float, int, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(found[0] for found in self.rounds)

    @property
    def loss(self) -> float:
        """The mean loss of the batch."""
        return self.rounds[0][1]

    @property
    def peak(self) -> int:
        """The most of all rounds."""
        return max(found[2] for found in self.rounds)

    @property
    def speed(self) -> float:
        """The best that the machine did."""
        return max(found[3] for found in self.rounds)


def measure(
    names: tuple[str, ...],
    config: Gemma4Config,
    given: Batch,
    rounds: int,
    serve: Callable[[str, Gemma4Config, Batch, Any], None] = _serve,
) -> list[Measured]:
    """Steps of several libraries by turns, each in its own process, which all live until the end."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for name in names:
        pipe, theirs = context.Pipe()
        # No daemon: it may have processes of its own.
        process = context.Process(target=serve, args=(name, config, given, theirs))
        process.start()
        theirs.close()
        pipes.append(pipe)
        processes.append(process)
    found = [Measured() for _ in names]
    try:
        for attempt in range(rounds * _TRIES):
            turn = []
            for name, pipe in zip(names, pipes, strict=True):
                pipe.send(True)
                turn.append(pipe.recv())
                if isinstance(turn[-1], str):
                    raise UserError(f"{name} does not run: {turn[-1]}")
            best = max([speed for *_, speed in turn] + [measured.speed for measured in found if measured.rounds])
            if min(speed for *_, speed in turn) < _BUSY * best and attempt < rounds * _TRIES - 1:
                print(
                    f"    the machine is at {min(s for *_, s in turn) / best:.0%} of its best: this round is repeated"
                )
                continue
            for measured, one in zip(found, turn, strict=True):
                measured.rounds.append(one)
            if len(found[0].rounds) == rounds:
                break
        for pipe in pipes:
            pipe.send(False)
    except (EOFError, BrokenPipeError):
        raise UserError("a measuring process ended early, as it said above; likely out of memory.") from None
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(5)
            process.kill()
    return found


@dataclass
class Options:
    """Arguments of the benchmark."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"choices": tuple(SHAPES)})
    lengths: list[int] = field(default_factory=lambda: [1024])
    shares: list[float] = field(default_factory=lambda: [1.0, 0.2])
    documents: list[int] = field(default_factory=lambda: [1])
    """How many are packed into a row."""
    rivals: list[str] = field(default_factory=lambda: list(RIVALS), metadata={"choices": tuple(RIVALS)})
    rounds: int = 3
    json: str | None = None


def benchmark(options: Options) -> None:
    """Print a line for each shape, length, share and rival; the numbers as JSON where that is asked for."""
    missing = {name: [needed for needed in RIVALS[name] if not find_spec(needed)] for name in options.rivals}
    for name, packages in missing.items():
        if packages:
            print(f"{name} is left out: {' and '.join(packages)} must be installed")
    rivals, lines = [name for name, packages in missing.items() if not packages], []
    print(
        f"float32, {torch.get_num_threads()} threads, medians of {options.rounds}; memory above weights and gradients"
    )
    print(
        f"{'shape':>7} {'S':>5} {'docs':>4} {'superv.':>7} {'rival':>12} {'its s':>6} {'our s':>6} {'tokens/s':>8} "
        f"{'its GiB':>7} {'our GiB':>7} {'memory':>6} {'of peak':>7} {'loss differs':>12}"
    )
    for shape in options.shapes:
        config = SHAPES[shape]
        for length in options.lengths:
            for documents, share, rival in itertools.product(options.documents, options.shares, rivals):
                lines.append(_line(shape, batch(config, length, share, documents), share, rival, options.rounds))
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1))


def _line(shape: str, given: Batch, share: float, rival: str, rounds: int) -> dict[str, Any]:
    config, length, documents = SHAPES[shape], given.tokens.shape[1], int(given.documents.max())
    us, them = measure(("ours", rival), config, given, rounds)
    inputs = make_inputs(config, given.tokens, given.positions, given.documents, given.keep)
    flops = training_flops(config, inputs)
    line = {
        "shape": shape,
        "length": length,
        "documents": documents,
        "supervised": share,
        "rival": rival,
        "their_seconds": them.seconds,
        "our_seconds": us.seconds,
        "tokens_per_second": them.seconds / us.seconds,
        "their_peak_bytes": them.peak,
        "our_peak_bytes": us.peak,
        "memory": us.peak / them.peak,
        "share_of_matrix_peak": flops / us.seconds / us.speed,
        "loss_difference": abs(us.loss / them.loss - 1),
        "matrix_flops_per_second": us.speed,
    }
    print(
        f"{shape:>7} {length:>5} {documents:>4} {share:>7.0%} {rival:>12} {them.seconds:>6.2f} {us.seconds:>6.2f} "
        f"{line['tokens_per_second']:>7.2f}x {them.peak / 2**30:>7.2f} {us.peak / 2**30:>7.2f} {line['memory']:>5.2f}x "
        f"{line['share_of_matrix_peak']:>7.0%} {line['loss_difference']:>12.1e}",
        flush=True,
    )
    return line


def main() -> None:
    """Run the command line's benchmark."""
    run(Options, benchmark, __doc__)


if __name__ == "__main__":
    main()
