"""A worker as its caller knows it: a name, the session that reaches it, and what can be asked of it.

`VirtualWorker` is one; a worker behind a network will be another, with the same methods.
"""

from __future__ import annotations

import weakref

from ..errors import UsageError
from ..wire.messages import Clear, Found, Open, Search, Tag
from .calls import point
from .owned import OwnedDataset
from .session import Session
from .slot import Slot
from .tensor import PointerTensor

__all__ = ["Location"]


class Location:
    """What pointers name as their `.location`. `id` is printed; `session` carries what is asked."""

    def __init__(self, id: str, session: Session) -> None:
        self.id = id
        self.session = session
        self._tags: dict[int, Tag] = {}
        self._tagged: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()

    def __str__(self) -> str:
        return self.id

    @property
    def synchronous(self) -> bool:
        """Whether every call waits for its result: slow, and errors stand at the line that makes them."""
        return self.session.synchronous

    @synchronous.setter
    def synchronous(self, on: bool) -> None:
        self.session.synchronous = on

    def tag(self, pointer: PointerTensor, *tags: str) -> PointerTensor:
        """Add tags ("#mnist") to a value here, for `search` to find; they last as long as somebody points at it."""
        for tag in tags:
            if not tag.startswith("#") or len(tag) < 2:
                raise UsageError(f"a tag begins with '#', such as '#mnist'; found {tag!r}")
        known = self._known(pointer)
        return self._tell(pointer, Tag(known.id, (*known.tags, *tags), known.description))

    def describe(self, pointer: PointerTensor, description: str) -> PointerTensor:
        """Give a value here a description in words."""
        known = self._known(pointer)
        return self._tell(pointer, Tag(known.id, known.tags, description))

    def search(self, *tags: str) -> list[PointerTensor | OwnedDataset]:
        """What carries all of these tags here: pointers to values of this session, in order of tagging, then the data
        sets that the worker's owner registered. One round trip; looking uses none of their data, and asks no policy."""
        found = self.session.ask(Search(tags))
        if not isinstance(found, Found):
            return []
        alive = [self._tagged.get(info.id) for info in found.slots]
        values = [point(PointerTensor, slot) for slot in alive if slot is not None]
        return [*values, *(OwnedDataset(self, owned) for owned in found.owned)]

    def dataset(self, name: str) -> OwnedDataset:
        """The data set that the worker's owner registered under this name. Raises `OperatorError` if there is none."""
        found = self.session.ask(Open(name))
        assert isinstance(found, Found)
        return OwnedDataset(self, found.owned[0])

    def clear(self) -> None:
        """Free every value this session holds here. Pointers that are left point at nothing, and say so."""
        self._tags.clear()
        self.session.forget()
        self.session.tell(Clear())
        self.session.wait()

    def _known(self, pointer: PointerTensor) -> Tag:
        if pointer.location is not self:
            raise UsageError(f"this tensor is at '{pointer.location.id}', not at '{self.id}'")
        ref: int = pointer._slot.id
        known = self._tags.get(ref)
        return known if known is not None else Tag(ref, (), "")

    def _tell(self, pointer: PointerTensor, tag: Tag) -> PointerTensor:
        self._tagged[tag.id] = pointer._slot
        self._tags = {ref: known for ref, known in self._tags.items() if ref in self._tagged}
        self._tags[tag.id] = tag
        self.session.tell(tag)
        return pointer
