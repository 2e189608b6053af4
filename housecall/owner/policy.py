"""`Policy`: what an owner lets whom do with one data set, and the decisions that follow from it.

What must live here: every key of a policy with its default and the sentence that explains it, and `decide`, a pure
function of policies, of who asks what, and of the time. What must not: torch, files, keys, and any private value. A
decision cannot depend on a value because it never sees one.

NOTE [Releases that are not offered]
"The mean over at least k records" is not a release. Two such means whose records differ by one person give that
person's value by subtraction (a differencing attack: Dinur and Nissim 2003; Dwork and Roth 2014, section 1.1), and a
program can make a mean of k records out of one record and k - 1 constants. The means that do leave are `statistics` and
`metrics`: of all records, made and noised by the owner's own code, paid from a budget. There, a minimum count is no
promise either; it keeps metrics from leaving whose noise would drown them. Metrics without noise are exact means of a
score that somebody else chose, through a model that is hers: an owner may let them out, of programs that she accepts
one by one, and is told that this is as good as exact values. So are updates through stages without noise.

NOTE [Several owners]
A value that derives from several data sets leaves only if each of their policies lets it. The first refusal, in the
order of the names, is the answer: the same question has the same answer at any time.
"""

from __future__ import annotations

import math
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta

from ..errors import PolicyError
from ..privacy import pipeline
from ..privacy.accounting import Cost, exact
from ..privacy.pipeline import Stage

__all__ = [
    "DENY",
    "Asked",
    "Budget",
    "Decision",
    "Kind",
    "Metrics",
    "Plans",
    "Policy",
    "Release",
    "Use",
    "decide",
    "matches",
    "refused",
    "unpaid",
]

_WHO = re.compile(r"(?:[a-z]{1,32}/)?(?:\*|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9_])?)", re.ASCII)
_DIGEST = re.compile(r"\*|[0-9a-f]{64}", re.ASCII)

Who = tuple[str, ...]


def _check(key: str, entries: Iterable[str], form: re.Pattern[str], expected: str) -> None:
    for entry in entries:
        if not form.fullmatch(entry):
            raise PolicyError(f"{key}: {entry[:80]!r} is none of {expected}")


