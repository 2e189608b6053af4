"""How a worker's log is written: each record is one line, whatever is in it, and nobody can flood it.

What strangers send stands in texts of the log: the name of a data set, an error that repeats it. A line that began
anew within such a text could say anything of anyone, so it is here, where lines are made, that no text can begin one.
Records carry `worker`, `principal`, `session` and `event` as fields of their own (`extra=`), for whoever collects them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

__all__ = ["OneLine", "Repeats", "plain", "write_logs"]

MOST, PER_S = 200, 60.0  # records of one kind and principal in so many seconds: beyond, they are counted


def plain(text: str) -> str:
    """A text without what a terminal or a reader of lines would obey: control and direction characters as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class OneLine(logging.Formatter):
    """Formats a record as one line. A traceback follows it on lines of its own, each set in, so that none looks like a
    record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """The line, escaped; with the session's name at its end, if it is of one."""
        session = getattr(record, "session", "")
        return plain(super().formatMessage(record) + (f" (session {session})" if session else ""))

    def formatException(  # noqa: N802  # as above
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """A traceback, set in."""
        return "\n".join(f"  | {plain(line)}" for line in super().formatException(ei).split("\n"))


class Repeats(logging.Filter):
    """Lets so many records of one kind (logger, text before its arguments are put in, principal) pass in a minute. How
    many more there were is said by the first that passes after it. What is told of a principal's requests is in the
    ledger as well, so nothing but noise is lost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._counts: dict[tuple[str, str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes."""
        kind = record.name, str(record.msg), str(getattr(record, "principal", ""))
        with self._lock:
            now = self._clock()
            if now - self._since >= PER_S:
                more = sum(max(0, count - MOST) for count in self._counts.values())
                self._counts, self._since = {}, now
                if more:
                    record.msg = f"[{more:,} records like others were left out before this] {record.msg}"
            self._counts[kind] = count = self._counts.get(kind, 0) + 1
        return count <= MOST or record.levelno >= logging.ERROR


def write_logs(level: int = logging.INFO) -> None:
    """Have this process write its log to standard error: what `housecall worker up` does."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(name)s %(levelname)s %(message)s"))
    handler.addFilter(Repeats())
    logging.basicConfig(level=level, handlers=[handler])
