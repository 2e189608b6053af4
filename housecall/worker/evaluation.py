"""The owner's own evaluation loop: the mean of a score over all records of one of her data sets.

What must live here: which programs can be scores, and the loop. What must not: who may have one (`gate`), how a mean is
made and noised (`statistics`), how a program runs (`plans`).

NOTE [One record at a time]
A scientist's program gives one number for one record. It never sees two, so a record changes its own number alone, and
the mean over all by (upper - lower) / n at most, whatever the program does: that is what the noise hides. So every
input is either of that one record, (1, ...), or public; a value that derives from private data could tell each record
of all others. For the same reason a program that draws random numbers or changes its inputs is no score: something
would go on from record to record.

NOTE [What fails]
A program is first run on a record of zeros, before anything is spent: what it says then is said of types. What fails on
a real record is in the owner's log, and that record's score is the lower bound, like one that is no number.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Generator, Iterator, Mapping
from fractions import Fraction
from functools import cached_property

import msgspec
import torch

from ..errors import DataError, ProgramError, UsageError
from ..owned.catalogue import Catalogue
from ..owned.description import Owned
from ..privacy.accounting import exact
from ..privacy.laplace import Below
from ..program.call import Call, Program
from ..program.forecast import type_program
from ..program.ops import operator
from ..program.run import Randomness
from ..program.typing import DTYPES
from ..types import PUBLIC, Label
from ..wire.messages import Evaluate, Failure, Noised, Run, Statistic
from .gate import Gate, Who
from .history import History
from .limits import Meter
from .plan import Precedents
from .plans import Plans
from .release import release_noised
from .statistics import check_bounds, check_same, mean_of, registered
from .store import Failed, Store
from .submission import BROUGHT, Source, Submission

__all__ = ["Evaluation", "Score"]

_PURPOSE = b"housecall score 1\0"
_FAILURE = Failure(0, 0, "", "a score failed", writes=False)
_OUT = 1 << 62  # the id of a score; those of inputs count from 1


class Score(Submission):
    """A program that scores records, and what its owner reads of it."""

    def __init__(
        self, program: Program, sources: tuple[Source, ...], labels: tuple[Label, ...], bounds: tuple[float, float]
    ) -> None:
        super().__init__(program, sources, labels)
        self._bounds = bounds
        self.digest = hashlib.sha256(_PURPOSE + self.digest.encode() + msgspec.msgpack.encode(bounds)).hexdigest()

    @cached_property
    def text(self) -> str:
        """What its owner reads. Raises `ProgramError` for names that could mislead her."""
        low, high = self._bounds
        return (
            "A SCORE: the program below runs on each record by itself. What leaves is the mean over all records of\n"
            f"what it gives, clamped to {low!r} .. {high!r}, without noise, unless the policy asks for some. The\n"
            "values that are brought are chosen by whoever asks: with them she can make a score tell of one record.\n\n"
            + super().text
        )


class Evaluation:
    """One mean score: checked when it is made, and by `check`, before its owner is asked. Raises `UsageError` and
    `ProgramError` for what cannot be one. What takes time is done in steps, a call of the program each.

    `held` and `meter` are the session's; what the loop makes is beside them, within what they have left."""

    def __init__(
        self, message: Evaluate, catalogue: Catalogue, plans: Plans, held: Store, meter: Meter, device: torch.device
    ) -> None:
        self._message, self._catalogue, self._plans = message, catalogue, plans
        self._held, self._meter, self._device = held, meter, device
        self._identity, self.owned = catalogue.identity(message.name), catalogue.owned(message.name)
        self._program = plans.program(message.digest)
        _check_score(self._program)
        _check_inputs(self._program, message.inputs, self.owned, held)
        check_bounds(Statistic("mean", "score", message.bounds))
        self._precedents = Precedents()  # of no other runs: private elements may have decided those of the session
        self._label = Label((self.owned.name,), (self.owned.name,) if self.owned.unit == "person" else ())

    @property
    def what(self) -> str:
        """What is asked for, in the owner's ledger."""
        low, high = self._message.bounds
        return f"a mean score between {low!r} and {high!r}"

    @cached_property
    def score(self) -> Score:
        """What its owner reads, and its digest."""

        def source(item: int | str) -> Source:
            return ("column", self.owned.name, item, self._identity) if isinstance(item, str) else BROUGHT

        of = [source(item) for item in self._message.inputs]
        labels = [self._label if isinstance(item, str) else Label() for item in self._message.inputs]
        return Score(self._program, tuple(of), tuple(labels), self._message.bounds)

    def answered(self, gate: Gate, who: Who, below: Below = secrets.randbelow) -> Generator[Noised | None]:
        """Decided, written down and paid for; then the loop, record by record; and last of all what leaves."""
        data = registered(self._catalogue, self.owned)
        paid, asked = gate.metric(who, data, self.score, self.what)
        whole = self._catalogue.whole(self.owned.name)
        check_same(self.owned.name, self._identity, whole.identity)
        scores = torch.empty(self.owned.count, dtype=torch.float64)
        loop = self._loop()
        for at in range(self.owned.count):
            found = yield from loop.score({name: column[at : at + 1] for name, column in whole.columns.items()})
            if loop.refused is not None:  # the session's time is over: a mean of fewer records is none
                raise loop.refused
            scores[at] = math.nan if found is None else found
        check_same(self.owned.name, self._identity, self._catalogue.identity(self.owned.name))  # replaced meanwhile
        cost = paid.entry.privacy
        spread = 1 / exact(cost.epsilon) if cost is not None else Fraction()
        values, scale = mean_of(self.owned, whole.columns, scores, self._message.bounds, spread, below)
        gate.stands(who, data, asked, self.what)  # it may have taken a while
        yield release_noised(values, scale, gate, who, paid, "a mean score")

    def _loop(self) -> _Loop:
        return _Loop(self._message, self._plans, self._held, self._meter, self._label, self._device, self._precedents)

    def check(self) -> Iterator[None]:
        """A record of zeros tells what would be refused of every record. Raises that."""
        blank = {
            name: torch.zeros((1, *type_.shape), dtype=DTYPES[type_.dtype])
            for name, type_ in self.owned.columns.items()
        }
        loop = self._loop()
        yield from loop.score(blank)
        self._precedents.closed = True
        if loop.refused is not None:
            raise loop.refused