def _why(error: Exception) -> str:
    """What msgspec says, and which stages there are where it says only that this is none."""
    text = str(error)
    return f"{text}; expected {pipeline.NAMES}" if text.endswith((".stage`", "`stage` at `$`")) else text


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a policy. What Python code gives is checked as strictly as what a file says: `interactive="al"`
    would else name 'a' and 'l'."""

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            try:
                value = msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError as error:
                raise PolicyError(f"{field.name}: {_why(error)}".replace(" - at `$", " at `")) from None
            msgspec.structs.force_setattr(self, field.name, value)


class Use(_Table, frozen=True):
    """Who may use the data, and for what. Entries: "alice", "scientist/alice" (only in that role), "scientist/*"
    (everybody in that role), "*" (whoever can connect). Use alone lets nothing out: see [release]."""

    interactive: Annotated[
        Who, Meta(description="Who may work on it with pointers: any allowed operator, one after the other.")
    ] = ()
    plans: Annotated[Who, Meta(description="Who may run recorded programs on it, those that [plans] accepts.")] = ()
    statistics: Annotated[Who, Meta(description="Who may ask the owner's own code for statistics of it.")] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("interactive", "plans", "statistics"):
            _check(key, getattr(self, key), _WHO, "'alice', 'scientist/alice', 'scientist/*' or '*'")


class Metrics(_Table, frozen=True):
    """Losses and scores of a model on this data: the mean, over all records, of what a program of whoever may run
    programs gives for one record, clamped. Your worker's own loop makes it; [budget] pays for its noise."""

    minimum: Annotated[
        int, Meta(ge=0, le=10**9, description="Fewest records that one metric is made of; 0: no metrics leave.")
    ] = 0
    noise: Annotated[
        float,
        Meta(
            ge=0,
            le=10**6,
            description="Standard deviation of the noise on each, times what one record, or person, can change: each "
            "costs epsilon 1.41 / noise. 0: none, and then only programs that [plans] accepts; as good as exact.",
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.noise < 1e-5:
            raise PolicyError(f"noise: {self.noise:g} hides nothing: 0 for none, or at least 1e-5")

    @property
    def epsilon(self) -> float:
        """What one metric costs: the noise is of the Laplace distribution, whose standard deviation is sqrt(2) times
        its scale. 0 without noise."""
        return math.sqrt(2) / self.noise if self.noise else 0.0


class Release(_Table, frozen=True):
    """What may leave, and how. A value leaves only if the policies of all data sets that it derives from let it."""

    exact: Annotated[
        Who, Meta(description="Who may take any value that derives from it, exactly: gradients, records, everything.")
    ] = ()
    approvals: Annotated[
        bool, Meta(description="Whether an approval that the owner signed lets out, exactly, what it names.")
    ] = False
    update: Annotated[
        tuple[Stage, ...],
        Meta(
            description="Stages that an update of a model must pass first, in this order; none: no updates leave. "
            '{stage = "clip", norm = 1.0}, {stage = "noise", multiplier = 8.0}: the noise, in each value, is '
            "multiplier x norm. [budget] pays for it, with delta: each costs rho 2 / multiplier^2."
        ),
    ] = ()
    statistics: Annotated[
        bool,
        Meta(
            description="Whether statistics leave, noised by the owner's own code, as long as [budget] pays for them."
        ),
    ] = False
    metrics: Metrics = Metrics()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("exact", self.exact, _WHO, "'alice', 'scientist/alice', 'scientist/*' or '*'")
        try:
            pipeline.check(self.update)
        except PolicyError as error:
            raise PolicyError(f"update: {error}") from None


class Budget(_Table, frozen=True):
    """What all statistics, metrics and updates of this data together may cost, whoever asks, in differential privacy
    (Dwork and Roth 2014). What is spent is spent of the data, whatever version of a policy or name it has."""

    epsilon: Annotated[float, Meta(ge=0, le=10**6, description="Sum of what may be spent; 0: nothing.")] = 0.0
    delta: Annotated[
        float, Meta(ge=0, lt=1, description="Probability beside epsilon, for updates; other things need none.")
    ] = 0.0
    unit: Annotated[
        Literal["record", "person"], Meta(description="What is protected: one record, or all records of one person.")
    ] = "record"


class Plans(_Table, frozen=True):
    """Which recorded programs run on this data, of those who may run any."""

    digests: Annotated[
        tuple[str, ...], Meta(description='SHA-256 digests of programs that run without asking; "*": any program.')
    ] = ()
    ask: Annotated[bool, Meta(description="Whether other programs may be asked for, and run once approved.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("digests", self.digests, _DIGEST, "64 hexadecimal digits, or '*'")


class Policy(_Table, frozen=True):
    """An owner's rules for one data set. What no rule permits is refused, so `Policy()` refuses everything.

    In a notebook: `Policy.open_to("alice")`, `Policy.deny()`, or `Policy(use=Use(plans=("alice",)), ...)`. As a file it
    is TOML and signed (`owner.policies`). See NOTE [Releases that are not offered]."""

    version: Annotated[
        int, Meta(ge=1, le=10**9, description="Grows with every change; a worker takes no older one again.")
    ] = 1
    expires: Annotated[
        Annotated[datetime, Meta(tz=True)] | None,
        Meta(description="From when on nothing is permitted, with its zone: 2030-01-31T00:00:00Z. Left out: never."),
    ] = None
    use: Use = Use()
    plans: Plans = Plans()
    release: Release = Release()
    budget: Budget = Budget()

    @classmethod
    def deny(cls) -> Policy:
        """Nothing, for nobody: what holds for a data set without a policy."""
        return cls()

    @classmethod
    def open_to(cls, *principals: str, expires: datetime | None = None) -> Policy:
        """These principals may do everything, and take every value as it is, records too. Nobody else anything."""
        return cls(
            expires=expires,
            use=Use(interactive=principals, plans=principals, statistics=principals),
            plans=Plans(digests=("*",)),
            release=Release(exact=principals),
        )

    @classmethod
    def parse(cls, text: str, source: str = "policy") -> Policy:
        """The policy that a TOML text states; `source` names it in errors. Raises `PolicyError`, naming the key."""
        try:
            return msgspec.toml.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise PolicyError(f"{source}: {_why(error)}".replace("`$.", "`")) from None

    def text(self) -> str:
        """As a policy's file holds it: every key below the sentence that explains it."""
        return "# Who may do what with one data set. What no key permits is refused.\n\n" + "\n".join(_lines(self))


DENY = Policy.deny()


def _lines(table: msgspec.Struct, prefix: str = "") -> Iterator[str]:
    """The lines of one table: first its values, each below its comment, then the tables within it."""
    inner: list[tuple[str, msgspec.Struct]] = []
    for key, hint in typing.get_type_hints(type(table), include_extras=True).items():
        value: Any = getattr(table, key)
        if isinstance(value, msgspec.Struct):
            inner.append((f"{prefix}{key}", value))
            continue
        yield from _comment(str(next(item.description for item in hint.__metadata__ if isinstance(item, Meta))))
        yield (
            f"# {key} =\n"
            if value is None
            else tomli_w.dumps({key: msgspec.to_builtins(value, builtin_types=(datetime,))})
        )
    for name, value in inner:
        yield from _comment(" ".join((type(value).__doc__ or "").split()))
        yield f"[{name}]"
        yield from _lines(value, f"{name}.")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")


# -- decisions ------------------------------------------------------------------------------------------------

Kind = Literal["interactive", "programs", "plan", "scores", "statistics", "exact", "update", "metrics"]


class Asked(msgspec.Struct, frozen=True):
    """A question to the owner: who asks, and what for.

    `kind`: "interactive" (an operation on pointers), "programs" (have columns as inputs of programs, and nothing else),
    "scores" (ask for metrics of `count` records at all),
    "plan" (run the submission of this `digest`, which names the program and its inputs), and these, to let a value
    out: "exact", "update" (through `pipeline`), "metrics" (of `count` records, by the submission of this `digest`),
    "statistics". `approved`: an approval that the owner signed for just this has been shown, and is good
    (`approvals.Requests.spend`)."""

    kind: Kind
    principal: str
    role: str = ""
    digest: str = ""
    pipeline: tuple[Stage, ...] = ()
    count: int = 0
    approved: bool = False


class Decision(msgspec.Struct, frozen=True):
    """The answer. A refusal names the data set and the key of its policy, `text` says it in a sentence for whoever
    asked, `would_allow` what she may do instead, and `approvable` whether an approval by the owners would permit it.

    It tells of policies and of the question, never of a value, and never whom else a policy names."""

    allowed: bool
    data_set: str = ""
    rule: str = ""
    text: str = ""
    would_allow: tuple[str, ...] = ()
    approvable: bool = False


def decide(policies: Mapping[str, Policy], sources: Iterable[str], asked: Asked, now: datetime) -> Decision:
    """What the policies of all `sources` (a label's data sets) say to a question; one without a policy says no.

    `now` has a zone. Without sources there is nobody to ask, and all is allowed: what a scientist sent herself."""
    names = sorted(set(sources))
    for name in names:
        refusal = _refusal(policies.get(name, DENY), asked, now)
        if refusal:
            rule, why = refusal
            would = _would_allow(policies, names, asked, now)
            approvable = not asked.approved and _permits(policies, names, _replace(asked, approved=True), now)
            return Decision(False, name, rule, _said(name, rule, why, asked, would, approvable), would, approvable)
    return Decision(True, text="allowed by " + (", ".join(names) if names else "nobody's rule: it is public"))


def matches(entries: Iterable[str], principal: str, role: str) -> bool:
    """Whether entries such as "alice", "scientist/alice", "scientist/*" or "*" name this principal."""
    named = {principal, f"{role}/{principal}"} if principal.isprintable() and not set("/*") & set(principal) else set()
    return not ({"*", f"{role}/*"} | named).isdisjoint(entries)


Refusal = tuple[str, str] | None  # the rule, and why in words

_MANY = 10**9  # records: no policy can ask for more
_HOW = {"plan": "`recorded.submit(..., reason=...)`", "metrics": "`dataset.submit(..., reason=...)`"}


def _refusal(policy: Policy, asked: Asked, now: datetime) -> Refusal:
    if policy.expires is not None and now >= policy.expires:
        return "expires", "permits nothing any more: it has ended"
    return _RULES[asked.kind](policy, asked)


def _may(asked: Asked, entries: Who) -> bool:
    return matches(entries, asked.principal, asked.role)


def _interactive(policy: Policy, asked: Asked) -> Refusal:
    if _may(asked, policy.use.interactive):
        return None
    return "use.interactive", f"does not let '{asked.principal}' work on it with pointers"


def _plans(policy: Policy, asked: Asked) -> Refusal:
    """Whether she may run any program, which one does not matter here."""
    if _may(asked, policy.use.plans):
        return None
    return "use.plans", f"does not let '{asked.principal}' run programs on it"


def _plan(policy: Policy, asked: Asked) -> Refusal:
    plans = policy.plans
    if refusal := _plans(policy, asked):
        return refusal
    if "*" in plans.digests or asked.digest in plans.digests or (plans.ask and asked.approved):
        return None
    if plans.ask:
        return "plans.ask", "accepts this program only once its owner has approved it"
    return "plans.digests", "accepts only programs whose digests it lists, and this is none of them"


def _programs(policy: Policy, asked: Asked) -> Refusal:
    """Whether she may bind columns at all: to work on them, or for programs."""
    if _plans(policy, asked) and (refusal := _interactive(policy, asked)):
        return refusal
    return None


def _use(policy: Policy, asked: Asked) -> Refusal:
    """Rights to use may have been withdrawn while she holds a value: then it stays."""
    if _programs(policy, asked):
        return "use", f"does not let '{asked.principal}' use it"
    return None


def _exact(policy: Policy, asked: Asked) -> Refusal:
    if refusal := _use(policy, asked):
        return refusal
    if _may(asked, policy.release.exact) or (policy.release.approvals and asked.approved):
        return None
    if policy.release.approvals:
        return "release.approvals", "lets an exact value out only once its owner has approved it"
    return "release.exact", f"does not let '{asked.principal}' take values that derive from it exactly"


def _update(policy: Policy, asked: Asked) -> Refusal:
    required = policy.release.update
    if refusal := _use(policy, asked):
        return refusal
    if not required:
        return "release.update", "lets no updates out"
    if rule := unpaid(policy):
        return rule, "has no budget that an update's noise could be paid from"
    # Others may follow the required stages, since they change only what may leave already; none may come between.
    if asked.pipeline[: len(required)] == required:
        return None
    return "release.update", f"lets updates out only through {pipeline.words(required)}"


def unpaid(policy: Policy) -> str:
    """The key of the budget for want of which no update could ever be paid; empty where one could be."""
    cost = Cost(rho=exact(pipeline.rho(policy.release.update)))
    if not cost.rho:
        return ""
    if not policy.budget.delta:
        return "budget.delta"
    return "budget.epsilon" if cost.at(policy.budget.delta) > exact(policy.budget.epsilon) else ""


def _scores(policy: Policy, asked: Asked) -> Refusal:
    metrics = policy.release.metrics
    if refusal := _plans(policy, asked):
        return refusal
    if not metrics.minimum:
        return "release.metrics", "lets no metrics out"
    if asked.count < metrics.minimum:
        why = f"lets metrics out of {metrics.minimum:,} records at least, and it has {asked.count:,}"
        return "release.metrics.minimum", why
    return None


def _metrics(policy: Policy, asked: Asked) -> Refusal:
    metrics = policy.release.metrics
    if refusal := _scores(policy, asked):
        return refusal
    if not metrics.noise:  # then what a program is matters
        return _plan(policy, asked)
    if exact(metrics.epsilon) > exact(policy.budget.epsilon):
        return "budget.epsilon", "has no budget that a metric's noise could be paid from"
    return None


def _statistics(policy: Policy, asked: Asked) -> Refusal:
    if not _may(asked, policy.use.statistics):
        return "use.statistics", f"does not let '{asked.principal}' ask for statistics of it"
    if not policy.release.statistics:
        return "release.statistics", "lets no statistics out"
    if not policy.budget.epsilon:
        return "budget.epsilon", "has no budget that a statistic could be paid from"
    return None


_RULES: dict[str, Callable[[Policy, Asked], Refusal]] = {
    "exact": _exact,
    "interactive": _interactive,
    "metrics": _metrics,
    "plan": _plan,
    "programs": _programs,
    "scores": _scores,
    "statistics": _statistics,
    "update": _update,
}


def _replace(asked: Asked, **changes: Any) -> Asked:
    return msgspec.structs.replace(asked, **changes)


def _permits(policies: Mapping[str, Policy], names: Iterable[str], asked: Asked, now: datetime) -> bool:
    return all(_refusal(policies.get(name, DENY), asked, now) is None for name in names)


def _would_allow(policies: Mapping[str, Policy], names: list[str], asked: Asked, now: datetime) -> tuple[str, ...]:
    """What whoever asked could have from these data sets together. Each is found by asking, so each is true."""

    def permits(kind: Kind, **more: Any) -> bool:
        return _permits(policies, names, Asked(kind, asked.principal, asked.role, **more), now)

    found = []
    known = [policies.get(name, DENY) for name in names]
    if permits("interactive"):
        found.append("pointers on it")
    if permits("plan"):  # of no digest that a policy could list
        found.append("any recorded program")
    else:
        listed = sorted({digest for policy in known for digest in policy.plans.digests})
        found += [f"the program {digest}" for digest in listed if permits("plan", digest=digest)]
        if permits("plan", approved=True):
            found.append("a recorded program, once approved")
    if permits("exact"):
        found.append("exact values")
    elif permits("exact", approved=True):
        found.append("an exact value, once approved")
    if permits("statistics"):
        found.append("statistics, as long as the budget pays for them")
    if permits("metrics", count=asked.count or _MANY) and all(policy.release.metrics.noise for policy in known):
        found.append("metrics, as long as the budget pays for them")
    elif permits("metrics", count=asked.count or _MANY, approved=True):
        found.append("metrics without noise, of programs that the owner accepts")
    pipelines = {policy.release.update for policy in known}
    found += [
        f"updates through {pipeline.words(stages)}"
        for stages in sorted(pipelines, key=pipeline.words)
        if permits("update", pipeline=stages)
    ]
    return tuple(found)


def _said(name: str, rule: str, why: str, asked: Asked, would: tuple[str, ...], approvable: bool) -> str:
    lines = [refused(name, rule, why)]
    lines += [
        f"Allowed to '{asked.principal}': {'; '.join(would)}." if would else "Nothing of it is allowed to her or him."
    ]
    lines += [f"Ask for an approval with {_HOW.get(asked.kind, '`.request(reason)`')}."] if approvable else []
    return " ".join(lines)


def refused(name: str, rule: str, why: str) -> str:
    """A refusal in a sentence: which policy, what it does not let, and which of its keys says so."""
    return f"the policy of data set '{name}' {why} (rule {rule})."
