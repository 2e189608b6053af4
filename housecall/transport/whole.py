"""`whole`: what must not be cut in the middle by Ctrl-C.

Python raises `KeyboardInterrupt` between any two instructions of the main thread. A frame that is cut in the middle
would leave a worker, or a session's account of it, in no known state. Within `whole()` the interrupt waits; it comes at
the end.
"""

from __future__ import annotations

import threading

# `signal.signal` without its enumerations, whose look-ups cost more than all else of a small frame.
from _signal import SIGINT as _SIGINT  # type: ignore[import-not-found]  # the C module behind it, which no stubs name
from _signal import signal as _set_handler
from types import FrameType
from typing import Any

__all__ = ["whole"]

_main = threading.main_thread()
_depth = 0  # on the main thread: within another, one need not begin anew


class whole:  # noqa: N801  # used as a function: `with whole():`
    """Within: Ctrl-C waits."""

    __slots__ = ("_before", "_counts", "_noted")

    def __enter__(self) -> None:
        global _depth
        self._counts = threading.current_thread() is _main
        if self._counts:
            _depth += 1
            if _depth == 1:
                self._noted: list[tuple[int, FrameType | None]] = []
                self._before: Any = _set_handler(_SIGINT, lambda number, frame: self._noted.append((number, frame)))

    def __exit__(self, *error: object) -> None:
        global _depth
        if not self._counts:
            return
        _depth -= 1
        if _depth == 0:
            _set_handler(_SIGINT, self._before)
            if self._noted and callable(self._before):
                self._before(*self._noted[-1])
