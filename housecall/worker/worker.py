"""The worker: an interpreter of messages at the data's side. `handle` is the only door in.

It imports, evaluates and unpickles nothing that arrives: operators, dtypes and messages are looked up in
closed tables. A failure is an answer, never an exception to the transport.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator

import msgspec
import torch

from ..errors import HousecallError, LimitError, PolicyError, ProgramError, UsageError
from ..owned.catalogue import Catalogue
from ..owned.description import Owned
from ..program.call import HOLE, Call, text
from ..program.run import Randomness, computing, execute
from ..program.typing import type_of
from ..transport.arrays import share
from ..types import PUBLIC, Label, TensorType
from ..wire import messages as wire
from ..wire.messages import (
    Array,
    Clear,
    Define,
    Describe,
    Drop,
    Evaluate,
    Failure,
    Fetch,
    Found,
    Frame,
    Heard,
    Load,
    Message,
    Mock,
    Mocked,
    Open,
    Put,
    Reply,
    Request,
    Requested,
    Result,
    Run,
    Search,
    Seed,
    Statistics,
    Status,
    Submit,
    Tag,
    Types,
    Update,
    Updated,
    Value,
)
from . import statistics
from .device import at_home, home
from .evaluation import Evaluation
from .gate import Gate, Opening, Question, Who, counted, unmade
from .limits import TEXT, UNLIMITED, Limits, Meter
from .loans import Loans
from .plans import Plans
from .private import UNSEEDED, draws_of
from .programs import Programs
from .release import release
from .statistics import registered
from .store import Failed, Halt, Missing, Store
from .submission import Submissions
from .update import derives_from, room, updated

__all__ = ["MOST_FAILURES", "Worker", "WorkerSession"]

log = logging.getLogger(__name__)

MOST_FAILURES = 10_000  # that one reply tells of
_UNASKED = Question(PUBLIC)
_ACCOUNTED = frozenset({Load, Evaluate, Update})  # messages that need an account, as does what comes after them


class Worker:
    """Holds data and computes on it, for any number of sessions that cannot see each other.

    `limits` is what each session may use; without any, a session is trusted with its own process, and costs nothing
    more. `catalogue` has the data sets that the owner registered, `device` is where values live. `clock` measures
    computing time, in seconds."""

    def __init__(
        self,
        id: str,
        limits: Limits = UNLIMITED,
        *,
        catalogue: Catalogue | None = None,
        gate: Gate | None = None,
        device: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.id = id
        self.device = home(device)
        self.is_away = self.device.type != "cpu"  # of what arrives: asked for each frame
        self.catalogue = Catalogue() if catalogue is None else catalogue
        self.gate = Gate() if gate is None else gate
        self.limits = limits
        self.clock = clock
        self.sessions: list[WorkerSession] = []
        self._lock = threading.Lock()

    def open(self, principal: str, role: str = "scientist") -> WorkerSession:
        """Begin a session for `principal`: an empty store, its own order, its own randomness."""
        session = WorkerSession(self, Who(principal, role))
        with self._lock:
            self.sessions.append(session)
        return session

    def leave(self, session: WorkerSession) -> None:
        """End a session and free what it held."""
        session.store.clear()
        with self._lock:
            if session in self.sessions:
                self.sessions.remove(session)


def _described(owned: Owned) -> wire.Owned:
    """What a scientist may know of a data set."""
    columns = tuple(wire.Column(name, type_.dtype, type_.shape) for name, type_ in owned.columns.items())
    return wire.Owned(owned.name, columns, owned.count, owned.tags, owned.description, owned.unit, owned.mock)


def _bound_by(message: Message) -> tuple[int, ...]:
    match message:
        case Call(outs=outs):
            return outs
        case Put(id=ref):
            return (ref,)
        case Load(ids=ids):
            return ids
        case Run(outs=outs):
            return outs
    return ()


class WorkerSession:
    """The worker's side of one session: a `Door`. `meter` holds it to the worker's limits; `None` if there are none."""

    def __init__(self, worker: Worker, who: Who) -> None:
        self.worker = worker
        self.who = who
        self.id = secrets.token_hex(8)
        # What `_key` calls a value -> the digest of the request that it is part of, and of what the owner reads of it.
        self.asked: dict[str, tuple[str, str]] = {}
        self.store = Store()
        self.submissions = Submissions(self.store, self.id)
        self.randomness = Randomness()
        self.halt = Halt()
        self.plans = Plans(worker.device, self.randomness, self.halt)
        self.loans = Loans(worker, who, self.store, self.submissions)
        self.programs = Programs(worker, who, self.store, self.halt, self.plans, self.loans, self.submissions)
        self.meter: Meter | None = None
        if worker.limits != UNLIMITED:
            self._begin_metering()

    def close(self) -> None:
        """End the session. What was refused and only counted is in the ledger then, if that can be written."""
        try:
            self.worker.gate.settle(self.who)
        except HousecallError as error:
            log.error(
                "how often session %s of '%s' was refused is not in the ledger: %s", self.id, self.who.name, error
            )
        self.worker.leave(self)

    def _begin_metering(self) -> Meter:
        """From now on every slot has an account: for limits, and for labels, which stand on it."""
        self.meter = Meter(self.worker.limits, self.store, self.randomness, self.worker.clock, self.halt)
        for ref, value in self.store.tensors().items():
            self.store.count(ref, value)
        return self.meter

    def handle(self, frame: Frame) -> Reply:
        """Do what the frame says, in order. Autograd runs at the caller, so no graph is built here."""
        steps = self.work(frame, every=sys.maxsize)
        with computing():
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]  # what `work` returns

    def work(self, frame: Frame, *, every: int = 1) -> Generator[None, None, Reply]:
        """`handle` in steps, each of `every` messages or calls of a program at most, to be taken within `computing()`;
        the generator's value is the reply."""
        if self.worker.is_away:
            frame = at_home(frame, self.worker.device)
        if self.meter is None:
            return self._free(frame, every)
        return self._metered(frame, self.meter, 0, [], _Failures(), every)

    def _free(self, frame: Frame, every: int) -> Generator[None, None, Reply]:
        results: list[Result] = []
        failures = _Failures()
        store, randomness, halt = self.store, self.randomness, self.halt
        for index, message in enumerate(frame.messages):
            kind = type(message)
            try:
                if kind is Call:
                    if halt.cause is not None:
                        halt.check(message)  # type: ignore[arg-type]  # `kind` says it is a Call
                    execute(message, store, randomness)  # type: ignore[arg-type]  # as above
                elif kind is Put:
                    store[message.id] = message.value.data  # type: ignore[union-attr]  # as above
                elif kind is Drop:
                    for ref in message.ids:  # type: ignore[union-attr]  # as above
                        store.pop(ref, None)
                elif kind is Run:
                    report = functools.partial(self._report, frame.number, index, failures)
                    yield from self.plans.run(message, store, None, report, every)  # type: ignore[arg-type]  # as above
                elif kind in _ACCOUNTED:
                    return (yield from self._metered(frame, self._begin_metering(), index, results, failures, every))
                else:
                    self._answer(message, results)
            except Exception as error:  # what a message does must not end the session
                self._fail(frame.number, index, message, error, failures)
            if every == 1:
                yield
        return Reply(frame.number, tuple(results), tuple(failures.told), tuple(failures.undone))

    def _metered(
        self, frame: Frame, meter: Meter, first: int, results: list[Result], failures: _Failures, every: int
    ) -> Generator[None, None, Reply]:
        call, drop, clock = meter.call, self.store.drop, meter.clock
        meter.new_reply()
        self.loans.uses.renew()
        self.loans.guard(meter)
        for index in range(first, len(frame.messages)):
            message = frame.messages[index]
            kind = type(message)
            began = clock()
            try:
                if kind is Call:
                    call(message)  # type: ignore[arg-type]  # `kind` says it is a Call
                elif kind is Drop:
                    for ref in message.ids:  # type: ignore[union-attr]  # as above
                        drop(ref)
                elif kind is Run or kind is Evaluate:
                    if kind is Run:
                        report = functools.partial(self._report, frame.number, index, failures)
                        steps = self.programs.run(message, meter, report, every)  # type: ignore[arg-type]  # as above
                    else:
                        steps = self._evaluated(message, meter, results)  # type: ignore[arg-type]  # as above
                    for _ in steps:
                        meter.spent += clock() - began
                        yield
                        began = clock()
                else:
                    self._answer(message, results)
            except Exception as error:  # what a message does must not end the session
                self._fail(frame.number, index, message, error, failures)
            meter.spent += clock() - began
            if every == 1:
                yield
        return Reply(frame.number, tuple(results), tuple(failures.told), tuple(failures.undone))

    def _answer(self, message: Message, results: list[Result]) -> None:
        meter = self.meter
        match message:
            case Put() if meter is not None:  # without one, `_free` has put it there
                meter.put(message)
            case Fetch(ids=ids):
                if meter is not None:
                    meter.check_question(ids)
                results.append(Value(self._fetched(ids)))
            case Request(ids=ids, reason=reason):
                if meter is not None:
                    meter.check_question(ids)
                results.append(self._request(ids, reason))
            case Submit():
                results.append(self.programs.submit(message))
            case Status(request=request):
                results.append(self.worker.gate.status(self.who, request))
            case Describe(ids=ids):
                if meter is not None:
                    meter.check_question(ids)
                results.append(Types(tuple(self._described(ref) for ref in ids)))
            case Heard(frame=frame):
                if self.halt.cause is not None and self.halt.cause.failure.frame <= frame:
                    self.halt.cause = None
            case Seed(state=state):
                self.randomness.follow(state.data)
                self.store.seeded()
                if self.meter is not None:
                    self.meter.history.seeded()
            case Tag(id=ref):
                if meter is not None:
                    meter.check_tag(message)
                _ = self.store[ref]  # tagging what is not there must fail now, not at the search
                self.store.tags[ref] = message
            case Search(tags=tags):
                owned = tuple(map(_described, self.worker.catalogue.search(*tags)))
                self._found(Found(self.store.search(tags, type_of), owned), results)
            case Open(name=name):
                self._found(Found((), (_described(self.worker.catalogue.owned(name)),)), results)
            case Load():
                self.loans.lend(message, meter)
            case Mock(name=name):
                results.append(self._mock(name))
            case Statistics():
                if meter is not None:
                    meter.check_time("statistics")
                results.append(statistics.answer(self.worker.catalogue, self.worker.gate, self.who, message))
            case Update(ids=ids):
                if meter is not None:
                    meter.check_question(ids)
                results.append(self._updated(message))
            case Clear():
                self.store.clear()
                self.submissions.clear()
            case Define(program=program):
                self.plans.define(program)

    def _evaluated(self, message: Evaluate, meter: Meter, results: list[Result]) -> Iterator[None]:
        """A mean score, a step for each call of its program. Raises `UsageError`, `PolicyError`, `LedgerError`, and
        what the program would be refused for."""
        meter.check_time("evaluate")
        if self.halt.cause is not None:
            raise self.halt.cause
        worker = self.worker
        worker.gate.scores(self.who, registered(worker.catalogue, worker.catalogue.owned(message.name)))
        evaluation = Evaluation(message, worker.catalogue, self.plans, self.store, meter, worker.device)
        yield from evaluation.check()
        if message.runs:
            names, count = (evaluation.owned.name,), evaluation.owned.count
            results.append(
                worker.gate.submit(self.who, names, evaluation.score, message.reason, message.runs, scores=count)
            )
            return
        for step in evaluation.answered(worker.gate, self.who):
            if step is not None:
                results.append(step)
            yield

    def _updated(self, message: Update) -> Updated:
        """An update, through the stages that it must pass. Raises `UsageError`, `PolicyError`, `LedgerError`."""
        label = derives_from(message, self.store)
        self.loans.check(label.sources)
        self._check_made(message.ids)
        if self.meter is not None:
            self.meter.check_time("update")
            self.meter.check_filled("update", [self.store.specs[ref] for ref in message.ids])
            self.meter.check_room("update", 0, room(message, self.store))
        found = updated(message, label, self.store, self.worker.catalogue, self.worker.gate, self.who)
        self.loans.check(label.sources)  # replaced while it was decided
        return found

    def _check_made(self, ids: tuple[int, ...]) -> None:
        """Refuse what derives from data that only programs may read, and no accepted one has made: a column itself.
        Raises `PolicyError`."""
        for ref in ids:
            names = self.loans.uses.among(self.store.label(ref))
            if names and self.submissions.origin(ref) is None:
                self.worker.gate.refuse(self.who, Label(names), unmade(names[0]))
                raise PolicyError(unmade(names[0]))

    def _mock(self, name: str) -> Mocked:
        """What an owner gives to whoever asks: no policy is asked, and it is no value of this session."""
        columns = self.worker.catalogue.mock(name)
        if self.meter is not None:
            for column in columns.values():
                self.meter.check_release(column)
        return Mocked(tuple([share(column) for column in columns.values()]))

    def _found(self, found: Found, results: list[Result]) -> None:
        if self.meter is not None:
            self.meter.check_found(found)
        results.append(found)

    def _request(self, ids: tuple[int, ...], reason: str) -> Requested:
        """Ask the owner for values as they are now: a later write makes them others, which nobody asked for."""
        label, keys = PUBLIC, []
        for ref in ids:
            label = label | self.store.label(ref)
            keys.append(self._key(ref))
        if self.meter is None or not label:
            raise UsageError("these values derive from nobody's data: fetch them, there is nothing to ask")
        self.loans.check(label.sources)
        history = self.meter.history
        made = history.program(ids, self.store)
        if self.store.astray and draws_of(made).calls:
            raise ProgramError(f"these values cannot be asked for, they were drawn so: {UNSEEDED}. Then make them anew")
        program = text(made)
        if history.forgotten:
            program = f"the first {history.forgotten:,} calls are forgotten: all below may derive from them\n{program}"
        shown = hashlib.sha256(program.encode("utf-8", "replace")).hexdigest()
        digest = hashlib.sha256("\n".join([shown, *sorted(keys)]).encode()).hexdigest()
        said = self.worker.gate.request(self.who, label, digest, program, reason)
        self.asked.update(dict.fromkeys(keys, (digest, shown)))
        return said

    def _key(self, ref: int) -> str:
        """What one value of one slot is called in requests: not the same after a write, nor once the id was freed and
        given anew, nor in another session."""
        cell = self.store.cells.get(ref)
        if cell is None:
            raise ProgramError(f"%{ref} holds no value")
        return f"{self.id}/{self.store.bindings.get(ref, 0)}/{cell.writes}"

    def _fetched(self, ids: tuple[int, ...]) -> tuple[Array | Failure, ...]:
        if self.meter is None:  # no value has an account, so none has a label
            opening = Opening(self.worker.gate, self.who)
            held = [self._held(ref) for ref in ids]
            return tuple([one if isinstance(one, Failure) else release(one, None, opening, _UNASKED) for one in held])
        gone = self.loans.gone()
        asked = {ref: self._question(ref) for ref in ids if ref in self.store.cells and not self.loans.stays(ref, gone)}
        counts = counted((asked[ref], self.store.specs[ref].size.numel()) for ref in ids if ref in asked)
        opening = Opening(self.worker.gate, self.who, counts)
        found = [self.loans.stays(ref, gone) or self._released(ref, opening, asked.get(ref)) for ref in ids]
        late = self.loans.gone() - gone  # replaced while it was decided: by whose rules, nobody knows
        if late:
            found = [self.loans.stays(ref, late) or item for ref, item in zip(ids, found, strict=True)]
        if gone or late:
            for name in sorted({name for ref in ids for name in self.store.label(ref).sources} & (gone | late)):
                self.loans.refused(name)
        return tuple(found)

    def _question(self, ref: int) -> Question:
        """What is asked of a value that is to leave."""
        label = self.store.label(ref)
        if not label:
            return Question(label)
        digest, shown = self.asked.get(self._key(ref), ("", "")) if self.asked else ("", "")
        origin = self.submissions.origin(ref)
        return Question(label, digest, shown, origin, () if origin is not None else self.loans.uses.among(label))

    def _released(self, ref: int, opening: Opening, question: Question | None) -> Array | Failure:
        value = self._held(ref)
        if isinstance(value, Failure):
            return value
        if self.meter is not None:
            try:
                self.meter.check_release(value)
            except LimitError as error:
                return Failure(0, 0, "fetch", f"{type(error).__name__}: {error}", writes=False)
        return release(value, self.store.cells.get(ref), opening, question or _UNASKED)

    def _described(self, ref: int) -> TensorType | Failure | None:
        if ref not in self.store:  # a hole: the operator gave nothing there
            return None
        value = self._held(ref)
        return value if isinstance(value, Failure) else type_of(value)

    def _held(self, ref: int) -> torch.Tensor | Failure:
        try:
            value = self.store[ref]
        except Missing as error:
            return Failure(0, 0, "fetch", str(error), writes=False)
        except Failed as error:  # there was no room for it
            return error.failure
        return value.failure if isinstance(value, Failed) else value

    def _fail(self, frame: int, index: int, message: Message, error: Exception, failures: _Failures) -> None:
        """Fill the outputs of what failed with the failure. A write that fails leaves the value as torch left it
        (`index_fill_` may have written some rows), and says so in the reply: nobody might read it and notice."""
        writes = isinstance(message, Call) and not message.outs
        if isinstance(message, Run):
            writes = self.plans.updates(message.digest)
        name = message.op if isinstance(message, Call) else type(message).__name__.lower()
        failed = _failed(Failure(frame, index, name[:TEXT], "", writes), error)
        self._halt(failed)
        failures.tell(failed.failure, index, None)
        for out in _bound_by(message):
            if self.meter is not None:
                self.meter.stand_in(out, failed)
            elif out != HOLE and out not in self.store:
                self.store[out] = failed

    def _report(self, frame: int, index: int, failures: _Failures, number: int, call: Call, error: Exception) -> Failed:
        """The same for one call of a program that runs; what stands in the place of its results."""
        failed = _failed(Failure(frame, index, call.op, "", not call.outs, number), error)
        halts = self._halt(failed)
        if halts or not isinstance(error, Failed) or failed.failure.writes:  # else a consequence, and nothing more
            failures.tell(failed.failure, index, number)
        return failed

    def _halt(self, failed: Failed) -> bool:
        """After a failure: whether this one is the cause, of which the caller is to hear."""
        if self.halt.cause is not None:
            return False
        self.halt.cause = failed
        return True


class _Failures:
    """What a reply tells of failures."""

    def __init__(self) -> None:
        self.told: list[Failure] = []
        self.undone: list[tuple[int, int | None]] = []

    def tell(self, failure: Failure, index: int, number: int | None) -> None:
        """Message `index` failed, or a call of its program. One frame can hold a million that do, and a reply no such
        texts; but that some write was not done is always said."""
        if len(self.told) < MOST_FAILURES:
            self.told.append(failure)
        elif failure.writes:
            self.told[-1] = failure
        if failure.writes and len(self.undone) < MOST_FAILURES:
            self.undone.append((index, number))


def _failed(what: Failure, error: Exception) -> Failed:
    """What stands where a result should be: `what` failed of `error`, or of what an argument had failed of, which is
    the cause that its caller wants to read."""
    if isinstance(error, Failed):
        return Failed(msgspec.structs.replace(error.failure, writes=what.writes))
    return Failed(msgspec.structs.replace(what, reason=f"{type(error).__name__}: {error}"[:TEXT]))
