"""The architecture on one page.

A scientist's *session* holds pointers: each is a `Ref` (which slot at the worker) and a `TensorType` (what
torch must know to go on without the value). Whatever she does becomes messages in a `Frame`, a `Transport`
carries frames to a worker in order, and every frame is answered by one `Reply`:

    pointers ── Frame(Put, Call, Drop, Fetch, ...) ──> Transport ──> worker
    pointers <── Reply(values, types, failures) ────── Transport <── worker

This file knows neither torch nor any other file of the package.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

__all__ = ["PUBLIC", "Door", "Label", "Ref", "Struct", "TensorType", "Transport", "Unit"]

Unit = Literal["record", "person"]  # of privacy: what is protected, one record, or all records of one person


class Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What travels: an array of its fields in their order, after its tag. One field too many is an error, never
    something that one side passes over."""


class Ref(Struct, frozen=True, tag="ref", tag_field="t", gc=False):
    """A slot in the store of one session at one worker, or a name bound inside a program."""

    id: int


class TensorType(Struct, frozen=True, tag="type", tag_field="t"):
    """All that torch asks of a tensor besides its elements.

    `dtype` is torch's name without the prefix ("float32"); `stride` and `offset` count elements; `conj` and
    `neg` are torch's lazy conjugate and negative bits: an operator that ignores them is silently wrong.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    device: str = "cpu"
    conj: bool = False
    neg: bool = False

    def __str__(self) -> str:
        """As printed in programs: `float32[64, 10]`."""
        place = "" if self.device == "cpu" else f" @{self.device}"
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{place}"


class Label(Struct, frozen=True, tag="label", tag_field="t"):
    """From which owned data sets a value derives: their names, sorted. It follows every operation and every alias of a
    storage. A value that derives from none is public: its own principal brought or made it.

    `persons` are those of them whose unit of privacy is a person, sorted; of the others it is a record."""

    sources: tuple[str, ...] = ()
    persons: tuple[str, ...] = ()

    def __or__(self, other: Label) -> Label:
        """What derives from both."""
        if self is other or not other.sources:
            return self
        if not self.sources:
            return other
        if self == other:
            return self
        both = Label(_joined(self.sources, other.sources), _joined(self.persons, other.persons))
        return self if both == self else other if both == other else both  # what derives from it shares one label

    def unit(self, source: str) -> Unit:
        """The unit of privacy of one of its data sets."""
        return "person" if source in self.persons else "record"

    def __bool__(self) -> bool:
        return bool(self.sources)

    def __str__(self) -> str:
        """As printed: `heart (person) + labs`, or `public`."""
        names = [f"{name} (person)" if name in self.persons else name for name in self.sources]
        return " + ".join(names) or "public"


def _joined(some: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({*some, *others}))


PUBLIC = Label()


class Door(Protocol):
    """A worker's side of one session: the only way in."""

    def handle(self, frame: Any) -> Any:
        """Do what a `wire.messages.Frame` says, in its order, and return its `Reply`. Never raises for
        what a frame contains: a failure is part of the reply."""

    def close(self) -> None:
        """End the session: its slots are freed."""


class Transport(Protocol):
    """Carries one session's frames to one worker: in order, each exactly once. Frames are numbered from 1.

    `frame_messages`: after how many messages a frame had better leave. `frame_bytes`: how many of tensors it may bring.
    `remote`: values travel, they are not shared."""

    frame_messages: int
    frame_bytes: int
    remote: bool

    def send(self, frame: Any) -> None:
        """Take a frame; may return before the worker has seen it. Never waits for a reply."""

    def start(self) -> None:
        """Let what was sent run now, beside the caller: she is about to wait for another worker."""

    def wait(self) -> None:
        """Wait until `receive` need not; Ctrl-C may end that, and nothing is lost. Raises `WorkerGone` like it."""

    def receive(self) -> Any:
        """Wait for the reply to the oldest frame not yet answered, and return it.

        Raises `WorkerGone` when none will come."""

    def close(self) -> None:
        """End the session; calling it twice is harmless."""
