"""Taking guards away, one at a time: what each attack must then succeed against."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import torch

from housecall.errors import PolicyError
from housecall.owned import catalogue
from housecall.owned.catalogue import Catalogue
from housecall.owner import approvals, ledger, policies, policy, spending
from housecall.owner.approvals import Approval, Request, Requests
from housecall.owner.ledger import Entry, Sealed
from housecall.owner.policy import Decision
from housecall.owner.spending import Spending
from housecall.privacy.accounting import Cost
from housecall.privacy.clip import Clip
from housecall.privacy.noise import Noise
from housecall.program import forecast, ops
from housecall.program.ops import _parse
from housecall.program.run import _runner, execute
from housecall.types import PUBLIC
from housecall.worker import evaluation, gate, history, limits, private, statistics, store, submission, update
from housecall.worker.evaluation import Score
from housecall.worker.gate import Gate, Opening, Uses
from housecall.worker.limits import Meter
from housecall.worker.loans import Loans
from housecall.worker.programs import Programs
from housecall.worker.store import Store
from housecall.worker.submission import BROUGHT, Origin, Submission, Submissions
from housecall.worker.worker import WorkerSession

__all__ = ["GUARDS", "without"]

Patches = Callable[[], Any]


def _open_run(call: Any, made: Any, label: Any, failed: Any, store: Store, randomness: Any, history: Any) -> None:
    """`run_private` that fails as a public call would."""
    written = [ref for _, ref in _writes(call)]
    execute(call, store, randomness)
    for out in call.outs:
        if out in store:
            store.count(out, store[out])
    store.mark((*call.outs, *written), label, failed=failed)


def _unsettled(value: Any, made: Any, taken: Any, device: Any) -> Any:
    return private.blank(made, device) if value is None else value


_writes, _read_by, _spend = store.writes, Store.read_by, Requests.spend


def _only_said(call: Any) -> list[tuple[str, int]]:
    """What torch's schemas say, which is nothing of running statistics."""
    return [(name, ref) for name, ref in _writes(call) if not name.startswith("running_")]


def _write_uncounted(self: Store, call: Any) -> None:
    counted = {ref: self.cells[ref].writes for _, ref in _writes(call) if ref in self.cells}
    _write(self, call)
    for ref, before in counted.items():
        self.cells[ref].writes = before


_write = Store.write


def _write_unrefused(self: Store, call: Any) -> None:
    lent, self.lent = self.lent, {}
    try:
        _write(self, call)
    finally:
        self.lent = lent


def _count_apart(self: Store, ref: int, value: Any, expected: Any = None) -> None:
    """Each slot has a cell of its own, whatever its storage."""
    self._by_address.clear()
    _count(self, ref, value, expected)


_count = Store.count


def _undrawn(self: Store, call: Any) -> Any:
    self.drawn = PUBLIC
    return _read_by(self, call)


def _any_principal(self: Requests, *args: Any) -> Any:
    _, _, kind, digest, _, _, now = args
    return next(
        (a for a in self._approvals() if (a.kind, a.digest) == (kind, digest) and now < a.expires and self._used(a)),
        None,
    )


def _timeless(self: Requests, *args: Any) -> Any:
    return _spend(self, *args[:6], datetime(2000, 1, 1, tzinfo=UTC))


def _good(self: Requests, who: str, role: str, kind: Any, digest: str, shown: str, sets: Any, now: Any) -> Approval:
    return Approval("0" * 16, who, role, kind, tuple(sets), digest, 1, now, shown)


def _silent_note(self: Gate, *args: Any) -> None:
    with contextlib.suppress(Exception):
        _note(self, *args)


_note, _get = Gate._note, Requests.get


def _once_for_all(self: Opening, question: Any) -> None:
    if not getattr(self, "opened", False):
        self._gate.release(self._who, question)
        self.opened = True


def _bound_again(self: Meter, message: Any) -> None:
    self._store.drop(message.id)
    self._store[message.id] = message.value.data
    self._store.count(message.id, message.value.data)


class _Id(int):
    """Stands for a cell."""


class _ById:
    """A store whose cells, or the numbers of whose bindings, are the ids of its slots."""

    def __init__(self, store: Store, cells: bool) -> None:
        self.specs = store.specs
        self.cells: Any = {ref: _Id(ref) for ref in store.cells} if cells else store.cells
        self.bindings: Any = store.bindings if cells else {ref: ref for ref in store.cells}


