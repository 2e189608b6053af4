"""`Policy`: what an owner lets whom do with one data set, and the decisions that follow from it.

What must live here: every key of a policy with its default and the sentence that explains it, and `decide`, a pure
function of policies, of who asks what, and of the time. What must not: torch, files, keys, and any private value. A
decision cannot depend on a value because it never sees one.

NOTE [Releases that are not offered]
"The mean over at least k records" is not a release. Two such means whose records differ by one person give that
person's value by subtraction (a differencing attack: Dinur and Nissim 2003; Dwork and Roth 2014, section 1.1), and a
program can make a mean of k records out of one record and k - 1 constants. A minimum count counts only for `metrics`,
where the owner's own evaluation loop chooses the records, never a scientist's program; that loop is not here yet. The
means that do leave are `statistics`: of all records, made and noised by the owner's own code, paid from a budget.

NOTE [Several owners]
A value that derives from several data sets leaves only if each of their policies lets it. The first refusal, in the
order of the names, is the answer: the same question has the same answer at any time.
"""

from __future__ import annotations

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

__all__ = [
    "DENY",
    "STAGES",
    "Asked",
    "Budget",
    "Decision",
    "Metrics",
    "Plans",
    "Policy",
    "Release",
    "Use",
    "decide",
    "explain",
    "matches",
    "refused",
]

_WHO = re.compile(r"(?:[a-z]{1,32}/)?(?:\*|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9_])?)", re.ASCII)
_DIGEST = re.compile(r"\*|[0-9a-f]{64}", re.ASCII)
_STAGE = re.compile(r"[a-z][a-z0-9_-]{0,31}", re.ASCII)

# The stages that an update can pass in this version. What a policy asks for and is not here is refused.
STAGES: frozenset[str] = frozenset()

Who = tuple[str, ...]


def _check(key: str, entries: Iterable[str], form: re.Pattern[str], expected: str) -> None:
    for entry in entries:
        if not form.fullmatch(entry):
            raise PolicyError(f"{key}: {entry[:80]!r} is none of {expected}")


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of a policy. What Python code gives is checked as strictly as what a file says: `interactive="al"`
    would else name 'a' and 'l'."""

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            try:
                value = msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError as error:
                raise PolicyError(f"{field.name}: {error}".replace(" - at `$", " at `")) from None
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
    """Losses and scores of a model on this data. Only the owner's own evaluation loop may release them, since a
    count means nothing where a scientist's program chooses what is counted; until that loop exists all are refused."""

    minimum: Annotated[
        int, Meta(ge=0, le=10**9, description="Fewest records that one metric is made of; 0: no metrics leave.")
    ] = 0
    noise: Annotated[
        float, Meta(ge=0, le=10**6, description="Standard deviation of the noise on each, times its sensitivity.")
    ] = 0.0


