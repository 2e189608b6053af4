"""The owner's programs: runs of a session's programs that read what only accepted ones may, and questions for them.

What must live here: when an owner is asked for a run, and that its values are known as that run's. What must not: how a
program runs (`plans`), what a submission says (`submission`), what a policy says (`gate`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import ProgramError, UsageError
from ..program.call import Program
from ..program.ops import operator
from ..types import PUBLIC, Label
from ..wire.messages import Requested, Run, Submit
from .gate import Who
from .limits import Meter
from .loans import Loans, Premises
from .plan import Report
from .plans import Plans
from .private import UNSEEDED
from .store import Halt, Store
from .submission import Origin, Submissions

__all__ = ["Programs"]


class Programs:
    """One session's. All it is given is the session's own."""

    def __init__(
        self,
        worker: Premises,
        who: Who,
        store: Store,
        halt: Halt,
        plans: Plans,
        loans: Loans,
        submissions: Submissions,
    ) -> None:
        self._worker, self._who, self._store, self._halt = worker, who, store, halt
        self._plans, self._loans, self._submissions = plans, loans, submissions

    def submit(self, message: Submit) -> Requested:
        """Ask the owner to let a program run on these slots. Raises `UsageError`, `ProgramError` and `PolicyError`."""
        program, uses = self._plans.program(message.digest), self._loans.uses
        if len(message.ids) != len(program.inputs):
            raise ProgramError(f"this program has {len(program.inputs)} inputs, and {len(message.ids)} were given")
        names = uses.among(self._read_by(program, message.ids))
        if not names:
            raise UsageError("this program reads nothing that only programs may read: run it, there is nothing to ask")
        self._loans.check(names)
        self._check_seeded(message.digest)
        submission = self._submissions.of(program, message.ids, uses.closed)
        return self._worker.gate.submit(self._who, names, submission, message.reason, message.runs)

    def run(self, message: Run, meter: Meter, report: Report, every: int) -> Iterator[None]:
        """A run through the meter. If it reads what only programs may read, the owner is asked first, for the whole;
        then its calls are not asked for one by one."""
        origin, program = None, self._plans.program(message.digest)
        if meter.may_use is not None:
            self._plans.check(message, self._store)
            origin = self._admitted(message, program)
        steps = self._drawing(message.digest, self._plans.run(message, self._store, meter, report, every))
        if origin is None:
            yield from steps
            return
        may_use, meter.may_use = meter.may_use, None
        try:
            yield from steps
        finally:
            meter.may_use = may_use
            self._submissions.made(origin, program, message.inputs, message.outs)

    def _drawing(self, digest: str, steps: Iterator[None]) -> Iterator[None]:
        """The steps of a run; what it draws is noted for the whole, since a later run does not go call by call."""
        store = self._store
        before = store.unseeded, store.astray
        try:
            yield from steps
        finally:
            if store.drawn:
                store.unseeded, store.astray = before
                store.drew(self._plans.draws(digest))

    def _admitted(self, message: Run, program: Program) -> Origin | None:
        """What a run's values are made by, if it reads what only programs may read, and may. Raises `PolicyError`, or
        what would make the run fail in any case, before an approval is used."""
        names = self._loans.uses.among(self._read_by(program, message.inputs))
        if not names:
            return None
        if self._halt.cause is not None:
            raise self._halt.cause
        self._loans.check(names)
        self._check_seeded(message.digest)
        submission = self._submissions.of(program, message.inputs, self._loans.uses.closed)
        approval = self._worker.gate.run(self._who, names, submission)
        return self._submissions.after(submission, message.inputs, approval)

    def _check_seeded(self, digest: str) -> None:
        """The state of the generator is an input of a random program, which its owner does not read of."""
        if self._store.unseeded and self._plans.draws(digest).calls:
            raise ProgramError(f"this program draws random numbers, and {UNSEEDED}")

    def _read_by(self, program: Program, ids: tuple[int, ...]) -> Label:
        """The label of all that a run of a program on these slots reads."""
        label = PUBLIC
        for ref in ids:
            label = label | self._store.label(ref)
        if self._store.drawn and any(operator(call.op).random for call in program.calls):
            label = label | self._store.drawn
        return label