_add, _program, _bound_as = history.History.add, history.History.program, history.History.lent


def _kept_by_id(cells: bool) -> tuple[Any, ...]:
    """A history that knows ids, not storages; or not bindings."""
    return (
        patch.object(history.History, "add", lambda self, *args: _add(self, *args[:3], _ById(args[3], cells))),
        patch.object(history.History, "program", lambda self, ids, store: _program(self, ids, _ById(store, cells))),
        patch.object(history.History, "lent", lambda self, *args: _bound_as(self, *args[:2], _ById(args[2], cells))),
    )


def _with_withheld(self: Catalogue, name: str) -> Any:
    lent = _lent(self, name)
    return lent._replace(columns=self._columns(name).columns)


_lent, _column = Catalogue.lent, Submissions.lent


def _whatever_data(self: Submissions, ref: int, data_set: str, column: str, identity: str) -> None:
    _column(self, ref, data_set, column, "")


def _unlooked_at(path: Any, owned: Any, digest: str) -> Any:
    """A mock's file, whatever it is now."""
    return catalogue._mapped(path, owned.name, owned.columns, owned.mock)


def _loosely(entries: Any, principal: str, role: str) -> bool:
    """Names that look like rules are taken for them."""
    return bool({principal.strip(), f"{role}/{principal}", principal.rpartition("/")[2]} & {*entries, "*", ""})


def _source_by_id(self: Submissions, ref: int) -> Any:
    """Whatever is bound to an id that was a column's is taken for that column."""
    if not hasattr(self, "known"):
        self.known = {}
    found = _source(self, ref)
    return self.known.setdefault(ref, found) if found[0] == "column" else self.known.get(ref, found)


def _after_alone(self: Submissions, made: Submission, refs: Any, approval: Any) -> Origin:
    """What went before does not matter."""
    return Origin(made.digest, frozenset([approval.id]) if approval is not None and approval.release else None)


def _made_of_storages(self: Submissions, origin: Origin, program: Any, inputs: Any, outs: Any) -> None:
    """All that shares a storage with what a run has made was made by it."""
    cells = {self._store.cells[ref] for ref in outs if ref in self._store.cells}
    shared = [ref for ref, cell in self._store.cells.items() if cell in cells]
    outputs = (*program.outputs, *((f"shared{ref}", 0) for ref in shared))
    _made(self, origin, msgspec.structs.replace(program, outputs=outputs), inputs, [*outs, *shared])


def _nameless(self: Submissions, ref: int) -> Any:
    """All that a run makes is alike."""
    found = _named(self, ref)
    return found and (found[0], "")


def _as_of_itself(self: Requests, ids: Any, principal: str, role: str, data_sets: Any, now: Any, behind: Any) -> bool:
    """What another program made is its own affair."""
    return _lets_out(self, ids, principal, role, data_sets, now)


_source, _made, _named = Submissions._source, Submissions.made, Submissions._made
_lets_out = Requests.lets_out


def _nothing_spent(self: Spending, identity: str) -> Cost:
    return Cost()


def _unpaid(self: Spending, entry: Entry, *args: Any, **cost: float) -> Sealed:
    return Sealed(1, datetime(2026, 1, 1, tzinfo=UTC), "0" * 64, entry, "0" * 128)


def _of_floats(total: int, scale: Fraction, below: Any) -> Any:
    return total + float(scale) * math.log(random.Random(1).random())


def _unclamped(self: Any, values: torch.Tensor) -> torch.Tensor:
    return (values / self.step).to(torch.int64)


def _each_record(data: Any, *args: Any) -> Any:
    """A person adds as much as her records do."""
    return statistics._sum(data, *args)


def _unbounded(self: Noise, update: Any, bound: float) -> Any:
    return np.nan_to_num(update / bound * (2**20 / self.multiplier))


def _unbounded_score(program: Any, sources: Any, labels: Any, bounds: Any) -> Score:
    return Score(program, sources, labels, (0.0, 1.0))


def _score_of_whatever(program: Any, sources: Any, labels: Any, bounds: Any) -> Score:
    return Score(program, tuple([BROUGHT for _ in sources]), labels, bounds)


