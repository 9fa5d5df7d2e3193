"""SIGINT and SIGTERM end the command. A handler can only raise an exception in the main thread, and that is lost inside
a finalizer, a callback of a library, or an ``except`` that swallows everything. So a thread of its own reads signals,
too: it has the exception raised again as long as nobody unwinds, and ends a process that still runs after a while."""

import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.2  # seconds after which a lost exception is raised again
GRACE = 10.0  # seconds for unwinding: temporary files are removed, TensorBoard's threads end


class Stopped(BaseException):
    """SIGINT or SIGTERM. Not a KeyboardInterrupt, which Lightning's trainer answers with exit status 1 of its own."""


class Stop:
    """State of signal handling: ``number`` is None until a signal came; once ``over`` is set, none raises any more."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.over = False
        self._unwinding: Callable[[], Stopped | None] = lambda: None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: unwind, so that temporary files are removed; another signal does not stop that."""
        self.number = self.number or number
        if not self.over and self._unwinding() is None:
            raise self._stopped()

    def _stopped(self) -> Stopped:
        # Not a local of the frame that raises: the exception would hold itself and never be seen to be gone.
        stopped = Stopped(self.number)
        self._unwinding = weakref.ref(stopped)
        return stopped

    def on_unraisable(self, lost: Any) -> None:
        """Python's hook for exceptions that cannot be raised where they strike."""
        if isinstance(lost.exc_value, Stopped):
            self._unwinding = lambda: None
        elif self.number is None:  # else the finalizer of something that the signal left half-made
            sys.__unraisablehook__(lost)

    def watch(self, wake: socket.socket, done: threading.Event, main: int) -> None:
        """Wait for a signal; then see to it that the main thread ends."""
        while self.number is None and not done.is_set():
            for number in wake.recv(64):
                if number in SIGNALS:
                    self.number = self.number or number
        for _ in range(round(GRACE / AGAIN)):
            if done.wait(AGAIN):
                return
            signal.pthread_kill(main, signal.SIGINT)  # Lightning puts a handler of its own before ours for SIGTERM
        if not done.is_set() and self.number is not None:
            print(
                f"interrupted by {signal.Signals(self.number).name}; the command did not end within {GRACE:g} seconds "
                "and was killed. A run folder that holds the file 'unfinished' is not finished; the next run removes "
                "temporary files.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(128 + self.number)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM raise ``Stopped`` in the main thread, until ``over`` is set."""
    stop, done = Stop(), threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {number: signal.signal(number, stop.on_signal) for number in SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, stop.on_unraisable
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=stop.watch, args=(receiver, done, threading.get_ident()), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        stop.over = True
        done.set()
        sender.setblocking(True)
        sender.send(b"\0")
        watcher.join()  # before the handlers change back: it sends signals
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        receiver.close()
        sender.close()
