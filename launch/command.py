"""The sub-commands of `gemwright`; the module of one is imported once it is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import NamedTuple, NoReturn


class Command(NamedTuple):
    """A sub-command: its module, and what the overview says of it."""

    module: str
    help: str
    example: str
    on_ranks: bool = False
    """Whether options of torchrun may come first: then the command runs in as many processes as they say."""
    options: tuple[str, ...] = ()
    """Options of its own, which come after all of torchrun's."""


COMMANDS = {
    "train": Command(
        "train.main",
        "Train or fine-tune.",
        "--nproc 8 +variant=31b run.dir=runs/mine",
        True,
        ("--config", "--config-dir", "-cd", "--cfg", "-c", "-m", "--multirun"),
    ),
    "export": Command(
        "launch.export", "Write a checkpoint as a folder that transformers opens.", "run=runs/mine out=my-gemma", True
    ),
    "generate": Command("launch.generate", "Write text with such a folder.", 'weights=my-gemma prompt="Hello"'),
    "memory": Command("launch.memory", "Count what a run's ranks will hold, without a GPU.", "8 +variant=31b"),
    "variants": Command("launch.variants", "List models, their sizes and parameters.", "e4b 31b"),
    "benchmark": Command("launch.benchmarks.compare", "Measure a kernel or a step beside the plain one.", "attention"),
    "clean": Command("launch.clean", "Filter texts and take out duplicates.", "source=texts out=clean"),
    "prepare": Command("launch.prepare", "Tokenise texts once and keep the result.", "source=texts"),
    "show": Command("launch.show", "Show conversations with what is learned in colour.", "file=chats.jsonl"),
    "questions": Command("launch.questions", "Write conversations to try fine-tuning with.", "out=questions.jsonl"),
}


def main() -> None:
    """Run the sub-command that the command line names, once the packages it imports are known to be ours."""
    try:
        from train.own_packages import require_own_packages
    except ImportError:
        sys.exit("error: the package 'train' on the path is not Gemwright's; take its folder off PYTHONPATH.")
    require_own_packages()
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if sys.argv[1:] else 1)
    name, *arguments = sys.argv[1:]
    if name not in COMMANDS:
        _unknown(name)
    command = COMMANDS[name]
    if command.on_ranks and not {"-h", "--help"}.intersection(arguments):
        _start_on_ranks(name, arguments)
    sys.argv = [f"gemwright {name}", *arguments]
    sys.exit(importlib.import_module(command.module).main())


def _start_on_ranks(name: str, arguments: list[str]) -> None:
    """Run a command in as many processes as its options of torchrun say; nothing happens without such options."""
    own = COMMANDS[name].options
    at = next((place for place, word in enumerate(arguments) if word.partition("=")[0] in own), len(arguments))
    launcher: list[str] = []
    words = arguments
    if any(word.startswith("-") for word in arguments[:at]):
        from launch.torchrun import with_script

        spec = importlib.util.find_spec(COMMANDS[name].module)
        assert spec is not None and spec.origin is not None
        launched = with_script(arguments[:at], spec.origin)
        start = launched.index(spec.origin) + 1
        launcher, words = launched[:start], launched[start:] + arguments[at:]
    late = next((word for word in words if word.startswith("-") and word.partition("=")[0] not in own), None)
    if late is not None:
        sys.exit(f"error: {late} comes too late; options of torchrun go first, as in: gemwright {name} --nproc 8 ...")
    if not launcher:
        return
    if {"-m", "--multirun"}.intersection(words):
        sys.exit(_sweep(words, [sys.executable, "-m", "launch.torchrun", *launcher]))
    sys.argv = [f"gemwright {name}", *launcher, *words]
    sys.exit(importlib.import_module("launch.torchrun").main())


def _sweep(words: list[str], launcher: list[str]) -> int:
    from model import UserError
    from train.sweep import sweep

    try:
        return sweep(words, launcher)
    except UserError as error:
        sys.exit(f"error: {error}")


def overview() -> str:
    """Every sub-command with one line on it and an example."""
    lines = ["gemwright COMMAND [ARGUMENT ...]", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10} {command.help}", f"{'':13}gemwright {name} {command.example}"]
    ranks = " and ".join(name for name, command in COMMANDS.items() if command.on_ranks)
    return "\n".join(
        [*lines, "", f"{ranks} take options of torchrun, before their own arguments.", "gemwright COMMAND --help"]
    )


def _unknown(name: str) -> NoReturn:
    from model.errors import nearest  # with it comes torch, which the other paths load only when they need it

    sys.exit(f"error: '{name}' is no command; nearest: {nearest(name, COMMANDS)} (all: {', '.join(COMMANDS)}).")


if __name__ == "__main__":
    main()