class _Loop:
    """Runs of a program on one record each, in a store of their own. `refused`: the first that its caller may know."""

    def __init__(
        self,
        message: Evaluate,
        plans: Plans,
        held: Store,
        meter: Meter,
        label: Label,
        device: torch.device,
        precedents: Precedents,
    ) -> None:
        self._message, self._plans, self._parent, self._label, self._device = message, plans, meter, label, device
        self._precedents = precedents
        self._inputs = tuple(range(1, 1 + len(message.inputs)))
        self._store = Store()
        left = None if meter.limits.session_bytes is None else max(0, meter.limits.session_bytes - held.held)
        limits = msgspec.structs.replace(meter.limits, session_bytes=left)
        self._meter = Meter(limits, self._store, Randomness(), meter.clock)
        self.refused: Exception | None = None
        for ref, item in zip(self._inputs, message.inputs, strict=True):
            if not isinstance(item, str):  # to be read only, and charged to the session already
                self._store.lend(ref, held[item], PUBLIC)
        self._public = dict(self._store.lent)

    def score(self, record: Mapping[str, torch.Tensor]) -> Generator[None, None, float | None]:
        """What the program gives for one record, a step for each call; `None` if it failed. Raises `LimitError` when
        the session's time is over."""
        store, message = self._store, self._message
        self._meter.history = History()
        self._check_time()
        columns = [(ref, item) for ref, item in zip(self._inputs, message.inputs, strict=True) if isinstance(item, str)]
        for ref, name in columns:
            store.lend(ref, record[name].to(self._device), self._label)
        run = Run(message.digest, self._inputs, (_OUT,))
        for _ in self._plans.run(run, store, self._meter, self._report, precedents=self._precedents):
            yield
            self._check_time()
        value, cell = store.get(_OUT), store.cells.get(_OUT)
        failed = cell is not None and cell.failed
        found = float(value) if isinstance(value, torch.Tensor) and not failed else None
        for ref in (*(ref for ref, _ in columns), _OUT):
            store.drop(ref)
        store.lent.clear()  # of a device's copies, one record's at a time
        store.lent.update(self._public)
        return found

    def _check_time(self) -> None:
        self._meter.spent = self._parent.spent  # which is counted between steps
        self._meter.check_time("evaluate")

    def _report(self, number: int, call: Call, error: Exception) -> Failed:
        self.refused = self.refused or error
        return Failed(msgspec.structs.replace(_FAILURE, operator=call.op))


def _check_score(program: Program) -> None:
    """Refuse what is no score of one record: see NOTE [One record at a time]. Raises `UsageError`."""
    if len(program.outputs) != 1:
        raise UsageError(f"a score is one number, and this program gives {len(program.outputs)} values: return one")
    name = program.outputs[0][0]
    type_ = type_program(program)[name]
    if math.prod(type_.shape) != 1 or DTYPES[type_.dtype].is_complex:
        raise UsageError(f"a score is one real number for one record, and this program gives a {type_}")
    if program.numbers:
        raise UsageError("a score has no numbers that are given anew with each run")
    for item in program.inputs:
        if item.updates:
            raise UsageError(
                f"a score changes nothing, and this program updates '{item.name}': .eval() a module before recording it"
            )
    for call in program.calls:
        if operator(call.op).random:
            raise UsageError(f"a score draws nothing, and this program calls {call.op}: .eval() a module with dropout")


def _check_inputs(program: Program, inputs: tuple[int | str, ...], owned: Owned, held: Store) -> None:
    """Refuse inputs that are neither a column, of which there is one record, nor public. Raises `UsageError`,
    `DataError` or `ProgramError`."""
    if len(inputs) != len(program.inputs):
        raise ProgramError(f"this program has {len(program.inputs)} inputs, and {len(inputs)} were given")
    if not any(isinstance(item, str) for item in inputs):
        raise UsageError("a score is of records: name a column among the inputs")
    for item, given in zip(program.inputs, inputs, strict=True):
        expected = (item.type.dtype, item.type.shape)
        if isinstance(given, str):
            column = owned.columns.get(given)
            if column is None:
                offers = ", ".join(owned.columns)
                raise DataError(f"data set '{owned.name}' has no column {given[:80]!r}; it offers {offers}")
            found = (column.dtype, (1, *column.shape))
            what = f"one record of column '{given}'"
        else:
            spec, what = held.specs.get(given), "what was given"
            if spec is None:
                raise ProgramError(f"input '{item.name}' is no value of this session")
            found = (spec.type.dtype, spec.type.shape)
            label = held.label(given)
            if label:
                raise UsageError(
                    f"input '{item.name}' derives from data set '{label.sources[0]}': all but the record itself is "
                    "public in a score, since a model could else tell each record of all others; have it released first"
                )
        if found != expected:
            raise UsageError(f"input '{item.name}' is a {item.type}, and {what} is {found[0]}{list(found[1])}")
