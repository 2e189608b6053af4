"""Every attack is refused; and each succeeds once the guard that refuses it is taken away."""

from __future__ import annotations

import by_data
import by_frames
import by_owners_word
import by_pointers
import by_programs
import by_statistics
import by_updates
import pytest
from guards import GUARDS
from hostile import ATTACKS, WHY_NONE, World

from housecall.worker import history

__all__ = ["by_data", "by_frames", "by_owners_word", "by_pointers", "by_programs", "by_statistics", "by_updates"]


@pytest.fixture(autouse=True)
def _short_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 20)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_refused(name: str) -> None:
    function, _ = ATTACKS[name]
    leaked = function(World())
    assert leaked is None, leaked


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 150
    assert {guard for _, guards in ATTACKS.values() for guard in guards} == set(GUARDS)


def test_few_need_no_guard_and_each_says_why() -> None:
    named = {name for name in WHY_NONE if not name.startswith(("the_name_", "words_by_"))}
    assert len(named) <= 20, named
