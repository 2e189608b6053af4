"""Several things at once, each on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0


def at_once(*works: Callable[[], Any]) -> None:
    """Begin all of these at one moment and wait for them. What one of them raises is raised; a deadlock fails."""
    ready = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def guarded(work: Callable[[], Any]) -> None:
        ready.wait()
        try:
            work()
        except BaseException as error:  # it is raised below, on the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if errors:
        raise errors[0]
