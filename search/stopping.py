"""How a search is stopped: by Ctrl-C or SIGTERM between two steps, and by the clock where a step hangs.

A signal asks; the search stops at the next step, where what is in flight can be saved. It is told twice, or goes on
for too long: then it is interrupted where it is; and if nothing of Python runs any more, a thread ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED, HUNG = 130, 5
# Ctrl-C ends a search within 10 s: 5 to come to the end of a step, 3 to save, then whatever it is doing.
ASK_S, SAVE_S = 5.0, 3.0
# A step that does not react to its time limit ends with the process, this much later.
GRACE_S = 3.0
_LOOK_S = 0.1
_GOES_ON = "interrupted; the same command goes on from here"


class HangError(RuntimeError):
    """Work took longer than its time limit."""


class Stopped(KeyboardInterrupt):
    """A search was asked to stop, and does between two steps, where all its lanes are whole."""


class Stop:
    """Stops one search. Signals reach the main thread only: elsewhere it only holds the flag.

    Used as a context manager around the whole search.
    """

    def __init__(self) -> None:
        self.asked = False
        self._main = False  # whether it has the main thread, and with it the signals
        self._before: dict[int, Any] = {}
        self._limit_s: float | None = None
        self._watch = _Watch()

    def __enter__(self) -> Stop:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup lets a search outlive its terminal
                    self._before[number] = signal.signal(number, self._ask)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
            self._watch.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.clear()
        if self._main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._watch.close()
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._main = False

    def check(self) -> None:
        """Raises Stopped if the search was asked to stop."""
        if self.asked:
            raise Stopped

    @contextmanager
    def limit(self, seconds: float | None) -> Iterator[None]:
        """Raises HangError if the block takes longer; ends the process if it does not even notice.

        Once the search was asked to stop, the clock of that goes on instead.
        """
        if seconds is None or not self._main or self.asked:
            yield
            return
        self._limit_s = seconds
        signal.setitimer(signal.ITIMER_REAL, seconds)
        self._watch.set(seconds + GRACE_S, HUNG, f"a step did not end within {seconds:.0f} s, nor could be stopped")
        try:
            yield
        finally:
            self._limit_s = None
            if not self.asked:
                signal.setitimer(signal.ITIMER_REAL, 0)
                self._watch.clear()

    def ask(self, within_s: float) -> None:
        """Stop at the next step, from any thread; the process ends after so many seconds at the latest."""
        self.asked = True
        self._watch.set(within_s, INTERRUPTED, "the process that this one worked for has ended")

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        signal.setitimer(signal.ITIMER_REAL, ASK_S)
        self._watch.set(ASK_S + SAVE_S, INTERRUPTED, _GOES_ON)

    def _late(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        if self._limit_s is not None:
            raise HangError(f"it did not end within {self._limit_s:.0f} s")


class _Watch:
    """Ends the process at a deadline, from a thread: Python's signal handlers wait until what is in C has ended.

    The system tells it of signals through a pipe, which no busy main thread holds up.
    """

    def __init__(self) -> None:
        self._deadline: tuple[float, int, str] | None = None
        self._pipe: tuple[int, int] | None = None
        self._before = -1
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin to hear of signals; in the main thread."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._start()

    def close(self) -> None:
        self._deadline = None
        if self._pipe is not None:
            signal.set_wakeup_fd(self._before)
            pipe, self._pipe = self._pipe, None
            if self._thread is not None:
                self._thread.join(timeout=2 * _LOOK_S)
            for end in pipe:
                os.close(end)

    def set(self, seconds: float, status: int, message: str) -> None:
        self._deadline = (time.monotonic() + seconds, status, message)
        self._start()

    def clear(self) -> None:
        self._deadline = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="peftscape-watch")
            self._thread.start()

    def _run(self) -> None:
        # Set and cleared at every step: it looks now and then instead of being woken each time.
        while True:
            pipe = self._pipe
            if pipe is None:
                time.sleep(_LOOK_S)
            elif select.select([pipe[0]], [], [], _LOOK_S)[0]:
                heard = set(os.read(pipe[0], 4096)) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
                if heard:
                    self.set(ASK_S + SAVE_S, INTERRUPTED, _GOES_ON)
            if pipe is not None and self._pipe is None:
                self._thread = None
                return
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline[0]:
                os.write(2, f"{deadline[2]}\n".encode())
                os._exit(deadline[1])
