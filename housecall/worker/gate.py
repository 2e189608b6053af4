"""The gate: asks the owner's policies and writes her ledger, before private data is used and before it leaves.

What must live here: every question to a policy, in one place, and what is written down of it. What must not: values. A
decision is made of labels, of who asks and of what the owner signed; nobody here could look at an element.

NOTE [In this order]
A release is decided, then an approval is spent, then the ledger is written and synced to the disk, then the value is
read; and so it is with a run of a program that is asked for. A crash between any two of these can spend an approval for
nothing; it can never let out, or run, what the ledger lacks.

NOTE [For programs only]
Who may run programs on a data set, and not work on it with pointers, can bind its columns all the same. What derives
from it is *closed* in that session: no call may read it, whatever its operator, and no program but an accepted one. So
there is one question for each call, asked by label, and its answer is kept: whatever is closed stays so until the data
set is taken up again. What is not closed is closed with the first frame after its policy has changed, if that no longer
lets her work on it so.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import msgspec

from ..errors import HousecallError, LedgerError, PolicyError, UsageError
from ..owner.approvals import Approval, Request, Requests
from ..owner.ledger import Entry, Kind, Ledger, Sealed
from ..owner.policy import DENY, Asked, Decision, Policy, decide, refused
from ..owner.policy import Kind as AskedKind
from ..owner.spending import Spending
from ..privacy import pipeline
from ..privacy.pipeline import Stage
from ..types import Label, Unit
from ..wire.messages import Requested
from .refusals import Refusals
from .submission import Origin, Submission

__all__ = ["Gate", "Opening", "Question", "Registered", "Uses", "Who", "counted", "unmade"]

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_NO_LEDGER = "this worker keeps no ledger, and without one nothing private is used or leaves"


class Who(NamedTuple):
    """A principal, as the worker knows it: a name, and what it may be."""

    name: str
    role: str


class Question(NamedTuple):
    """What is asked of a value that is to leave: its label; what the owner was asked for, if it is part of that, and
    the SHA-256 of the text that she read; the run that made it, if an accepted program did; and which of the data sets
    are for programs only, if none did."""

    label: Label
    digest: str = ""
    shown: str = ""
    origin: Origin | None = None
    closed: tuple[str, ...] = ()


class Registered(NamedTuple):
    """A data set as its owner registered it: how many records it has, what it protects, and what identifies its data,
    which takes a while the first time."""

    name: str
    records: int
    unit: Unit
    content: Callable[[], str]


def unmade(name: str) -> str:
    """Why a value stays that derives from data for programs only, and that no accepted run has made."""
    return f"data set '{name}' is for programs only, and no accepted program has made this value (rule use.interactive)"


def _now() -> datetime:
    return datetime.now(UTC)


class Gate:
    """One worker's. `policies` gives each data set's policy as it is now, and one that is missing denies; `requests`
    are those that the owner answers; `ledger` is told of every use, refusal and release: without it none happens."""

    def __init__(
        self,
        policies: Mapping[str, Policy] = MappingProxyType({}),
        requests: Requests | None = None,
        ledger: Ledger | None = None,
        *,
        now: Callable[[], datetime] = _now,
    ) -> None:
        self.policies, self.requests, self.ledger, self._now = policies, requests, ledger, now
        self.spending = Spending(ledger) if ledger is not None else None
        self._refusals = Refusals(lambda: self._now())
        self._noticing = threading.Lock()

    def load(self, who: Who, name: str, noted: bool | None = None) -> bool:
        """Whether `who` may work on a data set with pointers; if not, she may have it for programs only. Raises
        `PolicyError` for who may neither. `noted`: what is in the ledger already of this session and the data set."""
        decision = self._decide((name,), Asked("interactive", who.name, who.role))
        interactive = decision.allowed
        if not interactive and self._decide((name,), Asked("programs", who.name, who.role)).allowed:
            decision = Decision(True, text=f"allowed by {name}, for programs only")
        if not decision.allowed or noted is not interactive:
            self._note("run" if decision.allowed else "refusal", who, Label((name,)), "", decision.text)
        if not decision.allowed:
            raise PolicyError(decision.text)
        return interactive

    def interactive(self, who: Who, name: str) -> bool:
        """Whether `who` may work on a data set with pointers now. Nothing is written."""
        return self._decide((name,), Asked("interactive", who.name, who.role)).allowed

    def work(self, who: Who, names: tuple[str, ...]) -> str:
        """Why `who` may not work on these data sets with pointers; empty if she may."""
        decision = self._decide(names, Asked("interactive", who.name, who.role))
        if not decision.allowed:
            self._note("refusal", who, Label(names), "", decision.text)
        return "" if decision.allowed else decision.text

    def run(self, who: Who, names: tuple[str, ...], submission: Submission) -> Approval | None:
        """Whether a program may run on these data sets now; when this returns, the run is in the ledger and the use of
        an approval is counted, which is returned if it took one. Raises `PolicyError` or `LedgerError`."""
        self.notice()
        digest = submission.digest
        asked = Asked("plan", who.name, who.role, digest=digest)
        decision, approval = self._decide(names, asked), None
        if not decision.allowed and decision.approvable and self.requests is not None:
            approval = self.requests.spend(who.name, who.role, "program", digest, submission.shown, names, self._now())
            if approval is not None:
                decision = self._decide(names, msgspec.structs.replace(asked, approved=True))
                digest = f"{digest} (request {approval.id})"
        kind: Kind = "run" if decision.allowed else "refusal"
        self._note(kind, who, Label(names), digest, f"a program: {decision.text}")
        if not decision.allowed:
            raise PolicyError(decision.text)
        return approval

    def submit(
        self, who: Who, names: tuple[str, ...], submission: Submission, reason: str, runs: int, *, scores: int = 0
    ) -> Requested:
        """Put a program before the owner, if she wants to be asked; to run it, or to score so many records. Raises
        `PolicyError` if no approval could ever permit it, and what `Submission.text` does."""
        if not names:
            raise UsageError("this program reads nobody's data: run it, there is nothing to ask")
        kind: AskedKind = "metrics" if scores else "plan"
        decision = self._decide(names, Asked(kind, who.name, who.role, digest=submission.digest, count=scores))
        if decision.allowed:
            return Requested("", "approved", "the policy accepts this program", submission.digest)
        if not decision.approvable or self.requests is None:
            raise PolicyError(f"asking is of no use: {decision.text}")
        made = self.requests.ask(who.name, who.role, "program", names, submission.digest, submission.text, reason, runs)
        what = "to make a mean score" if scores else "to run a program"
        self._note("request", who, Label(names), made.digest, f"request {made.id}: {what} {_times(runs)}")
        return Requested(made.id, made.status, made.words, made.digest)

    def release(self, who: Who, question: Question, what: str = "", *, spends: bool = True) -> None:
        """Whether values may leave, `what` says how many; when this returns, it is in the ledger. `spends`: an approval
        may be used up for them. Raises `PolicyError` or `LedgerError`."""
        self.notice()
        label, digest, _, origin, closed = question
        asked = Asked("exact", who.name, who.role, digest=digest)
        decision = self._decide(label.sources, asked)
        if decision.allowed and closed:  # who may have what accepted programs make may not have what they read
            decision = Decision(False, closed[0], "use.interactive", unmade(closed[0]))
        program = digest or (origin.digest if origin is not None else "")
        if not decision.allowed and decision.approvable and self.requests is not None:
            answered = self._answered(who, question, self.requests, spends)
            if answered is not None:
                decision = self._decide(label.sources, msgspec.structs.replace(asked, approved=True))
                program = answered
        text = f"{decision.text}: {what}" if what and decision.allowed else decision.text
        self._note("release" if decision.allowed else "refusal", who, label, program, text)
        if not decision.allowed:
            raise PolicyError(decision.text)

    def statistics(self, who: Who, data: Registered, epsilon: float, what: str) -> Sealed:
        """Whether a statistic may be made of a data set, and paid by the budget of its data; when this returns, it is
        spent, and in the ledger. Raises `PolicyError` or `LedgerError`."""
        self.notice()
        if self.ledger is None:
            raise LedgerError(_NO_LEDGER)
        names, policy = (data.name,), self.policies.get(data.name, DENY)  # once: both answers are this version's
        decision = decide({data.name: policy}, names, Asked("statistics", who.name, who.role), self._now())
        if not decision.allowed:
            self._note("refusal", who, Label(names), "", f"{what}: {decision.text}")
            raise PolicyError(decision.text)
        entry = Entry("reserve", f"{who.role} '{who.name}'", names, decision=f"{what}: {decision.text}")
        return self._reserved(who, data, policy, entry, what, epsilon=epsilon)

    def scores(self, who: Who, data: Registered) -> None:
        """Whether `who` may ask for mean scores of a data set at all: before anything is done with a program of hers.
        Raises `PolicyError`."""
        decision = self._decide((data.name,), Asked("scores", who.name, who.role, count=data.records))
        self._refuse(who, data, decision, "a mean score")

    def stands(self, who: Who, data: Registered, asked: Asked, what: str) -> None:
        """Whether what was permitted still is, when it has been made. Raises `PolicyError`."""
        self._refuse(who, data, self._decide((data.name,), asked), what)

    def _refuse(self, who: Who, data: Registered, decision: Decision, what: str) -> None:
        if not decision.allowed:
            self._note("refusal", who, Label((data.name,)), "", f"{what}: {decision.text}")
            raise PolicyError(decision.text)

    def metric(self, who: Who, data: Registered, submission: Submission, what: str) -> tuple[Sealed, Asked]:
        """Whether a mean score may be made of a data set, by this program; when this returns, what it costs is spent,
        or an approval is used, and it is in the ledger. Also returned is what was asked, for `stands`. Raises
        `PolicyError` or `LedgerError`."""
        self.notice()
        policy = self.policies.get(data.name, DENY)  # once: all answers are this version's
        asked = Asked("metrics", who.name, who.role, digest=submission.digest, count=data.records)
        names, digest, now = (data.name,), submission.digest, self._now()
        decision = decide({data.name: policy}, names, asked, now)
        if not decision.allowed and decision.approvable and self.requests is not None:
            approval = self.requests.spend(who.name, who.role, "program", digest, submission.shown, names, now)
            if approval is not None:
                asked = msgspec.structs.replace(asked, approved=True)
                decision = decide({data.name: policy}, names, asked, now)
                digest = f"{digest} (request {approval.id})"
        if not decision.allowed:
            self._note("refusal", who, Label(names), digest, f"{what}: {decision.text}")
            raise PolicyError(decision.text)
        entry = Entry("run", f"{who.role} '{who.name}'", names, digest, decision=f"{what}: {decision.text}")
        epsilon = policy.release.metrics.epsilon
        paid = self._reserved(who, data, policy, entry, what, epsilon=epsilon) if epsilon else self._append(entry)
        return paid, asked

    def update(self, who: Who, sources: Sequence[Registered], what: str) -> tuple[tuple[Stage, ...], list[Sealed]]:
        """Whether an update that derives from these data sets may leave, and through which stages; when this returns,
        what it costs is spent of each, and in the ledger. Raises `PolicyError` or `LedgerError`."""
        self.notice()
        names = tuple([data.name for data in sources])
        policies = {name: self.policies.get(name, DENY) for name in names}
        stages = max((policy.release.update for policy in policies.values()), key=len)  # the others begin it, or refuse
        decision = decide(policies, names, Asked("update", who.name, who.role, pipeline=stages), self._now())
        if not decision.allowed:
            self._note("refusal", who, Label(names), "", f"{what}: {decision.text}")
            raise PolicyError(decision.text)
        said = f"{what}: {decision.text}"
        entry = Entry("run", f"{who.role} '{who.name}'", pipeline=tuple(map(str, stages)), decision=said)
        costs = [(data, policies[data.name], pipeline.rho(policies[data.name].release.update)) for data in sources]
        for data, policy, rho in costs:  # so that none pays where another cannot
            if rho:
                self._payable(who, data, policy, what, rho)
        return stages, [self._paid(who, data, policy, entry, what, rho) for data, policy, rho in costs]

    def _paid(self, who: Who, data: Registered, policy: Policy, entry: Entry, what: str, rho: float) -> Sealed:
        whose = msgspec.structs.replace(entry, data_sets=(data.name,))
        return self._reserved(who, data, policy, whose, what, rho=rho) if rho else self._append(whose)

    def _payable(self, who: Who, data: Registered, policy: Policy, what: str, rho: float) -> None:
        self._spend(
            who, data, what, "", lambda spending, content: spending.check(content, policy.budget, data.unit, 0, rho)
        )

    def _reserved(self, who: Who, data: Registered, policy: Policy, entry: Entry, what: str, **cost: float) -> Sealed:
        """Spend the cost of something that is allowed, and write that down. Raises `PolicyError` or `LedgerError`."""

        def reserve(spending: Spending, content: str) -> Sealed:
            return spending.reserve(entry, content, policy.budget, data.unit, **cost)

        return self._spend(who, data, what, entry.program, reserve)

    def _spend(
        self, who: Who, data: Registered, what: str, program: str, spend: Callable[[Spending, str], Answer]
    ) -> Answer:
        """Do something with what is spent of this data. A refusal is the policy's, and is written down."""
        if self.spending is None:
            raise LedgerError(_NO_LEDGER)
        try:
            return spend(self.spending, data.content())
        except PolicyError as error:
            text = refused(data.name, "budget.epsilon", str(error))
            self._note("refusal", who, Label((data.name,)), program, f"{what}: {text}")
            raise PolicyError(text) from None

    def _append(self, entry: Entry) -> Sealed:
        if self.ledger is None:
            raise LedgerError(_NO_LEDGER)
        return self.ledger.append(entry)

    def answered(self, who: Who, paid: Sealed, what: str) -> None:
        """Write down that what was paid leaves now. Raises `LedgerError`, and then it does not."""
        entry = msgspec.structs.replace(paid.entry, kind="release", of=paid.sequence, identity=msgspec.UNSET)
        names = ", ".join(entry.data_sets)
        log.info("release: %s to %s '%s' (%s)", what, *reversed(who), names, extra={"event": "release"})
        self._append(entry)

    def left(self, paid: Sealed) -> float:
        """What the budget of a data set has left for the data of which something was paid; of what costs nothing there
        is no end."""
        if self.spending is None or paid.entry.identity is msgspec.UNSET:
            return math.inf
        (name,) = paid.entry.data_sets
        return self.spending.left(paid.entry.identity, self.policies.get(name, DENY).budget)

    def _answered(self, who: Who, question: Question, requests: Requests, spends: bool) -> str | None:
        """What the owner approved that lets this out: of the runs that led to it, or, used up by this, of the value."""
        label, digest, shown, origin, _ = question
        runs = origin.approvals if origin is not None else None
        if origin and runs and requests.lets_out(runs, who.name, who.role, label.sources, self._now(), origin.behind):
            return f"{origin.digest} (request {', '.join(sorted(runs))})"
        if not digest or not spends:
            return None
        approval = requests.spend(who.name, who.role, "value", digest, shown, label.sources, self._now())
        if approval is None:
            return None
        self._note("approval", who, label, digest, f"request {approval.id}: used, as the owner signed")
        return f"{digest} (request {approval.id})"

    def refuse(self, who: Who, label: Label, why: str) -> None:
        """Write down a refusal that no policy was asked for. Raises `LedgerError`."""
        self._note("refusal", who, label, "", why)

    def request(self, who: Who, label: Label, digest: str, program: str, reason: str) -> Requested:
        """Put a request for values before the owner. Raises `PolicyError` if no approval could ever permit it."""
        decision = self._decide(label.sources, Asked("exact", who.name, who.role))
        if decision.allowed:
            raise UsageError("there is nothing to ask: the policy lets these values out to you")
        if not decision.approvable or self.requests is None:
            raise PolicyError(f"asking is of no use: {decision.text}")
        made = self.requests.ask(who.name, who.role, "value", label.sources, digest, program, reason)
        self._note("request", who, label, digest, f"request {made.id}: to take a value")
        return Requested(made.id, made.status, made.words, digest)

    def status(self, who: Who, request: str) -> Requested:
        """How a request stands, for whoever made it. Raises `PolicyError` for any other."""
        if self.requests is None:
            raise PolicyError(f"there is no request {request[:40]!r}")
        self.notice()
        found = self.requests.get(request, who.name, who.role)
        return Requested(found.id, found.status, found.words, found.digest)

    def notice(self) -> None:
        """Write the owner's answers since the last time into the ledger. There is one writer of it, the worker; she may
        answer in another process. Raises `LedgerError`."""
        if self.ledger is None:
            return
        self.settle()
        if self.requests is None:
            return
        with self._noticing:
            for request, approval in self.requests.news():
                kind, text = _answer(request, approval)
                who = f"{request.role} '{request.principal}'"
                self.ledger.append(Entry(kind, who, request.data_sets, request.digest, decision=text))
                self.requests.told(request)

    def _decide(self, sources: tuple[str, ...], asked: Asked) -> Decision:
        return decide(self.policies, sources, asked, self._now())

    def settle(self, ended: Who | None = None, *, everything: bool = False) -> None:
        """Write how many refusals were only counted, once their minute is over, or of whom a session has `ended`.
        Raises `LedgerError`."""
        for who, count, by_name in self._refusals.over(ended, everything=everything):
            of = f": {', '.join(f'{number:,} of {name}' for name, number in by_name.items())}" if by_name else ""
            self._write("refusal", who, Label(tuple(by_name)), "", f"{count:,} refusals more were counted{of}")

    def _note(self, kind: Kind, who: Who, label: Label, digest: str, text: str) -> None:
        """Write the ledger. A release that cannot be written does not happen; nor does anything else."""
        self.settle()
        if kind == "refusal" and not self._refusals.admits(who, self._known(label)):
            return
        self._write(kind, who, label, digest, text)

    def _known(self, label: Label) -> tuple[str, ...]:
        """The data sets of a label that there are, as far as policies say."""
        return tuple([name for name in label.sources if name in self.policies])

    def _write(self, kind: Kind, who: Who, label: Label, digest: str, text: str) -> None:
        principal = f"{who.role} '{who.name}'"
        log.info("%s: %s (%s) %s", kind, principal, label, text, extra={"event": kind, "principal": principal})
        if self.ledger is None:
            raise LedgerError(_NO_LEDGER)
        self.ledger.append(Entry(kind, principal, label.sources, digest, decision=text))


