"""Each guard is needed: without it the attacks that it refuses succeed. The table is `guards.py`'s."""

from __future__ import annotations

import by_data
import by_frames
import by_owners_word
import by_pointers
import by_programs
import by_statistics
import by_updates
import pytest
from guards import without
from hostile import ATTACKS, World

from housecall.worker import history

__all__ = ["by_data", "by_frames", "by_owners_word", "by_pointers", "by_programs", "by_statistics", "by_updates"]

PAIRS = sorted((guard, name) for name, (_, guards) in ATTACKS.items() for guard in guards)


@pytest.fixture(autouse=True)
def _short_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 20)


@pytest.mark.parametrize(("guard", "name"), PAIRS)
def test_succeeds_without(guard: str, name: str) -> None:
    function, _ = ATTACKS[name]
    with without(guard):
        assert function(World()) is not None
