"""A session: one ordered, asynchronous stream of messages to one worker. Nothing waits that need not.

Whatever is done to a pointer becomes a message in the outbox; the outbox leaves as a frame when it holds
`transport.frame_messages` or when somebody waits. A caller waits only where Python needs a value.

NOTE [Lifetimes]
A `Slot` is the one object that stands for a value at the worker; pointers that alias it (`detach`) share it.
When the last of them dies, from whichever thread, also the garbage collector's, also at exit, the slot puts
a `Drop` into the outbox, *after* every call that used it: appending to a deque is atomic and needs no lock.
Finalizers stand here and not on the tensor, since modules swap what a tensor object holds.

NOTE [Late errors]
A call is sent long before it fails, so each message is queued beside the line that issued it. The lines of a
frame are kept until its reply has come, then only those of calls that failed.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import secrets
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from types import CodeType
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from ..errors import OperatorError, PolicyError, ProtocolError, UsageError, WorkerGone
from ..program.call import Call, Items, refs
from ..program.typing import type_of
from ..transport.arrays import share
from ..types import Ref, TensorType, Transport
from ..wire.messages import (
    Array,
    Describe,
    Drop,
    Failure,
    Fetch,
    Frame,
    Message,
    Put,
    Reply,
    Result,
    Seed,
    Types,
    Value,
)
from .kept import Kept
from .randomness import Follower

__all__ = ["Session", "Site", "Slot", "caller", "is_callers"]


Answer = TypeVar("Answer", Types, Value)
LARGE_BYTES = 1 << 28  # of tensors in one frame; a larger one travels alone


class Site(NamedTuple):
    """A line of the caller's own code. Kept as code and instruction: the line is looked up if it is wanted."""

    code: CodeType
    instruction: int

    def __str__(self) -> str:
        line = next((n for start, end, n in self.code.co_lines() if start <= self.instruction < end and n), 0)
        name = self.code.co_filename
        source = linecache.getline(name, line).strip()
        return f"{name}:{line} in {self.code.co_name}" + (f": {source}" if source else "")


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_inside: dict[str, bool] = {}


def is_callers(filename: str) -> bool:
    """Whether a file belongs neither to torch nor to this package."""
    return not filename.startswith((_HERE, _TORCH))


def caller(depth: int = 1) -> Site | None:
    """The innermost line that belongs neither to torch nor to this package, from `depth` frames up."""
    frame: Any = sys._getframe(depth)
    while frame is not None:
        code = frame.f_code
        try:
            inside = _inside[code.co_filename]
        except KeyError:
            inside = _inside[code.co_filename] = code.co_filename.startswith((_HERE, _TORCH))
        if not inside:
            return Site(code, frame.f_lasti)
        frame = frame.f_back
    return None


