"""What somebody else holds, as long as they do: a `weakref.WeakSet` in fewer steps, since each wait asks."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

__all__ = ["Live"]

Held = TypeVar("Held")


class _Ref(weakref.ref[Held]):
    """A weak reference, and the key under which it is kept."""

    __slots__ = ("key",)
    key: int


class Live(Generic[Held]):
    """Objects that are not over. What has died is put away by who asks, never by a callback: the collector may come
    while a container is copied."""

    def __init__(self) -> None:
        self._refs: dict[int, _Ref[Held]] = {}

    def add(self, one: Held) -> None:
        """From now on it is live."""
        ref = _Ref(one)
        ref.key = id(one)
        self._refs[ref.key] = ref

    def discard(self, one: Held) -> None:
        """From now on it is not."""
        self._refs.pop(id(one), None)

    def others(self, but: Held) -> list[Held]:
        """All but one."""
        found = []
        for ref in list(self._refs.values()):
            one = ref()
            if one is None:
                if self._refs.get(ref.key) is ref:  # else the id is another's by now
                    self._refs.pop(ref.key, None)
            elif one is not but:
                found.append(one)
        return found
