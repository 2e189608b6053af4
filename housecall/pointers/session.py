"""A session: one ordered, asynchronous stream of messages to one worker. Nothing waits that need not.

Calls on pointers become steps of a trace (`trace`), all else a message in the outbox. What is queued leaves as a frame
when it is `transport.frame_messages` or when somebody waits. A caller waits only where Python needs a value.

NOTE [Unused values]
A value that was sent waits until something uses it, or somebody waits. One that is dropped before never travels, so the
gradients that go along with a model cost nothing where `zero_grad` follows. And to a remote worker a large one travels
while the worker does what was issued before its first use.

NOTE [Late errors]
A call is sent long before it fails, so each message is queued beside the line that issued it, a trace beside a line for
each call. The lines of a frame are kept until its reply has come, then only those of calls that failed.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import weakref
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from ..errors import CodecError, HousecallError, OperatorError, PolicyError, ProtocolError, UsageError, WorkerGone
from ..program.call import Call, Program, call_text, printed_names
from ..program.outcome import Spec, spec_of
from ..transport.arrays import share
from ..transport.parcel import HeadTooLong
from ..transport.whole import whole
from ..types import Ref, TensorType, Transport
from ..wire.codec import MAX_HEAD_BYTES
from ..wire.messages import (
    Array,
    Define,
    Describe,
    Drop,
    Failure,
    Fetch,
    Frame,
    Heard,
    Message,
    Put,
    Reply,
    Result,
    Run,
    Seed,
    Types,
    Value,
)
from .kept import Kept
from .live import Live
from .randomness import Follower
from .site import Site, Spot, caller, caller_again
from .slot import Mark, Slot
from .trace import Trace, Tree, freed

__all__ = ["Cut", "Session"]


_saved_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks

Answer = TypeVar("Answer", Types, Value)
LARGE_BYTES = 1 << 28  # of tensors in one frame; a larger one travels alone
FRAME_BYTES = 1 << 10  # that a frame adds to the one message it has
CUT_BYTES = 1 << 18  # of a value that travels while the worker does what was issued before its first use


class Cut(Exception):  # an event, not an error: `dispatch` begins the call anew
    """What was issued had better leave before the call at hand, which uses a large value that has yet to travel."""


class Ran(NamedTuple):
    """A program that was recorded and is run: the line that runs it stands for its calls."""

    program: Program
    site: Site | None


class Later(NamedTuple):
    """A tensor that was sent while its value was still at another worker."""

    tensor: torch.Tensor


# A message, with the line that issued it: a `Site`, a `Ran`, or a list of lines for a trace.
Issued = tuple[Any, Any]


class Session:
    """One principal's stream to one worker. `location` is the worker as the caller knows it (its `.id` is
    printed); `synchronous` waits after every call: slow, and errors stand where they are made."""

    live: ClassVar[Live[Session]] = Live()

    def __init__(self, transport: Transport, location: Any, *, synchronous: bool = False) -> None:
        self.transport = transport
        self.location = location
        self.guarded = transport.remote  # whether the worker holds it to limits, or lends it an owner's data
        # Ids start at random, from the system's generator: two sessions' ids do not look alike, and reseeding
        # `random` cannot make them collide. Within the session they count, so none comes twice.
        self.ids = itertools.count(10**10 + secrets.randbelow(8 * 10**10))
        self.dropped: deque[Mark] = deque()
        self.drop = self.dropped.append
        self.marks: dict[int, Mark] = {}  # of the slots that live
        self.outbox: list[Issued] = []
        self._sent: dict[
            int, tuple[Put | Later, Any]
        ] = {}  # values that were sent and that nothing has used yet: NOTE [Unused values]
        self.lock = threading.RLock()
        self.frames = 0
        self.waits = 0
        self.bytes_sent = 0  # elements of tensors, either way; the calls themselves are small
        self.bytes_fetched = 0
        self.follower = Follower()
        self._kept = Kept()
        self._asked = Spot()
        self._queued_bytes = 0  # of tensors in the outbox, and of those that nothing has used yet
        self._unused_bytes = 0
        self._bringing = False  # a value of another worker, in the middle of a call
        self._programs: set[str] = set()  # digests of what the worker keeps
        self._sites: dict[int, list[Any]] = {}
        self._failed: dict[tuple[int, int, int | None], Any] = {}
        self._latest: Failure | None = None  # of the last wait
        self.failures = 0  # that replies have told of so far
        self._undone: deque[tuple[int, Any]] = deque(maxlen=1000)  # lines whose writes were not done
        self._to_hear = 0  # the last frame whose reply told of some, until the worker knows that we know
        self._visits: list[weakref.ref[Any]] = []  # that may have left something: `late`
        self.watched = False  # whether somebody may have put a hook on a node of a graph
        self.learning = 0  # the thread that is about to learn a phrase; -1 once another took a step meanwhile
        self._over: str | None = None  # why nothing more can be done here
        self._synchronous = synchronous
        self._tree = Tree()
        self.trace = self._new_trace()
        Session.live.add(self)

    @property
    def synchronous(self) -> bool:
        """Whether each call waits for its result."""
        return self._synchronous

    @synchronous.setter
    def synchronous(self, on: bool) -> None:
        with self.lock:
            self._synchronous = on
            self.flush()
            self.trace = self._new_trace()

    def _new_trace(self) -> Trace:
        return Trace(self._tree, 1 if self._synchronous else self.transport.frame_messages)

    # -- issuing ------------------------------------------------------------------------------------------

    def full(self) -> None:
        """The present trace has all the calls that it should take: it leaves, unless the session is synchronous; then
        wait, and raise what failed."""
        if not self._synchronous:
            self.cut()
            return
        self.wait()
        if self._latest is not None:
            raise self.error(self._latest)

    def put(self, tensor: torch.Tensor, site: Site | None = None) -> Slot:
        """Queue a copy of a local tensor, made when either side first writes; its slot. `site`: the line that sends it,
        if it is known."""
        if self._kept.values:
            kept: Slot | None = self._kept.slot(tensor)
            if kept is not None:
                return kept
        given = spec_of(tensor)
        array = share(tensor, dense=given.dense)
        return self._put(array, given if given.dense else spec_of(array.data), site or caller())

    def put_own(self, tensors: Sequence[torch.Tensor], site: Site | None) -> list[Slot]:
        """Queue tensors that nobody else has, and that fill their storages: they are not copied. Their slots."""
        return [self._put(Array(None, tensor), spec_of(tensor), site) for tensor in tensors]

    def _put(self, array: Array, given: Spec, site: Site | None) -> Slot:
        nbytes = array.data.nbytes
        if nbytes > self.transport.frame_bytes:
            nbytes = array.data.untyped_storage().nbytes()  # a repeated dimension travels once
            self._check_size(nbytes)
        slot = Slot(self, given)
        self._sent[slot.id] = Put(slot.id, array), site
        self._unused_bytes += nbytes
        return slot

    def put_later(self, tensor: torch.Tensor, given: Spec, site: Site | None) -> Slot:
        """Queue a tensor of this type whose value is still at another worker: brought if something uses it here."""
        slot = Slot(self, given)
        self._sent[slot.id] = Later(tensor), site or caller()
        return slot

    def _check_size(self, nbytes: int) -> None:
        """Raise `UsageError` for a tensor that the worker would refuse."""
        most = self.transport.frame_bytes
        if nbytes > most:
            raise UsageError(
                f"worker '{self.location.id}' takes at most {most:,} bytes of tensors at once, and this one has "
                f"{nbytes:,}: send it in parts, or let the worker's owner raise frame_mb in worker.toml"
            )

    def relieve(self) -> None:
        """Let what is queued leave if it is much."""
        if self._queued_bytes + self._unused_bytes > LARGE_BYTES:
            self.flush()

    def note(self, trace: Trace) -> None:
        """A call is about to be taken: note what a phrase that is learned from it would not know."""
        if _saved_hooks(False) is not None:
            trace.watched = True
        if self.learning and self.learning != get_ident():
            self.learning = -1

    def take(self, slot: Slot) -> Ref:
        """Make a slot of before an input of the present trace. Raises `Cut` if what was issued should leave first."""
        trace = self.trace
        if slot.id in self._sent:
            if trace.sites and self.transport.remote and _nbytes(self._sent[slot.id]) >= CUT_BYTES:
                raise Cut
            self._use(slot.id)
        slot.trace, slot.register, slot.taken = trace, trace.take(slot.id, slot.spec), True
        return slot.register

    def _use(self, ref: int) -> None:
        """Something uses a value that was sent: it will travel."""
        message, site = self._sent[ref]
        if isinstance(message, Later):
            self._bringing = True
            try:
                message = Put(ref, share(message.tensor.detach().clone()))
            finally:
                self._bringing = False
            self._sent[ref] = message, site
        nbytes = message.value.data.nbytes
        self.outbox.extend(map(self._sent.pop, (ref,)))  # at once: Ctrl-C comes before or after
        self._unused_bytes -= nbytes
        self._queued_bytes += nbytes

    def _use_all(self, named: Iterable[int] = ()) -> None:
        """What was sent will travel, also if nothing has used it; what must be brought first, if it is named."""
        if not self._sent:
            return
        for ref in named:
            if ref in self._sent:
                self._use(ref)
        for ref in [ref for ref, (message, _) in self._sent.items() if not isinstance(message, Later)]:
            self._use(ref)

    def mend(self) -> None:
        """Something was cut short in the middle of a step: what was whole before is ended here."""
        if not self.trace.is_whole():
            self.trace.rewind()
            self._end_trace()

    def cut(self) -> None:
        """What was issued leaves, without what it does not use."""
        with whole():
            self._end_trace()
            self._leave()

    def tell(self, message: Message, site: Any = None) -> None:
        """Queue a message that asks for nothing."""
        with self.lock:
            self._end_trace()
            self._use_all(getattr(message, "ids", ()))
            self.outbox.append((message, site or caller_again(self._asked)))

    def run(self, program: Program, run: Run) -> None:
        """Queue a run of a program that was recorded."""
        with self.lock, whole():
            self._end_trace()
            self._define(program, run.digest)
            for ref in run.inputs:
                if ref in self._sent:
                    self._use(ref)
            self.outbox.append((run, Ran(program, caller())))

    def _define(self, program: Program, digest: str) -> None:
        """Queue a program, if the worker has not got it. Raises `UsageError` for one that would not travel."""
        if digest not in self._programs:
            nbytes = len(program.encoded()) if self.transport.remote else 0
            if nbytes > MAX_HEAD_BYTES - FRAME_BYTES:
                raise UsageError(
                    f"a program of {len(program.calls):,} calls has {nbytes:,} bytes; at most "
                    f"{MAX_HEAD_BYTES - FRAME_BYTES:,} travel to worker '{self.location.id}': divide it"
                )
            self._programs.add(digest)
            self.outbox.append((Define(program), None))

    def seed(self) -> None:
        """Before a random call: let the worker's generator follow the caller's. See `randomness`."""
        with self.lock, whole():
            state = self.follower.next_state()
            if state is not None:
                self._end_trace()
                self.outbox.append((Seed(share(state)), None))

    def _end_trace(self, last: Call | None = None) -> None:
        """What was issued takes its place in the outbox, with one more call, and behind it the drops of what is no
        longer pointed at."""
        if last is None and not self.trace.ids and not self.dropped:
            return
        with whole():
            self._queue_trace(last)

    def _queue_trace(self, last: Call | None) -> None:
        trace, gone, marks = self.trace, self.dropped, self.marks
        dropped: list[int] = []
        while gone:
            ref = gone.popleft().id
            marks.pop(ref, None)
            dropped.append(ref)
        if trace.ids:
            self.trace = self._new_trace()
        if self._sent:
            sent = self._sent
            dropped = [ref for ref in dropped if ref not in sent or not self._forgotten(ref)]
        if trace.sites:
            dropped = self._dropped_first(dropped, trace)
            alive = trace.end()
            for slot in alive:
                slot.mark()
            dropped = self._spoken(trace, tuple([slot.register.id - 1 for slot in alive]), dropped)
        if last is not None:
            self.outbox.append((last, caller()))
        if dropped:
            self.outbox.append((Drop(tuple(dropped)), None))

    def _dropped_first(self, dropped: list[int], trace: Trace) -> list[int]:
        """Queue the drops of what a trace does not use, before it: a parameter whose last copy is gone is written in
        place, and not copied first. Which are left."""
        ids = trace.ids
        used = {ids[at] for at in trace.step.inputs}
        if used.isdisjoint(dropped):
            first, rest = dropped, []
        else:
            first, rest = [ref for ref in dropped if ref not in used], [ref for ref in dropped if ref in used]
        if first:
            self.outbox.append((Drop(tuple(first)), None))
        return rest

    def _forgotten(self, ref: int) -> bool:
        """NOTE [Unused values]: forget a value that nothing has used; whether it was one."""
        entry = self._sent.pop(ref, None)
        if entry is not None:
            self._unused_bytes -= _nbytes(entry)
        return entry is not None

    def _spoken(self, trace: Trace, alive: tuple[int, ...], dropped: list[int]) -> list[int]:
        """Queue a trace, of whose results those in the registers `alive` are still pointed at: its program if it has
        one, else its calls. Which of the dropped are still to be said."""
        ending = trace.tree.ending(trace.step, alive)
        ids, inputs = trace.ids, trace.step.inputs
        if ending.program is not None:
            self._define(ending.program, ending.digest)
            given, outs = tuple([ids[at] for at in inputs]), tuple([ids[at] for at in alive])
            self.outbox.append((Run(ending.digest, given, outs, tuple(trace.numbers)), trace.sites))
            return dropped
        sites = iter(trace.sites)
        said: set[int] = set()
        kept = {*inputs, *alive}
        dead = {*dropped, *(id for at, id in enumerate(ids) if at not in kept)}
        for call, dead_now in freed(trace.calls(), dead):
            self.outbox.append((call, next(sites)))
            if dead_now:
                said.update(dead_now)
                self.outbox.append((Drop(dead_now), None))
        return [ref for ref in dropped if ref not in said]

    def flush(self) -> None:
        """Send what is queued."""
        with self.lock, whole():
            self._end_trace()
            if self._sent:
                self._use_all()
            self._unused_bytes = 0
            self._leave()

    def _leave(self) -> None:
        """Send the outbox as frames: one, unless it brings more than a frame should."""
        queued, self.outbox = self.outbox, []
        if self._to_hear and queued:
            queued.insert(0, (Heard(self._to_hear), None))
            self._to_hear = 0
        most = min(LARGE_BYTES, self.transport.frame_bytes)
        if queued and self._queued_bytes <= most:
            self._send(queued, self._queued_bytes)
        elif queued:
            nbytes = 0
            frame: list[Issued] = []
            for entry in queued:
                brings = _nbytes(entry)
                if frame and nbytes + brings > most:
                    self._send(frame, nbytes)
                    nbytes, frame = 0, []
                nbytes += brings
                frame.append(entry)
            self._send(frame, nbytes)
        self._queued_bytes = 0

    def _send(self, queued: list[Issued], nbytes: int) -> None:
        self.bytes_sent += nbytes
        self._send_cut(queued)

    def _send_cut(self, queued: list[Issued]) -> None:
        """Send messages as one frame, or as two if together they say more than a frame can."""
        self.frames += 1
        self._sites[self.frames] = [site for _, site in queued]
        try:
            self.transport.send(Frame(self.frames, tuple([message for message, _ in queued])))
            return
        except WorkerGone as error:
            raise self._gone(error) from None
        except CodecError as error:  # nothing was sent
            del self._sites[self.frames]
            self.frames -= 1
            if not isinstance(error, HeadTooLong):
                raise
            if len(queued) == 1:
                raise _too_long(*queued[0], error) from None
        middle = len(queued) // 2
        try:
            self._send_cut(queued[:middle])
        finally:  # a message that cannot be sent takes no other with it
            self._send_cut(queued[middle:])

    @property
    def busy(self) -> bool:
        """Whether work is queued or under way; dropping is no work, and what nothing has used yet does not leave."""
        if self._sites or self.trace.sites:
            return True
        return any(type(message) is not Drop for message, _ in tuple(self.outbox))

    # -- waiting ------------------------------------------------------------------------------------------

    def ask(self, message: Message) -> Result:
        """Queue a message that asks, wait, and return its result."""
        with self.lock:
            self.tell(message)
            results, unnoticed = self._collect()
            if unnoticed:
                raise self.error(unnoticed[0])
            return self._last(message, results)

    def _last(self, message: Message, results: list[Result]) -> Result:
        if not results and self._latest is not None:
            raise self.error(self._latest)
        if not results:
            raise ProtocolError(f"worker '{self.location.id}' did not answer a {type(message).__name__.lower()}")
        return results[-1]

    def wait(self) -> None:
        """Wait for everything queued so far; other workers with work to do run meanwhile.

        Raises `OperatorError` if a write failed that nobody would notice otherwise."""
        _, unnoticed = self._collect()
        if unnoticed:
            raise self.error(unnoticed[0])

    def _collect(self) -> tuple[list[Result], list[Failure]]:
        """Send what is queued and wait for every reply: what was asked for, and failures that nobody would notice.

        Within this process Ctrl-C waits until that is done; who waits for a network is let go."""
        with self.lock, nullcontext() if self.transport.remote else whole():
            self.flush()
            for other in Session.live.others(self):
                if other.busy:
                    other._start()
            results: list[Result] = []
            self._latest = None
            unnoticed: list[Failure] = []
            if self._sites:
                self.waits += 1
            while self._sites:
                self._unless_gone(self.transport.wait)
                with whole():  # a reply that has come is taken note of
                    reply: Reply = self._unless_gone(self.transport.receive)
                    results.extend(reply.results)
                    unnoticed.extend(self._settle(reply))
            return results, unnoticed

    def fetch(self, slots: Iterable[Slot]) -> list[torch.Tensor]:
        """The values of these slots, in one round trip. Raises `OperatorError` for the first that failed."""
        values, trouble = self.bring(tuple(slots))
        if trouble is not None:
            raise trouble
        for value in values:
            if isinstance(value, Failure):
                raise self.error(value)
        return values

    def bring(self, slots: Sequence[Slot]) -> tuple[list[Any], OperatorError | PolicyError | None]:
        """The values of these slots, or why there are none; and what else failed that nobody would notice."""
        with self.lock:
            found, unnoticed = self._answer(Fetch(tuple([slot.id for slot in slots])), Value)
        values: list[Any] = [item if isinstance(item, Failure) else item.data for item in found.arrays]
        if len(values) != len(slots):
            raise ProtocolError(f"worker '{self.location.id}' gave {len(values)} values for {len(slots)} slots")
        came = [(slot, value) for slot, value in zip(slots, values, strict=True) if not isinstance(value, Failure)]
        self.bytes_fetched += sum([value.nbytes for _, value in came])
        if self.transport.remote:
            self._kept.keep(came)
        return values, self.error(unnoticed[0]) if unnoticed else None

    def types_of(self, call: Call, slots: list[Slot]) -> list[TensorType | None]:
        """Issue a call whose results only the worker can type, and ask it: `None` for a hole."""
        with self.lock:
            self._end_trace(call)
            return self.describe(slots)

    def describe(self, slots: Iterable[Slot]) -> list[TensorType | None]:
        """The types of these slots, `None` for a hole. Raises `OperatorError` for the first that failed."""
        slots = tuple(slots)
        with self.lock:
            found, unnoticed = self._answer(Describe(tuple(slot.id for slot in slots)), Types)
        if unnoticed:
            raise self.error(unnoticed[0])
        for item in found.types:
            if isinstance(item, Failure):
                raise self.error(item)
        if len(found.types) != len(slots):
            raise ProtocolError(f"worker '{self.location.id}' gave {len(found.types)} types for {len(slots)} slots")
        return list(found.types)  # type: ignore[arg-type]  # a failure was raised

    def was_undone(self, site: Site | None, since: int) -> bool:
        """Whether a write of this line was not done, and that was told after `since` failures."""
        return bool(self._undone) and any(at > since and where == site for at, where in self._undone)

    def _answer(self, message: Message, kind: type[Answer]) -> tuple[Answer, list[Failure]]:
        """Ask, and wait: the answer, and what failed that nobody would notice."""
        self.tell(message)
        results, unnoticed = self._collect()
        found = self._last(message, results)
        if not isinstance(found, kind):
            what = f"a {type(found).__name__}, expected a {kind.__name__}"
            raise ProtocolError(f"worker '{self.location.id}' answered {type(message).__name__} with {what}")
        return found, unnoticed

    def error(self, failure: Failure) -> OperatorError | PolicyError:
        """The error for a failure: where it ran, what ran, and which line issued it; or that an owner said no."""
        if failure.operator == "release":
            return PolicyError(f"worker '{self.location.id}': {failure.reason}")
        site, reason = self._failed.get((failure.frame, failure.index, failure.call)), failure.reason
        if isinstance(site, Ran):
            reason = f"{_call_of(site.program, failure.call)}{reason}"
            site = site.site
        return OperatorError(self.location.id, failure.operator, reason, str(site) if site else "")

    def forget(self) -> None:
        """Let go of values that came home but whose slots still stand at the worker. See `kept`."""
        self._kept.clear()

    def leaves(self, visit: Any) -> None:
        """A visit leaves something here, which is brought before the session is closed."""
        if len(self._visits) > 64:
            self._visits = [ref for ref in self._visits if ref() is not None]
        self._visits.append(weakref.ref(visit))

    def check_open(self) -> None:
        """Raise `WorkerGone` if this session is known to be over."""
        if self._over is not None:
            raise WorkerGone(self._over)

    def close(self) -> None:
        """End the session; the worker frees its slots. What was left there to come later comes now, if it can."""
        for visit in [ref() for ref in self._visits] if self._over is None else ():
            if visit is not None:
                with contextlib.suppress(HousecallError):
                    visit.bring()
        self._over = f"the session at worker '{self.location.id}' is closed: make a new worker, or connect anew"
        Session.live.discard(self)
        self._kept.clear()
        self.outbox.clear()
        self._sent.clear()
        self.trace = self._new_trace()
        self.transport.close()

    def _start(self) -> None:
        """Let what is queued run beside whoever waits for another session. A session that another thread is busy
        with is left to that thread: to wait for its lock while holding one's own is how two threads get stuck. That
        its worker is gone is for whoever waits for it to hear."""
        with whole():
            if not self._bringing and self.lock.acquire(blocking=False):
                try:
                    with contextlib.suppress(WorkerGone):
                        self.cut()
                        self.transport.start()
                finally:
                    self.lock.release()

    def _unless_gone(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except WorkerGone as error:
            raise self._gone(error) from None

    def _gone(self, error: WorkerGone) -> WorkerGone:
        """The same error with what was lost; nobody starts this session's work any more."""
        Session.live.discard(self)
        self._over = str(error)
        issued = [site for frame in self._sites.values() for site in frame if site is not None]
        sites = [one for site in issued for one in (site if isinstance(site, list) else [site])]
        if not sites:
            return error
        oldest = sites[0].site if isinstance(sites[0], Ran) else sites[0]
        return WorkerGone(f"{error}. Unanswered: {_messages(len(sites))}, the oldest issued at {oldest}")

    def _settle(self, reply: Reply) -> list[Failure]:
        """Forget the lines of an answered frame but those of failures; return the failures nobody would see."""
        sites = self._sites.pop(reply.number, None)
        if sites is None:
            raise ProtocolError(f"worker '{self.location.id}' answered frame {reply.number}, which is not open")
        if reply.failures:
            self._to_hear = reply.number
        for failure in reply.failures:
            self.failures += 1
            if failure.frame == reply.number:
                where = failure.index, failure.call
                self._failed[(failure.frame, *where)] = self._site(where, sites)
            self._latest = failure
        self._undone.extend([(self.failures, self._site(where, sites)) for where in reply.undone])
        return [failure for failure in reply.failures if failure.writes]

    def _site(self, where: tuple[int, int | None], sites: list[Any]) -> Any:
        """The line of what failed in a frame of these lines."""
        index, call = where
        if index < len(sites):
            found = sites[index]
            if not isinstance(found, list):
                return found
            if call is None or call < len(found):
                return found[call or 0]
        raise ProtocolError(f"worker '{self.location.id}' says that message {index} failed; no such")


def _messages(count: int) -> str:
    return "1 message" if count == 1 else f"{count:,} messages"


def _call_of(program: Program, number: int | None) -> str:
    """What failed within a program, for the reason of an error."""
    if number is None or number >= len(program.calls):
        return ""
    text = call_text(program.calls[number], printed_names(program))
    return f"call {number}, `{text}`; what does not depend on it was done: "


def _too_long(message: Message, site: Any, error: HeadTooLong) -> UsageError:
    """The error for a message that is too long for a frame of its own."""
    what = message.op if isinstance(message, Call) else type(message).__name__.lower()
    issued = f"\n  issued at {site}" if isinstance(site, Site) else ""
    return UsageError(f"{what} was not sent: {error}. Name fewer tensors at once{issued}")


def _nbytes(entry: Issued) -> int:
    """The bytes of elements that a message brings."""
    message = entry[0]
    return message.value.data.nbytes if type(message) is Put else 0
