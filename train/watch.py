"""A thread of each rank that sees what its main thread, which waits for the others, cannot."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time

import torch.distributed as dist

from parallel.torch_private import default_store, own_store
from parallel.world import World
from train.stop_request import StopRequest

log = logging.getLogger("gemwright")

ERROR = "gemwright/error"
"""Set in the store by the first rank that leaves with an error."""
_BEAT_SECONDS = 2.0
_GRACE_SECONDS = 10.0
"""What a rank that waits for one that left gets to end by itself."""


class Watch:
    """Watches the launcher, the next rank, and errors of any rank; only where torchrun started the ranks.

    The end of the launcher is a request to stop. A rank that has not answered for `silence` seconds is named by the
    one before it. A rank whose main thread waits for one that left with an error ends too.
    """

    def __init__(self, world: World, stop: StopRequest, silence: float) -> None:
        self.world, self.stop, self.silence = world, stop, silence
        self._launcher, self._closed = os.getppid(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if dist.is_torchelastic_launched():
            # A signal is noted here even while the main thread waits inside torch, where Python runs no handler.
            self._signals, heard = socket.socketpair()
            self._signals.setblocking(False)
            heard.setblocking(False)
            self._heard = heard  # or it would close
            signal.set_wakeup_fd(heard.fileno(), warn_on_full_buffer=False)
            default_store().set(_key(world.rank), self._sign(0))
            self._thread.start()

    def close(self) -> None:
        """Stop watching, at the end of a run."""
        self._closed.set()
        if self._thread.is_alive():
            signal.set_wakeup_fd(-1)
            self._thread.join()

    def _run(self) -> None:
        store: dist.Store | None = own_store()  # the main thread's connection may be waiting
        neighbour = _Neighbour((self.world.rank + 1) % self.world.size, self.silence)
        beat, told, left = 0, False, 0.0
        while not self._closed.wait(_BEAT_SECONDS):
            if os.getppid() != self._launcher and not self.stop:
                self.stop.signal_name = "the end of its launcher"
            told = told or self._told()
            beat += 1
            try:
                if store is None:
                    continue
                store.set(_key(self.world.rank), self._sign(beat))
                neighbour.look(store, told or bool(self.stop))
                left += _BEAT_SECONDS if store.check([ERROR]) else 0
            except RuntimeError:  # the launcher kept it, and is gone
                store = None
            if left > _GRACE_SECONDS:
                os._exit(1)

    def _sign(self, beat: int) -> str:
        return f"{beat}/{socket.gethostname()}/{os.getpid()}"

    def _told(self) -> bool:
        try:
            return bool(self._signals.recv(64))
        except BlockingIOError:
            return False


class _Neighbour:
    """What is known of the rank that this one watches."""

    def __init__(self, rank: int, silence: float) -> None:
        self.rank, self.silence = rank, silence
        self._last, self._since, self._named, self._warned = "", time.monotonic(), False, False

    def look(self, store: dist.Store, told_to_stop: bool) -> None:
        """Name it if it is silent for too long, and say what that means for a stop that was asked for."""
        if not store.check([_key(self.rank)]):
            return
        found, now = store.get(_key(self.rank)).decode(), time.monotonic()
        if found != self._last:
            if self._named:
                log.error("rank %d answers again", self.rank)
            self._last, self._since, self._named = found, now, False
        _, host, pid = found.split("/")
        if now - self._since < self.silence:
            return
        if not self._named:
            self._named = True
            log.error(
                "rank %d (process %s on %s) has not answered for %.0f s, and the others wait for it; it may be "
                "stopped, out of memory or waiting for its file system",
                self.rank,
                pid,
                host,
                now - self._since,
            )
        if told_to_stop and not self._warned:
            self._warned = True
            log.error(
                "told to stop, but rank %d does not answer, so nothing more can be saved: the run goes on from its "
                "last checkpoint",
                self.rank,
            )


def _key(rank: int) -> str:
    return f"gemwright/beat/{rank}"