class Release(_Table, frozen=True):
    """What may leave, and how. A value leaves only if the policies of all data sets that it derives from let it."""

    exact: Annotated[
        Who, Meta(description="Who may take any value that derives from it, exactly: gradients, records, everything.")
    ] = ()
    approvals: Annotated[
        bool, Meta(description="Whether an approval that the owner signed lets out, exactly, what it names.")
    ] = False
    update: Annotated[
        tuple[str, ...],
        Meta(
            description="Stages that an update must pass first, in this order. This version has none: no updates leave."
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
        _check("update", self.update, _STAGE, "names of stages, such as 'clip'")


class Budget(_Table, frozen=True):
    """What all statistics of this data together may cost, whoever asks, in differential privacy (Dwork and Roth 2014).
    What is spent is spent of the data, whatever version of a policy or name it has."""

    epsilon: Annotated[float, Meta(ge=0, le=10**6, description="Sum of what may be spent; 0: nothing.")] = 0.0
    delta: Annotated[
        float, Meta(ge=0, lt=1, description="Probability that may be spent beside epsilon. Statistics need none.")
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
            raise PolicyError(f"{source}: {error}".replace("`$.", "`")) from None

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
        yield f"# {next(item.description for item in hint.__metadata__ if isinstance(item, Meta))}"
        yield f"# {key} =\n" if value is None else tomli_w.dumps({key: value})
    for name, value in inner:
        about = " ".join((type(value).__doc__ or "").split())
        yield from textwrap.wrap(about, 110, initial_indent="# ", subsequent_indent="# ")
        yield f"[{name}]"
        yield from _lines(value, f"{name}.")


# -- decisions ------------------------------------------------------------------------------------------------

Kind = Literal["interactive", "programs", "plan", "statistics", "exact", "update", "metrics"]


class Asked(msgspec.Struct, frozen=True):
    """A question to the owner: who asks, and what for.

    `kind`: "interactive" (an operation on pointers), "programs" (have columns as inputs of programs, and nothing else),
    "plan" (run the submission of this `digest`, which names the program and its inputs), and these, to let a value
    out: "exact", "update" (through `pipeline`, the names of its stages), "metrics", "statistics". `approved`: an
    approval that the owner signed for just this has been shown, and is good (`approvals.Requests.spend`)."""

    kind: Kind
    principal: str
    role: str = ""
    digest: str = ""
    pipeline: tuple[str, ...] = ()
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


def _exact(policy: Policy, asked: Asked) -> Refusal:
    # Rights to use may have been withdrawn while she holds a value: then it stays.
    if _interactive(policy, asked) and _plans(policy, asked):
        return "use", f"does not let '{asked.principal}' use it"
    if _may(asked, policy.release.exact) or (policy.release.approvals and asked.approved):
        return None
    if policy.release.approvals:
        return "release.approvals", "lets an exact value out only once its owner has approved it"
    return "release.exact", f"does not let '{asked.principal}' take values that derive from it exactly"


def _update(policy: Policy, asked: Asked) -> Refusal:
    required = policy.release.update
    if refusal := _plans(policy, asked):
        return refusal
    if not required:
        return "release.update", "lets no updates out"
    if unknown := [stage for stage in required if stage not in STAGES]:
        return "release.update", f"asks for stages that this version does not have ({', '.join(unknown)})"
    # Others may follow the required stages, since they change only what may leave already; none may come between.
    if asked.pipeline[: len(required)] == required:
        return None
    return "release.update", f"lets updates out only through {_piped(required)}"


def _metrics(policy: Policy, asked: Asked) -> Refusal:
    if refusal := _plans(policy, asked):
        return refusal
    if not policy.release.metrics.minimum:
        return "release.metrics", "lets no metrics out"
    return "release.metrics", "lets metrics out only of the owner's own evaluation loop, which does not exist yet"


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
    pipelines = {policy.release.update for policy in known}
    found += [f"updates through {_piped(stages)}" for stages in sorted(pipelines) if permits("update", pipeline=stages)]
    return tuple(found)


def _said(name: str, rule: str, why: str, asked: Asked, would: tuple[str, ...], approvable: bool) -> str:
    lines = [refused(name, rule, why)]
    lines += [
        f"Allowed to '{asked.principal}': {'; '.join(would)}." if would else "Nothing of it is allowed to her or him."
    ]
    how = "`recorded.submit(..., reason=...)`" if asked.kind == "plan" else "`.request(reason)`"
    lines += [f"Ask for an approval with {how}."] if approvable else []
    return " ".join(lines)


def refused(name: str, rule: str, why: str) -> str:
    """A refusal in a sentence: which policy, what it does not let, and which of its keys says so."""
    return f"the policy of data set '{name}' {why} (rule {rule})."


def _piped(stages: Iterable[str]) -> str:
    return " > ".join(stages)


# -- in words -------------------------------------------------------------------------------------------------


def explain(policy: Policy, principal: str, role: str, now: datetime) -> list[str]:
    """What a principal could obtain under a policy, in sentences for its owner."""
    if policy.expires is not None and now >= policy.expires:
        return [f"Nothing: the policy ended at {_when(policy.expires)}."]
    asked = Asked("interactive", principal, role)
    found = list(_explained(policy, asked))
    if not found:
        return [f"Nothing: no rule permits '{principal}' anything."]
    if policy.expires is not None:
        found.append(f"Until {_when(policy.expires)}; then nothing.")
    return found


def _explained(policy: Policy, asked: Asked) -> Iterator[str]:
    release, plans = policy.release, policy.plans
    pointers, programs = _interactive(policy, asked) is None, _plans(policy, asked) is None
    if pointers:
        yield "May compute on the records with pointers, operator by operator. The results stay here."
    if programs and "*" in plans.digests:
        yield "May run any recorded program. The results stay here."
    elif programs:
        if plans.digests:
            yield f"May run {len(plans.digests)} recorded programs without asking: {', '.join(plans.digests)}."
        if plans.ask:
            yield "May ask to run other programs: you see each one printed, and it runs only if you approve."
    if _exact(policy, asked) is None:
        chooses = pointers or (programs and "*" in plans.digests)
        what = "any value, so every record as it is" if chooses else "whatever those programs give"
        yield f"MAY TAKE EXACT VALUES: {what}, without limit and without asking."
    elif release.approvals and (pointers or programs):
        yield "May take an exact value if you approve it. Gradients and models, too, can tell of single records."
    refused = [
        ("updates", programs and release.update and not STAGES.issuperset(release.update)),
        ("metrics", programs and release.metrics.minimum),
    ]
    for what, asked_for in refused:
        if asked_for:
            yield f"No {what}: the policy would let them out, and this version refuses them, since it cannot make them."
    if _may(asked, policy.use.statistics) and release.statistics:
        yield _priced(policy.budget)
    if programs and release.update and STAGES.issuperset(release.update):
        yield f"May take updates that passed {_piped(release.update)}."


def _priced(budget: Budget) -> str:
    """What statistics one may have, in words."""
    if not budget.epsilon:
        return "No statistics: the policy would let them out, and [budget] has nothing to pay for them."
    return (
        "May have statistics, noised by your worker's own code, until all that were ever made of this data, for "
        f"whomever, cost epsilon {budget.epsilon:g} for each {budget.unit}."
    )


def _when(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="minutes")