def _answer(request: Request, approval: Approval | None) -> tuple[Kind, str]:
    """An owner's answer in words."""
    name = f"request {request.id}"
    if request.status == "denied":
        return "denial", f"{name}: {request.words}"
    if approval is None:
        return "approval", f"{name}: said to be approved, and there is no approval that the owner signed"
    release = ", and what it makes may leave" if approval.release else ""
    return "approval", f"{name}: {_times(approval.uses)} until {approval.expires:%Y-%m-%d %H:%M} UTC{release}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


class Uses:
    """What one session may do with the data sets that it has taken up: see NOTE [For programs only]. `gate` gives the
    worker's, as it is now."""

    def __init__(self, gate: Callable[[], Gate], who: Who) -> None:
        self._gate, self._who = gate, who
        self.closed: set[str] = set()
        self._open: dict[str, Policy | None] = {}  # what is not closed, and the policy by which it was taken up
        self._noted: dict[tuple[str, str], bool] = {}  # what the ledger has
        self._answers: dict[Label, str] = {}

    def load(self, name: str, identity: str) -> None:
        """Take up a data set of this identity, if its policy lets her. Raises `PolicyError`."""
        gate, data = self._gate(), (name, identity)
        policy = gate.policies.get(name)  # before it is asked: if it changes meanwhile, that is seen
        interactive = self._noted[data] = gate.load(self._who, name, self._noted.get(data))
        if interactive:
            self.closed.discard(name)
            self._open[name] = policy
        else:
            self.close(name)
        self._answers.clear()

    def close(self, name: str) -> None:
        """From now on a data set is for programs only, until it is taken up again."""
        self._open.pop(name, None)
        self.closed.add(name)
        self._answers.clear()

    def renew(self) -> None:
        """Look, once a frame, whether a policy has changed by which a data set was taken up, and close what may no
        longer be worked on with pointers."""
        gate = self._gate()
        for name, policy in list(self._open.items()):
            now = gate.policies.get(name)
            if now is not policy:
                if gate.interactive(self._who, name):
                    self._open[name] = now
                else:
                    self.close(name)

    def among(self, label: Label) -> tuple[str, ...]:
        """Which data sets of a label are closed."""
        return tuple([name for name in label.sources if name in self.closed])

    def check(self, label: Label) -> None:
        """Before a call reads values of this label. Raises `PolicyError` if some are closed."""
        answer = self._answers.get(label)
        if answer is None:
            names = self.among(label)
            answer = self._answers[label] = self._gate().work(self._who, names) if names else ""
        if answer:
            raise PolicyError(answer)


