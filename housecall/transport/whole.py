"""`whole`: what must not be cut in the middle by Ctrl-C.

Python raises `KeyboardInterrupt` between any two instructions of the main thread. A frame that is cut in the middle
would leave a worker, or a session's account of it, in no known state. Within `whole()` the interrupt waits; it comes at
the end.
"""

from __future__ import annotations

# `signal.signal` without its enumerations, whose look-ups cost more than all else of a small frame.
import threading
from _signal import SIGINT as _SIGINT  # type: ignore[import-not-found]  # the C module behind it, which no stubs name
from _signal import signal as _set_handler
from _thread import get_ident
from types import FrameType
from typing import Any

__all__ = ["whole"]

_main = threading.main_thread().ident
_depth = 0  # on the main thread: within another, one need not begin anew
_before: Any = None  # what handles an interrupt otherwise
_noted: list[tuple[int, FrameType | None]] = []


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append((number, frame))


class whole:  # noqa: N801  # used as a function: `with whole():`
    """Within: Ctrl-C waits."""

    __slots__ = ("_counts",)

    def __enter__(self) -> None:
        global _depth, _before
        self._counts = get_ident() == _main
        if self._counts:
            if _depth == 0:
                _before = _set_handler(_SIGINT, _note)  # before it counts: an interrupt may come now, for the last time
            _depth += 1

    def __exit__(self, *error: object) -> None:
        global _depth
        if not self._counts:
            return
        _depth -= 1
        if _depth == 0:
            _set_handler(_SIGINT, _before)
            if _noted:
                last = _noted[-1]
                _noted.clear()
                if callable(_before):
                    _before(*last)
