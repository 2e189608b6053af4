"""What a policy comes to, for one person, in sentences for its owner.

What must live here: words. What must not: rules: what is permitted is asked of `policy`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from ..privacy import pipeline
from ..privacy.accounting import Cost, exact
from .policy import Asked, Policy, decide, matches, unpaid

__all__ = ["explain"]


def explain(policy: Policy, principal: str, role: str, now: datetime) -> list[str]:
    """What a principal could obtain under a policy, in sentences for its owner."""
    if policy.expires is not None and now >= policy.expires:
        return [f"Nothing: the policy ended at {_when(policy.expires)}."]
    asked = Asked("exact", principal, role)
    found = list(_explained(policy, asked, now))
    if not found:
        whom = f"'{principal}'" if principal else "anybody else"
        return [f"Nothing: no rule permits {whom} anything."]
    if policy.expires is not None:
        found.append(f"Until {_when(policy.expires)}; then nothing.")
    return found


def _explained(policy: Policy, asked: Asked, now: datetime) -> Iterator[str]:
    release, plans = policy.release, policy.plans
    pointers, programs = _may(asked, policy.use.interactive), _may(asked, policy.use.plans)
    if pointers:
        yield "May compute on the records with pointers, operator by operator. The results stay here."
    if programs and "*" in plans.digests:
        yield "May run any recorded program. The results stay here."
    elif programs:
        if plans.digests:
            yield f"May run {len(plans.digests)} recorded programs without asking: {', '.join(plans.digests)}."
        if plans.ask:
            yield "May ask to run other programs: you see each one printed, and it runs only if you approve."
    if decide({"": policy}, ("",), asked, now).allowed:
        chooses = pointers or (programs and "*" in plans.digests)
        what = "any value, so every record as it is" if chooses else "whatever those programs give"
        yield f"MAY TAKE EXACT VALUES: {what}, without limit and without asking."
    elif release.approvals and (pointers or programs):
        yield "May take an exact value if you approve it. Gradients and models, too, can tell of single records."
    paid = []
    if _may(asked, policy.use.statistics) and release.statistics:
        if policy.budget.epsilon:
            paid.append("statistics")
            yield "May have statistics, noised by your worker's own code."
        else:
            yield "No statistics: the policy would let them out, and [budget] has nothing to pay for them."
    if programs and release.metrics.minimum:
        paid += ["metrics"] if release.metrics.noise else []
        yield _metric(policy)
    if (pointers or programs) and release.update:
        paid += ["updates"] if pipeline.rho(release.update) else []
        yield _updates(policy)
    if paid and policy.budget.epsilon:
        at = f" at delta {policy.budget.delta:g}" if policy.budget.delta else ""
        yield (
            f"That goes on until all {' and '.join(paid)} that were ever made of this data, for whomever, cost epsilon "
            f"{policy.budget.epsilon:g}{at} for each {policy.budget.unit}."
        )


def _may(asked: Asked, entries: tuple[str, ...]) -> bool:
    return matches(entries, asked.principal, asked.role)


def _metric(policy: Policy) -> str:
    """What metrics one may have, in words."""
    metrics = policy.release.metrics
    what = f"the mean score of a model over all records, if they are {metrics.minimum:,} or more"
    if not metrics.noise:
        return (
            f"MAY HAVE EXACT MEANS: {what}, without noise, by programs that [plans] accepts. Who chooses the model can "
            "single out a record, so that is as good as exact values."
        )
    if exact(metrics.epsilon) > exact(policy.budget.epsilon):
        return "No metrics: the policy would let them out, and [budget] has too little to pay for one."
    return f"May have metrics: {what}, noised by your worker's own code, each for epsilon {metrics.epsilon:.3g}."


def _updates(policy: Policy) -> str:
    """What updates one may have, in words."""
    stages, budget = policy.release.update, policy.budget
    rho = pipeline.rho(stages)
    if not rho:
        return (
            f"MAY TAKE UPDATES WITHOUT NOISE of models, through {pipeline.words(stages)}: whoever trains them "
            "chooses what they tell, so that is as good as exact values."
        )
    if unpaid(policy):
        return "No updates: the policy would let them out, and [budget] has too little to pay for one."
    each = float(Cost(rho=exact(rho)).at(budget.delta))
    return (
        f"May take updates of models that passed {pipeline.words(stages)}: one costs epsilon {each:.3g} at delta "
        f"{budget.delta:g}, several less than so many times that."
    )


def _when(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="minutes")