class Opening:
    """The door during one message: what is asked twice is decided, and written, once. `counts`: how many tensors, and
    how many values in them, each question is about.

    What a message asks for first is what its sender wants, the rest (its gradient) comes along: if that is refused, no
    approval is used up for the rest."""

    def __init__(self, gate: Gate, who: Who, counts: Mapping[Question, tuple[int, int]] = MappingProxyType({})) -> None:
        self._gate, self._who, self._counts = gate, who, counts
        self._answers: dict[Question, HousecallError | None] = {}
        self._spends = True

    def ask(self, question: Question) -> None:
        """Whether these values may leave now. Raises `PolicyError` or `LedgerError`."""
        if question not in self._answers:
            first = not self._answers
            self._answers[question] = self._answer(question)
            if first and self._answers[question] is not None:
                self._spends = False
        refusal = self._answers[question]
        if refusal is not None:
            raise refusal

    def _answer(self, question: Question) -> HousecallError | None:
        tensors, values = self._counts.get(question, (0, 0))
        what = f"{tensors:,} tensor{'s' if tensors != 1 else ''}, {values:,} value{'s' if values != 1 else ''}"
        try:
            self._gate.release(self._who, question, what, spends=self._spends)
        except HousecallError as error:
            return error
        return None


def counted(questions: Iterable[tuple[Question, int]]) -> dict[Question, tuple[int, int]]:
    """How many tensors each question is about, and how many values in them."""
    found: dict[Question, tuple[int, int]] = {}
    for question, values in questions:
        tensors, so_far = found.get(question, (0, 0))
        found[question] = tensors + 1, so_far + values
    return found