class Slot:
    """One value at a worker. Dies with the last pointer to it, and frees the value then."""

    __slots__ = ("__weakref__", "id", "outbox", "ref", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.outbox = session.outbox
        self.id = next(session.ids)
        self.ref = Ref(self.id)

    def __del__(self) -> None:
        self.outbox.append((Drop(self.id), None))


def _forget_unused(messages: list[Message]) -> int:
    """A value that was sent and dropped again before anything used it need not travel: its `Put` becomes a `Drop`.

    So the gradients that go along with a model cost nothing where `zero_grad` follows. Returns the bytes of the
    elements that do travel."""
    unused: dict[int, int] = {}
    travelling = 0
    for index, message in enumerate(messages):
        kind = type(message)
        if kind is Put:
            unused[message.id] = index  # type: ignore[union-attr]  # `kind` says it is a Put
            travelling += message.value.data.nbytes  # type: ignore[union-attr]  # as above
        elif not unused:
            continue
        elif kind is Drop:
            put = unused.pop(message.id, None)  # type: ignore[union-attr]  # as above
            if put is not None:
                travelling -= messages[put].value.data.nbytes  # type: ignore[union-attr]  # as above
                messages[put] = message
        elif kind is Call:
            for arg in (*message.args, *message.kwargs.values()):  # type: ignore[union-attr]  # as above
                for ref in refs(arg) if type(arg) is Items else (arg.id,) if type(arg) is Ref else ():
                    unused.pop(ref, None)
        else:
            unused.clear()
    return travelling


class Session:
    """One principal's stream to one worker. `location` is the worker as the caller knows it (its `.id` is
    printed); `synchronous` waits after every call: slow, and errors stand where they are made."""

    live: ClassVar[weakref.WeakSet[Session]] = weakref.WeakSet()

    def __init__(self, transport: Transport, location: Any, *, synchronous: bool = False) -> None:
        self.transport = transport
        self.location = location
        self.synchronous = synchronous
        # Ids start at random, from the system's generator: two sessions' ids do not look alike, and reseeding
        # `random` cannot make them collide. Within the session they count, so none comes twice.
        self.ids = itertools.count(10**10 + secrets.randbelow(8 * 10**10))
        self.outbox: deque[tuple[Message, Site | None]] = deque()
        self._frame_messages = transport.frame_messages
        self.frames = 0
        self.waits = 0
        self.bytes_sent = 0  # elements of tensors, either way; the calls themselves are small
        self.bytes_fetched = 0
        self.follower = Follower()
        self._kept = Kept()
        self._queued_bytes = 0  # of tensors, since the last frame left
        self._sites: dict[int, list[Site | None]] = {}
        self._failed: dict[tuple[int, int], Site | None] = {}
        self._latest: Failure | None = None  # of the last wait
        self._lock = threading.RLock()
        Session.live.add(self)

    # -- issuing ------------------------------------------------------------------------------------------

    def issue(self, call: Call) -> None:
        """Queue a call. Returns at once, unless the session is synchronous."""
        self.outbox.append((call, caller(4)))  # above: dispatch, __torch_dispatch__
        if self.synchronous:
            self.wait()
            if self._latest is not None:
                raise self.error(self._latest)
        elif len(self.outbox) >= self._frame_messages:
            self.flush()

    def put(self, tensor: torch.Tensor, site: Site | None = None) -> tuple[Slot, TensorType]:
        """Queue a copy of a local tensor, made when either side first writes; return its slot and type there."""
        if self._kept:
            kept = self._kept.slot(tensor)
            if kept is not None:
                return kept
        array = share(tensor)
        self._make_room(array.data.untyped_storage().nbytes())  # a repeated dimension travels once
        slot = Slot(self)
        self.outbox.append((Put(slot.id, array), site or caller()))
        return slot, type_of(array.data)

    def _make_room(self, nbytes: int) -> None:
        """Large tensors travel in frames of their own. Raises `UsageError` for one that the worker would refuse."""
        most = self.transport.frame_bytes
        if nbytes > most:
            raise UsageError(
                f"worker '{self.location.id}' takes at most {most:,} bytes of tensors at once, and this one has "
                f"{nbytes:,}: send it in parts, or let the worker's owner raise frame_mb in worker.toml"
            )
        self._queued_bytes += nbytes
        if self._queued_bytes > LARGE_BYTES or self._queued_bytes > most:
            self.flush()
            self._queued_bytes = nbytes

    def tell(self, message: Message) -> None:
        """Queue a message that asks for nothing."""
        self.outbox.append((message, caller()))

    def seed(self) -> None:
        """Before a random call: let the worker's generator follow the caller's. See `randomness`."""
        state = self.follower.next_state()
        if state is not None:
            self.outbox.append((Seed(share(state)), None))

    def flush(self) -> None:
        """Send what is queued as one frame."""
        with self._lock:
            messages: list[Message] = []
            sites: list[Site | None] = []
            outbox = self.outbox
            self._queued_bytes = 0
            sends = False
            while outbox:
                message, site = outbox.popleft()
                messages.append(message)
                sites.append(site)
                sends = sends or type(message) is Put
            if messages:
                if sends:
                    self.bytes_sent += _forget_unused(messages)
                self.frames += 1
                self._sites[self.frames] = sites
                try:
                    self.transport.send(Frame(self.frames, tuple(messages)))
                except WorkerGone as error:
                    raise self._gone(error) from None

    @property
    def busy(self) -> bool:
        """Whether work is queued or under way; dropping is no work."""
        return bool(self._sites) or any(type(message) is not Drop for message, _ in tuple(self.outbox))

    # -- waiting ------------------------------------------------------------------------------------------

    def ask(self, message: Message) -> Result:
        """Queue a message that asks, wait, and return its result."""
        with self._lock:
            self.outbox.append((message, caller()))
            results = self.wait()
            if not results and self._latest is not None:
                raise self.error(self._latest)
            if not results:
                raise ProtocolError(f"worker '{self.location.id}' did not answer a {type(message).__name__.lower()}")
            return results[-1]

    def wait(self) -> list[Result]:
        """Wait for everything queued so far; other workers with work to do run meanwhile.

        Raises `OperatorError` if a write failed that nobody would notice otherwise."""
        with self._lock:
            self.flush()
            for other in Session.live:
                if other is not self and other.busy:
                    other._start()
            results: list[Result] = []
            self._latest = None
            unnoticed: list[Failure] = []
            if self._sites:
                self.waits += 1
            while self._sites:
                reply = self._received()
                results.extend(reply.results)
                unnoticed.extend(self._settle(reply))
            if unnoticed:
                raise self.error(unnoticed[0])
            return results

    def fetch(self, slots: Iterable[Slot]) -> list[torch.Tensor]:
        """The values of these slots, in one round trip. Raises `OperatorError` for the first that failed."""
        slots = tuple(slots)
        found = self._asked(Fetch(tuple(slot.id for slot in slots)), Value)
        for item in found.arrays:
            if isinstance(item, Failure):
                raise self.error(item)
        values = [item.data for item in found.arrays if isinstance(item, Array)]
        if len(values) != len(slots):
            raise ProtocolError(f"worker '{self.location.id}' gave {len(values)} values for {len(slots)} slots")
        self.bytes_fetched += sum(value.nbytes for value in values)
        if self.transport.remote:
            self._kept.keep(slots, values)
        return values

    def describe(self, slots: Iterable[Slot]) -> list[Any]:
        """The types of these slots, `None` for a hole. Raises `OperatorError` for the first that failed."""
        slots = tuple(slots)
        found = self._asked(Describe(tuple(slot.id for slot in slots)), Types)
        for item in found.types:
            if isinstance(item, Failure):
                raise self.error(item)
        if len(found.types) != len(slots):
            raise ProtocolError(f"worker '{self.location.id}' gave {len(found.types)} types for {len(slots)} slots")
        return list(found.types)

    def _asked(self, message: Message, kind: type[Answer]) -> Answer:
        found = self.ask(message)
        if not isinstance(found, kind):
            what = f"a {type(found).__name__}, expected a {kind.__name__}"
            raise ProtocolError(f"worker '{self.location.id}' answered {type(message).__name__} with {what}")
        return found

    def error(self, failure: Failure) -> OperatorError | PolicyError:
        """The error for a failure: where it ran, what ran, and which line issued it; or that an owner said no."""
        if failure.operator == "release":
            return PolicyError(f"worker '{self.location.id}': {failure.reason}")
        site = self._failed.get((failure.frame, failure.index))
        return OperatorError(self.location.id, failure.operator, failure.reason, str(site) if site else "")

    def forget(self) -> None:
        """Let go of values that came home but whose slots still stand at the worker. See `kept`."""
        self._kept.clear()

    def close(self) -> None:
        """End the session; the worker frees its slots."""
        Session.live.discard(self)
        self._kept.clear()
        self.outbox.clear()
        self.transport.close()

    def _start(self) -> None:
        """Let what is queued run beside whoever waits for another session. A session that another thread is busy
        with is left to that thread: to wait for its lock while holding one's own is how two threads get stuck. That
        its worker is gone is for whoever waits for it to hear."""
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(WorkerGone):
                    self.flush()
                    self.transport.start()
            finally:
                self._lock.release()

    def _received(self) -> Reply:
        try:
            reply: Reply = self.transport.receive()
            return reply
        except WorkerGone as error:
            raise self._gone(error) from None

    def _gone(self, error: WorkerGone) -> WorkerGone:
        """The same error with what was lost; nobody starts this session's work any more."""
        Session.live.discard(self)
        sites = [site for frame in self._sites.values() for site in frame if site is not None]
        if not sites:
            return error
        return WorkerGone(f"{error}. Unanswered: {len(sites)} messages, the oldest issued at {sites[0]}")

    def _settle(self, reply: Reply) -> list[Failure]:
        """Forget the lines of an answered frame but those of failures; return the failures nobody would see."""
        sites = self._sites.pop(reply.number, None)
        if sites is None:
            raise ProtocolError(f"worker '{self.location.id}' answered frame {reply.number}, which is not open")
        for failure in reply.failures:
            if failure.frame == reply.number:
                if failure.index >= len(sites):
                    raise ProtocolError(
                        f"worker '{self.location.id}' says that message {failure.index} failed; no such"
                    )
                self._failed[(failure.frame, failure.index)] = sites[failure.index]
            self._latest = failure
        return [failure for failure in reply.failures if failure.writes]