def _before_the_rules(self: Gate, who: Any, data: Any, epsilon: float, what: str) -> Sealed:
    assert self.spending is not None
    budget = self.policies[data.name].budget
    if epsilon > self.spending.left(data.content(), budget):
        raise PolicyError(f"{self.spending.left(data.content(), budget)} is left")
    return _paid(self, who, data, epsilon, what)


_paid = Gate.statistics


_TABLE = {
    **ops.table(),
    **{
        f"{op}.{overload}": str(getattr(getattr(torch.ops.aten, op), overload)._schema).removeprefix("aten::")
        for op, overload in (
            ("empty", "memory_format"),
            ("as_strided", "default"),
            ("set_", "source_Tensor"),
            ("resize_", "default"),
        )
    },
}

GUARDS: dict[str, tuple[Any, ...]] = {
    "door": (patch.object(Gate, "release", lambda *args, **options: None),),
    "load": (patch.object(Gate, "load", lambda *args: True),),
    "labels": (patch.object(Store, "read_by", lambda self, call: (PUBLIC, False)),),
    "aliases": (
        patch.object(Store, "read_by", lambda self, call: (PUBLIC, False)),
        patch.object(Store, "count", _count_apart),
    ),
    "write labels": (patch.object(private, "writes", lambda call: []),),
    "unsaid writes": (patch.object(store, "writes", _only_said), patch.object(private, "writes", _only_said)),
    "lent": (patch.object(Store, "write", _write_unrefused),),
    "shapes": (
        patch.object(limits, "check_private", lambda *args: None),
        patch.object(limits, "check_made", lambda *args: None),
        patch.object(limits, "run_private", _open_run),
    ),
    "settled": (patch.object(private, "settled", _unsettled),),
    "hidden failures": (patch.object(limits, "run_private", _open_run),),
    "drawn": (patch.object(Store, "read_by", _undrawn),),
    "bound": (patch.object(Meter, "put", _bound_again),),
    "key": (patch.object(Store, "write", _write_uncounted),),
    "lives": (
        patch.object(WorkerSession, "_key", lambda self, ref: f"{self.id}/{ref}/{self.store.cells[ref].writes}"),
    ),
    "spend": (patch.object(Requests, "spend", _good),),
    "uses": (patch.object(Requests, "_used", lambda self, approval: True),),
    "genuine": (patch.object(Approval, "genuine", lambda self, public: True),),
    "expiry": (patch.object(Requests, "spend", _timeless),),
    "approval's principal": (patch.object(Requests, "spend", _any_principal),),
    "request's principal": (patch.object(Requests, "get", lambda self, id, *who: _get(self, id)),),
    "one answer for all": (patch.object(Opening, "ask", _once_for_all),),
    "shown by storage": _kept_by_id(cells=True),
    "shown by binding": _kept_by_id(cells=False),
    "forgotten": (
        patch.object(history.History, "forgotten", property(lambda self: 0, lambda self, n: None), create=True),
    ),
    "ledger": (patch.object(Gate, "_note", _silent_note),),
    "signatures": (patch.object(policies, "verify", lambda public, message, signature: True),),
    "versions": (patch.object(policies.Seen, "check", lambda self, name, version, text: True),),
    "mocks apart": (patch.object(Catalogue, "_mock", Catalogue._columns),),
    "mock's file": (patch.object(catalogue, "_load_mock", _unlooked_at),),
    "withheld": (patch.object(Catalogue, "lent", _with_withheld),),
    "replaced": (patch.object(Loans, "gone", lambda self: frozenset()),),
    "one meaning": (patch.object(Loans, "_check_same", lambda self, name, identity: None),),
    "approved for the data": (patch.object(Submissions, "lent", _whatever_data),),
    "signed for the data": (patch.object(catalogue, "unsign", lambda folder, name: None),),
    "shown": (patch.object(history.History, "add", lambda *args: None),),
    "printable": (patch.object(approvals, "_printable", lambda what, text, limit: None),),
    "bound once": (patch.object(Store, "__contains__", lambda self, ref: False),),
    "policy": (patch.object(gate, "decide", lambda *args: Decision(True)),),
    "names of principals": (patch.object(policy, "matches", _loosely),),
    "chained": (
        patch.object(ledger._Walk, "_follows", lambda *args: None),
        patch.object(ledger._Walk, "_has_head", lambda self, line, head: next(self._heads, None)),
        patch.object(ledger._Walk, "_is_signed", lambda *args: True),
        patch.object(ledger._Walk, "_fits", lambda *args: None),
    ),
    "written first": (patch.object(Gate, "_note", lambda *args: None),),
    "closed": (patch.object(Uses, "check", lambda self, label: None),),
    "closed, and hidden failures": (
        patch.object(Uses, "check", lambda self, label: None),
        patch.object(limits, "run_private", _open_run),
    ),
    "accepted": (patch.object(Gate, "run", lambda *args: None),),
    "sources": (patch.object(Submissions, "_source", lambda self, ref: BROUGHT),),
    "types": (patch.object(Submissions, "_check_types", lambda *args: None),),
    "apart": (patch.object(Submissions, "_check_apart", lambda *args: None),),
    "columns by binding": (patch.object(Submissions, "_source", _source_by_id),),
    "text that was read": (
        patch.object(Request, "shown", property(lambda self: "")),
        patch.object(Submission, "shown", ""),
    ),
    "names": (patch.object(submission, "_check_names", lambda program: None),),
    "chain": (patch.object(Submissions, "after", _after_alone),),
    "of slots": (patch.object(Submissions, "made", _made_of_storages),),
    "which value": (patch.object(Submissions, "_made", _nameless),),
    "behind": (patch.object(Requests, "lets_out", _as_of_itself),),
    "seeded": (patch.object(Programs, "_check_seeded", lambda self, digest: None),),
    "renewed": (patch.object(Uses, "renew", lambda self: None),),
    "still good": (patch.object(Requests, "lets_out", lambda *args: True),),
    "spent": (patch.object(Spending, "_spent", _nothing_spent),),
    "content": (patch.object(Catalogue, "content", Catalogue.identity),),
    "recounted": (patch.object(spending, "recount", lambda entries: {}),),
    "paid": (patch.object(Spending, "reserve", _unpaid), patch.object(Gate, "answered", lambda *args: None)),
    "answered": (patch.object(Gate, "answered", lambda *args: None),),
    "offered": (patch.object(statistics, "_check_column", lambda *args: None),),
    "same data": (patch.object(statistics, "check_same", lambda *args: None),),
    "noise": (patch.object(statistics, "noised", lambda total, scale, below: total),),
    "whole steps": (patch.object(statistics, "noised", _of_floats),),
    "clamped": (patch.object(statistics._Grid, "steps", _unclamped),),
    "one contribution": (patch.dict(statistics._MADE, {("sum", "person"): _each_record}),),
    "refused alike": (patch.object(Gate, "statistics", _before_the_rules),),
    "noised update": (patch.object(Noise, "passed", lambda self, update, bound, random: update),),
    "clipped": (
        patch.object(Clip, "passed", lambda self, update: update),
        patch.object(Noise, "steps", _unbounded),
    ),
    "since is public": (patch.object(update, "_check", lambda *args: None),),
    "public in a score": (patch.object(evaluation, "_check_inputs", lambda *args: None),),
    "made by a program": (patch.object(Submissions, "origin", lambda self, ref: Origin("", None)),),
    "a score that writes": (
        patch.object(evaluation, "_check_score", lambda program: None),
        patch.object(Store, "write", _write_unrefused),
    ),
    "a score": (patch.object(evaluation, "_check_score", lambda program: None),),
    "score's bounds": (patch.object(evaluation, "Score", _unbounded_score),),
    "score's column": (patch.object(evaluation, "Score", _score_of_whatever),),
    "withheld column": (
        patch.object(evaluation, "_check_inputs", lambda *args: None),
        patch.object(evaluation.Evaluation, "check", lambda self: iter(())),
    ),
    "limits": (patch.object(limits, "_number", lambda limit: math.inf),),
    "table": (patch.object(ops, "table", lambda: _TABLE),),
}


@contextlib.contextmanager
def without(guard: str) -> Iterator[None]:
    """Within, a guard is not there."""
    with contextlib.ExitStack() as stack:
        for change in GUARDS[guard]:
            stack.enter_context(change)
        try:
            yield
        finally:
            for known in (_parse, _runner, limits._rule, forecast._rule):  # of operators that are none
                known.cache_clear()
