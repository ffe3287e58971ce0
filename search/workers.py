"""The workers of a study: which of them live, and what each spent.

A worker is a process on the study. It holds a lease: a counter that it moves on. An observer that has seen the
counter unchanged for the length of the lease, by its own monotonic clock, takes the worker for dead; no date or
time of day is compared. Beside an SQLite file a worker also holds a file locked, which goes with its process.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peftscape.search.account import Account
from peftscape.search.locks import Held, Lock, is_held

LEASE_S = 20.0
BEATS = 5  # a lease is renewed this many times in its length
PREFIX = "worker/"


class Workers:
    """One worker, and what it thinks of the others.

    Args:
        attrs, set_attr: the study's user attributes.
        lock: the study's.
        folder: where workers hold their files; None where only counters tell (machines that share no disk).
        account: what this worker spends.
    """

    def __init__(
        self,
        attrs: Callable[[], Mapping[str, Any]],
        set_attr: Callable[[str, Any], None],
        lock: Lock,
        folder: Path | None,
        account: Account,
        lease_s: float = LEASE_S,
    ) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.account, self.lease_s = account, lease_s
        self._attrs, self._set_attr, self._lock, self._folder = attrs, set_attr, lock, folder
        self._beats, self._seen = 0, dict[str, tuple[int, float]]()
        self._held: Held | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None  # why the lease could not be renewed

    def join(self) -> None:
        """Begin to hold a lease."""
        if self._folder is not None:
            self._held = Held(self._folder / f"{self.name}.lock")
        self.beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="peftscape-lease")
        self._thread.start()

    def rest(self) -> None:
        """Renew the lease no more. Whoever holds the study's lock must not ask for it: a renewal may wait for that."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self.lease_s)

    def leave(self) -> None:
        """End the lease and keep what was spent; after `rest`, this may be done under the study's lock."""
        self.rest()
        try:
            self.beat()
        except Exception:
            if self._held is not None:  # others cannot read that it ended, but see that its file is free
                self._held.let_go()
            raise
        if self._held is not None:
            self._held.release()

    def beat(self) -> None:
        """Renew the lease, and keep what was spent so far."""
        with self._lock():
            self._beats += 1
            value = {"beat": self._beats, "ended": self._ended.is_set(), **self.account.json()}
            self._set_attr(f"{PREFIX}{self.name}", value)

    def all(self) -> dict[str, dict[str, Any]]:
        """What every worker there ever was said last."""
        attrs = self._attrs()
        return {k.removeprefix(PREFIX): v for k, v in attrs.items() if k.startswith(PREFIX)}

    def dead(self, name: str | None, known: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a worker is gone. One that is not known never came to hold a lease."""
        if name == self.name:
            return False
        said = known.get(name or "")
        if said is None or said["ended"]:
            return True
        if (held := self._holds(name)) is not None:
            return not held
        beat, since = self._seen.get(name or "", (None, 0.0))
        if beat != said["beat"]:
            self._seen[name or ""] = (said["beat"], time.monotonic())
            return False
        return time.monotonic() - since > self.lease_s

    def lives(self, name: str) -> bool:
        """Whether another worker lives; where only its counter tells, that is watched until it moves or is dead."""
        first = self.all().get(name, {}).get("beat")
        while not self.dead(name, known := self.all()):
            if self._holds(name) or known[name]["beat"] != first:
                return True
            time.sleep(self.lease_s / BEATS / 4)
        return False

    def _holds(self, name: str | None) -> bool | None:
        """Whether a worker holds its file; None where there is none."""
        return None if self._folder is None else is_held(self._folder / f"{name}.lock")

    def bury(self, name: str, said: Mapping[str, Any]) -> None:
        """Close the account of a dead worker: what it had not saved is lost, and nothing more is to come."""
        lost = float(said.get("unsaved_s", 0.0))
        closed = {
            **said, "ended": True, "promised_s": 0.0, "promised_examples": 0, "unsaved_s": 0.0,
            "lost_s": said.get("lost_s", 0.0) + lost, "training_s": max(0.0, said.get("training_s", 0.0) - lost),
        }  # fmt: skip
        self._set_attr(f"{PREFIX}{name}", closed)
        if self._folder is not None:
            (self._folder / f"{os.path.basename(name)}.lock").unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(self.lease_s / BEATS):
            try:
                self.beat()
            except Exception as error:  # the loop meets the same error in its next write, and tells it
                self.error = error
