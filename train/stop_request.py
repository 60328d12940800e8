"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C ask for a checkpoint at the next micro-batch (pipelines: step)."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Holds the name of the signal that asked this process to stop, if one did.

    Ranks must agree before they act: a signal reaches them at different steps. A second Ctrl-C
    interrupts at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None
