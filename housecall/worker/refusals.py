"""`Refusals`: which of a principal's refusals are a line of the ledger, and how many more there were.

What must live here: counting. What must not: the ledger, and who is refused what. Whoever asks without end fills no
disk; and what she does not get is written all the same, once a minute at least for each data set that there is.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

__all__ = ["MOST_REFUSALS", "Counted", "Refusals"]

MOST_REFUSALS = 20  # of one principal in a minute, each a line of the ledger; more are counted
_MINUTE = timedelta(minutes=1)


class Counted(NamedTuple):
    """How many refusals of one principal are in no line, and of them how many by data set that there is."""

    who: Any  # a `gate.Who`
    more: int
    by_name: dict[str, int]


class _Minute:
    """One principal's, from its first refusal on."""

    def __init__(self, since: datetime) -> None:
        self.since = since
        self.lines = self.count = 0
        self.written: set[str] = set()  # data sets that a line names
        self.by_name: Counter[str] = Counter()
        self.told = False  # whether a session that ended had the rest written


class Refusals:
    """Those at one worker, of all principals; for any number of threads."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._minutes: dict[Any, _Minute] = {}

    def admits(self, who: Any, names: tuple[str, ...]) -> bool:
        """Whether one more is a line: one of the first of its minute, or the first of a data set. `names` are those of
        data sets that there are: others can be made up without end. What is no line is counted."""
        with self._lock:
            minute = self._minutes.get(who)
            if minute is None:
                minute = self._minutes[who] = _Minute(self._now())
            if minute.lines < MOST_REFUSALS or not minute.written.issuperset(names):
                minute.lines += 1
                minute.written.update(names)
                return True
            minute.count += 1
            minute.by_name.update(names)
            return False

    def over(self, ended: Any = None, *, everything: bool = False) -> list[Counted]:
        """What was counted in the minutes that are over, which is to be written now; and, once a minute, of a principal
        of whom a session has `ended`."""
        found = []
        with self._lock:
            for who, minute in list(self._minutes.items()):
                past = self._now() - minute.since >= _MINUTE
                if past:
                    del self._minutes[who]
                if minute.count and (past or everything or (who == ended and not minute.told)):
                    found.append(Counted(who, minute.count, dict(sorted(minute.by_name.items()))))
                    minute.count, minute.told = 0, True
                    minute.by_name.clear()
        return found
