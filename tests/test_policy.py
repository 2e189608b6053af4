"""Policies: what they permit, how they are written and signed, and that nothing but the owner's key opens them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from housecall.cli import policy as cli
from housecall.errors import HousecallError, PolicyError
from housecall.host.config import CONFIG_FILE
from housecall.owner.change import changes, loosens, warnings
from housecall.owner.explanation import explain
from housecall.owner.policies import Policies, Seen, Turn, draft, policy_names, sign, standing
from housecall.owner.policy import (
    DENY,
    Asked,
    Budget,
    Decision,
    Metrics,
    Plans,
    Policy,
    Release,
    Use,
    decide,
    matches,
)
from housecall.owner.signing import OwnerKey, public_key, verify
from housecall.privacy.clip import Clip
from housecall.privacy.noise import Noise
from housecall.privacy.pipeline import words

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
D1, D2 = "1" * 64, "2" * 64
KEY = OwnerKey.generate()


def ask(policy: Policy, kind: Any, who: str = "alice", role: str = "scientist", **more: Any) -> Decision:
    return decide({"heart": policy}, ("heart",), Asked(kind, who, role, **more), NOW)


# -- strategies -------------------------------------------------------------------------------------------------

NAMES = ("alice", "bob", "carol")
ENTRIES = ("*", "alice", "bob", "scientist/*", "scientist/alice", "worker/*", "worker/bob")
CLIP, NOISE = Clip(norm=1.0), Noise(multiplier=8.0)
STAGES = (CLIP, NOISE, Clip(norm=2.0))
ALL = Use(plans=("*",))
KINDS = ("interactive", "plan", "statistics", "exact", "update", "metrics")


def some(values: tuple[Any, ...], most: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(values), max_size=most).map(tuple)


def policies() -> st.SearchStrategy[Policy]:
    ends = st.sampled_from([None, NOW, NOW + timedelta(seconds=1), NOW - timedelta(days=1)])
    who = some(ENTRIES)
    return st.builds(
        Policy,
        version=st.integers(1, 10**9),
        expires=ends,
        use=st.builds(Use, interactive=who, plans=who, statistics=who),
        plans=st.builds(Plans, digests=some(("*", D1, D2)), ask=st.booleans()),
        release=st.builds(
            Release,
            exact=who,
            approvals=st.booleans(),
            update=st.sampled_from([(), (CLIP,), (CLIP, NOISE), (CLIP, NOISE, CLIP), (STAGES[2], NOISE)]),
            statistics=st.booleans(),
            metrics=st.builds(Metrics, minimum=st.integers(0, 100), noise=st.sampled_from([0, 0.5, 3, 10])),
        ),
        budget=st.builds(
            Budget, epsilon=st.floats(0, 100), delta=st.floats(0, 0.5), unit=st.sampled_from(["record", "person"])
        ),
    )


def questions() -> st.SearchStrategy[Asked]:
    return st.builds(
        Asked,
        kind=st.sampled_from(KINDS),
        principal=st.sampled_from(NAMES),
        role=st.sampled_from(["scientist", "worker", ""]),
        digest=st.sampled_from(["", D1, D2, "3" * 64]),
        pipeline=some(STAGES, 4),
        count=st.sampled_from([0, 10, 10**6]),
        approved=st.booleans(),
    )


# -- what is permitted ------------------------------------------------------------------------------------------


@given(st.text(), st.text(), questions())
def test_without_a_rule_everybody_is_refused(who: str, role: str, asked: Asked) -> None:
    asked = msgspec.structs.replace(asked, principal=who, role=role)
    for known in ({}, {"heart": DENY}, {"heart": Policy()}, {"labs": Policy.open_to("*")}):
        decision = decide(known, ("heart",), asked, NOW)
        assert not decision.allowed
        assert decision.would_allow == ()
        assert not decision.approvable
        assert decision.data_set == "heart"


def test_open_to_opens_everything_that_exists_to_those_alone() -> None:
    policy = Policy.open_to("alice")
    for kind in ("interactive", "plan", "exact"):
        assert ask(policy, kind, digest=D1).allowed
        assert not ask(policy, kind, "bob", digest=D1).allowed
    for kind in ("update", "metrics", "statistics"):
        assert not ask(policy, kind).allowed


def test_what_derives_from_nobody_is_free() -> None:
    assert decide({}, (), Asked("exact", "alice"), NOW).allowed


@pytest.mark.parametrize(
    ("entry", "who", "role", "expected"),
    [
        ("alice", "alice", "scientist", True),
        ("alice", "alice", "worker", True),
        ("alice", "Alice", "scientist", False),
        ("alice", "alic", "scientist", False),
        ("scientist/alice", "alice", "scientist", True),
        ("scientist/alice", "alice", "worker", False),
        ("scientist/*", "bob", "scientist", True),
        ("scientist/*", "bob", "worker", False),
        ("*", "anonymous", "", True),
        ("scientist/alice", "scientist/alice", "", False),
        ("scientist/*", "scientist/*", "", False),
        ("scientist/*", "*", "scientist", True),
    ],
)
def test_whom_an_entry_names(entry: str, who: str, role: str, expected: bool) -> None:
    assert matches((entry,), who, role) is expected


def test_programs_run_listed_or_approved() -> None:
    listed = Policy(use=Use(plans=("alice",)), plans=Plans(digests=(D1,)))
    assert ask(listed, "plan", digest=D1).allowed
    assert ask(listed, "plan", digest=D2).rule == "plans.digests"
    assert not ask(listed, "plan", digest=D2, approved=True).allowed
    asking = Policy(use=Use(plans=("alice",)), plans=Plans(digests=(D1,), ask=True))
    refused = ask(asking, "plan", digest=D2)
    assert (refused.rule, refused.approvable) == ("plans.ask", True)
    assert "Ask for an approval" in refused.text
    assert ask(asking, "plan", digest=D2, approved=True).allowed
    assert ask(asking, "plan", "bob", digest=D1, approved=True).rule == "use.plans"


def test_exact_values_leave_to_the_named_or_once_approved() -> None:
    use = Use(interactive=("alice", "bob"))
    policy = Policy(use=use, release=Release(exact=("alice",), approvals=True))
    assert ask(policy, "exact").allowed
    refused = ask(policy, "exact", "bob")
    assert (refused.rule, refused.approvable) == ("release.approvals", True)
    assert refused.would_allow == ("pointers on it", "an exact value, once approved")
    assert ask(policy, "exact", "bob", approved=True).allowed
    assert not ask(policy, "exact", "carol", approved=True).allowed  # whom nobody lets use it
    closed = Policy(use=use)
    assert ask(closed, "exact", approved=True).rule == "release.exact"
    assert not ask(closed, "exact").approvable


def test_use_that_was_withdrawn_keeps_values_here() -> None:
    assert ask(Policy(release=Release(exact=("alice",))), "exact").rule == "use"


def test_no_stage_of_an_update_is_left_out() -> None:
    budget = Budget(epsilon=3, delta=1e-6)
    policy = Policy(use=Use(plans=("alice",)), release=Release(update=(CLIP, NOISE)), budget=budget)
    for pipeline in itertools.chain.from_iterable(itertools.product(STAGES, repeat=count) for count in range(4)):
        assert ask(policy, "update", pipeline=pipeline).allowed == (pipeline[:2] == (CLIP, NOISE)), pipeline
    for pipeline in ((CLIP, Noise(multiplier=7.9)), (Clip(norm=1.1), NOISE), (CLIP, CLIP, NOISE)):
        refused = ask(policy, "update", pipeline=pipeline)
        assert refused.rule == "release.update"
    assert "only through clip(norm=1) > noise(multiplier=8)" in refused.text
    assert refused.would_allow == ("updates through clip(norm=1) > noise(multiplier=8)",)
    assert not ask(Policy(use=Use(plans=("alice",))), "update", pipeline=(CLIP,)).allowed


@pytest.mark.parametrize(
    ("budget", "rule"),
    [
        (Budget(epsilon=3), "budget.delta"),
        (Budget(epsilon=1, delta=1e-6), "budget.epsilon"),  # one costs 1.14
        (Budget(epsilon=1.2, delta=1e-6), ""),
    ],
)
def test_an_update_that_no_budget_could_pay_for_is_refused(budget: Budget, rule: str) -> None:
    policy = Policy(use=Use(interactive=("alice",)), release=Release(update=(CLIP, NOISE)), budget=budget)
    found = ask(policy, "update", pipeline=(CLIP, NOISE))
    assert (found.allowed, found.rule) == (not rule, rule)
    clipped = msgspec.structs.replace(policy, release=Release(update=(CLIP,)))
    assert ask(clipped, "update", pipeline=(CLIP,)).allowed  # nothing is promised, nothing is paid


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (Policy(use=Use(interactive=("*",))), "use.plans"),
        (Policy(use=Use(plans=("*",))), "release.metrics"),
        (
            Policy(use=ALL, release=Release(metrics=Metrics(minimum=101, noise=5))),
            "release.metrics.minimum",
        ),
        (Policy(use=ALL, release=Release(metrics=Metrics(minimum=100, noise=5))), "budget.epsilon"),
        (
            Policy(use=ALL, release=Release(metrics=Metrics(minimum=100, noise=5)), budget=Budget(epsilon=1)),
            "",
        ),
        (Policy(use=ALL, release=Release(metrics=Metrics(minimum=100))), "plans.digests"),
        (
            Policy(use=ALL, plans=Plans(digests=(D1,)), release=Release(metrics=Metrics(minimum=100))),
            "",
        ),
        (
            Policy(use=Use(plans=("*",)), plans=Plans(ask=True), release=Release(metrics=Metrics(minimum=9))),
            "plans.ask",
        ),
    ],
)
def test_metrics_need_records_and_noise_that_is_paid_or_an_accepted_program(policy: Policy, rule: str) -> None:
    found = ask(policy, "metrics", digest=D1, count=100)
    assert (found.allowed, found.rule) == (not rule, rule)
    assert found.approvable is (rule == "plans.ask")


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (Policy(use=Use(interactive=("*",)), release=Release(statistics=True)), "use.statistics"),
        (Policy(use=Use(statistics=("*",)), budget=Budget(epsilon=1)), "release.statistics"),
        (Policy(use=Use(statistics=("*",)), release=Release(statistics=True)), "budget.epsilon"),
        (Policy(use=Use(statistics=("*",)), release=Release(statistics=True), budget=Budget(epsilon=1)), ""),
    ],
)
def test_statistics_need_a_name_a_word_and_a_budget(policy: Policy, rule: str) -> None:
    found = ask(policy, "statistics")
    assert (found.allowed, found.rule) == (not rule, rule)
    allowed = ("statistics, as long as the budget pays for them",)
    assert rule or ask(policy, "exact").would_allow == allowed


def test_an_ended_policy_permits_nothing() -> None:
    for expires, allowed in ((NOW, False), (NOW + timedelta(microseconds=1), True)):
        decision = ask(Policy.open_to("alice", expires=expires), "exact")
        assert decision.allowed is allowed
        assert decision.rule == ("" if allowed else "expires")
    zone = timezone(timedelta(hours=5))
    assert not ask(Policy.open_to("alice", expires=datetime(2026, 3, 1, 17, tzinfo=zone)), "exact").allowed


# -- several owners ---------------------------------------------------------------------------------------------


def test_all_owners_must_agree_and_the_first_by_name_answers() -> None:
    known = {"heart": Policy.open_to("alice"), "labs": DENY, "xrays": DENY}
    for order in itertools.permutations(known):
        decision = decide(known, order, Asked("exact", "alice", "scientist"), NOW)
        assert (decision.allowed, decision.data_set, decision.rule) == (False, "labs", "use")
    assert decide(known, ("heart", "heart"), Asked("exact", "alice"), NOW).allowed


def test_an_approval_is_offered_only_where_it_would_help() -> None:
    asks = Policy(use=Use(interactive=("alice",)), release=Release(approvals=True))
    never = Policy(use=Use(interactive=("alice",)))
    asked = Asked("exact", "alice")
    assert decide({"a": asks, "b": asks}, ("a", "b"), asked, NOW).approvable
    decision = decide({"a": asks, "b": never}, ("a", "b"), asked, NOW)
    assert not decision.approvable
    assert "approv" not in decision.text.split("(rule release.approvals)")[1]


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), policies()), questions())
def test_a_source_more_never_permits_more(known: dict[str, Policy], asked: Asked) -> None:
    for more in ("a", "b", "c"):
        if decide(known, (*known, more), asked, NOW).allowed:
            assert decide(known, known, asked, NOW).allowed


@given(st.dictionaries(st.sampled_from(["a", "b"]), policies(), min_size=1), questions())
def test_what_would_be_allowed_is(known: dict[str, Policy], asked: Asked) -> None:
    decision = decide(known, known, asked, NOW)
    assert decision.text
    assert decision.allowed or (decision.data_set in known and decision.rule)

    def allowed(kind: Any, **more: Any) -> bool:
        return decide(known, known, Asked(kind, asked.principal, asked.role, **more), NOW).allowed

    for offer in decision.would_allow:
        if offer == "pointers on it":
            assert allowed("interactive")
        elif offer == "any recorded program":
            assert allowed("plan", digest="f" * 64)
        elif offer.startswith("the program "):
            assert allowed("plan", digest=offer.removeprefix("the program "))
        elif offer == "a recorded program, once approved":
            assert allowed("plan", digest="f" * 64, approved=True)
        elif offer == "exact values":
            assert allowed("exact")
        elif offer == "an exact value, once approved":
            assert allowed("exact", approved=True)
        elif offer == "statistics, as long as the budget pays for them":
            assert allowed("statistics")
        elif offer == "metrics, as long as the budget pays for them":
            assert allowed("metrics", count=asked.count or 10**9)
        elif offer == "metrics without noise, of programs that the owner accepts":
            assert allowed("metrics", count=asked.count or 10**9, approved=True)
        else:
            through = {words(policy.release.update): policy.release.update for policy in known.values()}
            assert allowed("update", pipeline=through[offer.removeprefix("updates through ")])
    approved = decide(known, known, msgspec.structs.replace(asked, approved=True), NOW)
    assert decision.allowed or decision.approvable is (approved.allowed and not asked.approved)


@given(policies(), questions())
def test_a_refusal_names_nobody_else(policy: Policy, asked: Asked) -> None:
    decision = decide({"heart": policy}, ("heart",), asked, NOW)
    for name in set(NAMES) - {asked.principal}:
        assert name not in decision.text


# -- tighter and looser -----------------------------------------------------------------------------------------


@given(policies(), policies(), questions())
def test_what_does_not_loosen_permits_nothing_more(old: Policy, new: Policy, asked: Asked) -> None:
    if not loosens(old, new) and ask(new, asked.kind, asked.principal, asked.role, **rest(asked)).allowed:
        assert ask(old, asked.kind, asked.principal, asked.role, **rest(asked)).allowed


def rest(asked: Asked) -> dict[str, Any]:
    return {"digest": asked.digest, "pipeline": asked.pipeline, "count": asked.count, "approved": asked.approved}


@st.composite
def tightened(draw: st.DrawFn) -> tuple[Policy, Policy]:
    """A policy, and the same with one restriction more."""
    policy = draw(policies())
    use, plans, release = policy.use, policy.plans, policy.release
    new: Any = msgspec.structs.replace
    fewer = draw(
        st.sampled_from([
            new(policy, use=new(use, interactive=use.interactive[1:])),
            new(policy, use=new(use, plans=use.plans[:-1])),
            new(policy, use=new(use, statistics=())),
            new(policy, plans=new(plans, digests=plans.digests[1:])),
            new(policy, plans=new(plans, ask=False)),
            new(policy, release=new(release, exact=release.exact[1:])),
            new(policy, release=new(release, approvals=False)),
            new(policy, release=new(release, update=(*release.update, CLIP) if release.update else ())),
            new(policy, release=new(release, update=())),
            new(policy, release=new(release, statistics=False)),
            new(policy, release=new(release, metrics=Metrics())),
            new(policy, expires=min(policy.expires or NOW, NOW)),
            new(policy, budget=new(policy.budget, epsilon=policy.budget.epsilon / 2)),
        ])
    )  # fmt: skip
    return policy, fewer


@given(tightened(), questions())
def test_a_restriction_more_never_turns_a_refusal_into_a_permission(pair: tuple[Policy, Policy], asked: Asked) -> None:
    loose, tight = pair
    known, less = {"heart": loose}, {"heart": tight}
    if decide(less, ("heart",), asked, NOW).allowed:
        assert decide(known, ("heart",), asked, NOW).allowed
    # Fewer records noised less is another matter than none: metrics have no order of their own here.
    assert not [change for change in changes(loose, tight) if change.loosens and "metrics" not in change.key]


@given(policies())
def test_nothing_changes_between_equals_and_all_loosens_what_denies(policy: Policy) -> None:
    assert changes(policy, policy) == ()
    assert all(change.loosens for change in changes(DENY, policy) if change.key not in ("expires", "budget.unit")
               and change.key != "release.metrics.noise")  # fmt: skip


def test_changes_say_what_is_looser() -> None:
    old = Policy(use=Use(interactive=("bob",)), release=Release(update=(CLIP, NOISE)), expires=NOW)
    new = Policy(use=Use(interactive=("alice",)), release=Release(update=(CLIP,)), budget=Budget(unit="person"))
    assert [str(change) for change in changes(old, new)] == [
        "LOOSER  expires: 2026-03-01 12:00:00+00:00 becomes never",
        "LOOSER  use.interactive: adds alice",
        "tighter  use.interactive: removes bob",
        "LOOSER  release.update: clip(norm=1) > noise(multiplier=8) becomes clip(norm=1)",
        "tighter  budget.unit: record becomes person",
    ]
    assert loosens(old, new)[0].startswith("expires: ")
    assert loosens(Policy(use=Use(plans=("*",))), Policy(use=Use(plans=("alice", "scientist/bob")))) == ()
    assert loosens(Policy(use=Use(plans=("alice",))), Policy(use=Use(plans=("scientist/alice",)))) == ()
    assert loosens(Policy(use=Use(plans=("scientist/*",))), Policy(use=Use(plans=("alice",))))
    assert loosens(Policy(use=Use(plans=("alice",))), Policy(use=Use(plans=("scientist/*",))))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy.open_to("*"), 'release.exact has "*": whoever can connect may take every value'),
        (Policy.open_to("scientist/*"), "every scientist may take every value"),
        (Policy.open_to("alice"), "it never ends"),
        (Policy.open_to("alice"), 'plans.digests has "*"'),
        (Policy(use=Use(plans=("scientst/*",))), 'nobody is ever a "scientst"'),
        (Policy(expires=NOW), "it ended at 2026-03-01"),
        (Policy(release=Release(exact=("alice",))), "it has no effect"),
        (Policy(use=Use(plans=("a",))), "[plans] accepts no program"),
        (Policy(release=Release(update=(CLIP,))), "release.update has no noise"),
        (Policy(release=Release(update=(CLIP, NOISE))), "[use] lets nobody make one"),
        (Policy(use=Use(plans=("a",)), release=Release(update=(CLIP, NOISE))), "budget.delta cannot pay"),
        (Policy(budget=Budget(epsilon=1)), "nothing spends from it"),
        (Policy(budget=Budget(delta=0.1)), "budget.delta is for updates with noise"),
        (Policy(release=Release(metrics=Metrics(minimum=10))), "metrics leave if use.plans names somebody"),
        (Policy(release=Release(metrics=Metrics(minimum=10))), "release.metrics has no noise"),
        (Policy(use=Use(plans=("a",)), release=Release(metrics=Metrics(minimum=9, noise=1))), "too little epsilon"),
        (Policy(budget=Budget(epsilon=50)), "promises next to nothing"),
        (Policy(release=Release(statistics=True)), "one has no effect"),
        (Policy(use=Use(statistics=("a",)), release=Release(statistics=True)), "no epsilon that a statistic could"),
    ],
)
def test_loose_settings_are_noted(policy: Policy, says: str) -> None:
    assert any(says in warning for warning in warnings(policy, NOW)), warnings(policy, NOW)


def test_a_policy_that_denies_has_nothing_to_note() -> None:
    assert warnings(DENY, NOW) == ()


# -- in words ---------------------------------------------------------------------------------------------------


def test_explain_says_what_one_could_obtain() -> None:
    policy = Policy(
        use=Use(interactive=("alice",), plans=("alice", "bob")),
        plans=Plans(digests=(D1,), ask=True),
        release=Release(exact=("alice",), approvals=True, update=(CLIP, NOISE), metrics=Metrics(minimum=20, noise=10)),
        budget=Budget(epsilon=3, delta=1e-5, unit="person"),
        expires=NOW + timedelta(days=1),
    )
    alice = "\n".join(explain(policy, "alice", "scientist", NOW))
    assert "MAY TAKE EXACT VALUES: any value, so every record as it is" in alice
    assert alice.endswith("Until 2026-03-02 12:00+00:00; then nothing.")
    bob = "\n".join(explain(policy, "bob", "scientist", NOW))
    assert "EXACT VALUES" not in bob
    assert "exact value if you approve it" in bob
    assert f"May run 1 recorded programs without asking: {D1}" in bob
    assert "updates of models that passed clip(norm=1) > noise(multiplier=8): one costs epsilon 1.01 at" in bob
    assert "if they are 20 or more, noised by your worker's own code, each for epsilon 0.141" in bob
    assert "until all metrics and updates that were ever made of this data, for whomever, cost epsilon 3 at" in bob
    poor = "\n".join(explain(msgspec.structs.replace(policy, budget=Budget()), "bob", "scientist", NOW))
    assert "No updates: the policy would let them out, and [budget] has too little to pay for one" in poor
    assert "No metrics: the policy would let them out, and [budget] has too little to pay for one" in poor
    assert "epsilon" not in poor  # nothing promises what nothing pays
    plain = Release(update=(CLIP,), metrics=Metrics(minimum=20))
    shown = "\n".join(explain(msgspec.structs.replace(policy, release=plain), "bob", "scientist", NOW))
    assert "MAY TAKE UPDATES WITHOUT NOISE" in shown
    assert "MAY HAVE EXACT MEANS" in shown
    more = msgspec.structs.replace(policy, use=Use(statistics=("bob",)), release=Release(statistics=True))
    assert "for whomever, cost epsilon 3 at delta 1e-05 for each person" in "\n".join(
        explain(more, "bob", "scientist", NOW)
    )
    assert explain(policy, "carol", "scientist", NOW) == ["Nothing: no rule permits 'carol' anything."]
    assert explain(policy, "alice", "scientist", NOW + timedelta(days=1))[0].startswith("Nothing: the policy ended")


@given(policies(), st.sampled_from(NAMES))
def test_explain_shouts_exactly_when_exact_values_leave(policy: Policy, who: str) -> None:
    shouts = any("MAY TAKE EXACT" in line for line in explain(policy, who, "scientist", NOW))
    assert shouts == ask(policy, "exact", who).allowed


@given(policies())
def test_nothing_is_explained_only_if_nothing_is_permitted(policy: Policy) -> None:
    if explain(policy, "alice", "scientist", NOW)[0].startswith("Nothing"):
        for kind in KINDS:
            assert not ask(policy, kind, digest=D1, pipeline=policy.release.update, count=10**6).allowed


# -- as a file --------------------------------------------------------------------------------------------------


@given(policies())
def test_a_policy_survives_its_file(policy: Policy) -> None:
    assert Policy.parse(policy.text()) == policy
    assert Policy.parse(policy.text()).text() == policy.text()


def test_every_key_has_a_sentence() -> None:
    text = Policy.deny().text()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if (" =" in line and not line.startswith("# ")) or line.startswith("["):
            assert lines[number - 1].startswith("# "), line
    assert max(map(len, lines)) <= 120
    assert Policy.parse(text) == Policy.parse("") == DENY
    assert "expires = " not in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("relese = 1", "unknown field `relese`"),
        ("[release]\nexakt = []", "unknown field `exakt` - at `release`"),
        ("[release]\nmean = 5", "unknown field `mean`"),  # not a sound release, and not one here
        ("[release.metrics]\nmin = 1", "`release.metrics`"),
        ('[use]\ninteractive = "alice"', "Expected `array`, got `str`"),
        ('[use]\ninteractive = ["a b"]', "'a b' is none of"),
        ('[use]\nplans = ["*/alice"]', "is none of"),
        ('[use]\nplans = ["al*"]', "is none of"),
        ('[plans]\ndigests = ["12"]', "64 hexadecimal digits"),
        (f'[plans]\ndigests = ["{"A" * 64}"]', "64 hexadecimal digits"),
        ('[release]\nupdate = ["clip"]', "Expected `object`, got `str`"),
        (
            '[release]\nupdate = [{stage = "mask"}]',
            "Invalid value 'mask' - at `release.update[0].stage`; expected clip or",
        ),
        ('[release]\nupdate = [{stage = "clip", norm = 0.0}]', "`float` >= 1e-09"),
        ('[release]\nupdate = [{stage = "clip", norm = nan}]', "`float` >= 1e-09"),
        ('[release]\nupdate = [{stage = "clip", norm = 1.0, by = 2}]', "unknown field `by`"),
        ('[release]\nupdate = [{stage = "noise", multiplier = 1.0}]', "has no clip before it"),
        ("[release.metrics]\nnoise = 1e-6", "hides nothing"),
        ("[release]\napprovals = 1", "Expected `bool`"),
        ("version = 0", "`int` >= 1"),
        ("version = true", "Expected `int`"),
        ("expires = 2026-01-01T00:00:00", "timezone"),
        ("expires = 2026-01-01", "expires"),
        ("[budget]\nepsilon = nan", "epsilon"),
        ("[budget]\nepsilon = inf", "epsilon"),
        ("[budget]\nepsilon = -1", "epsilon"),
        ("[budget]\ndelta = 1.0", "delta"),
        ('[budget]\nunit = "user"', "user"),
        ("version = 1\nversion = 2", "policy: "),
        ("[use", "policy: "),
    ],
)
def test_what_is_malformed_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(PolicyError) as raised:
        Policy.parse(text)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Use(interactive="alice"), "Expected `array`, got `str`"),
        (lambda: Release(approvals="no"), "Expected `bool`"),
        (lambda: Budget(epsilon=float("nan")), "epsilon"),
        (lambda: Policy(use="alice"), "use"),
        (lambda: Policy(version=0), "version"),
        (lambda: Policy(expires=datetime(2026, 1, 1)), "timezone"),  # what is refused
        (lambda: Policy.open_to("a b"), "'a b' is none of"),
        (lambda: Policy(use={"interactiv": ["alice"]}), "interactiv"),
    ],
)
def test_python_is_read_as_strictly_as_toml(make: Any, says: str) -> None:
    with pytest.raises(PolicyError) as raised:
        make()
    assert says in str(raised.value)


def test_python_may_give_lists_and_tables() -> None:
    made: Any = Policy
    assert made(use={"interactive": ["alice"]}) == Policy(use=Use(interactive=("alice",)))


# -- signatures -------------------------------------------------------------------------------------------------


def put(folder: Path, policy: Policy | str, name: str = "heart", key: OwnerKey = KEY) -> None:
    """Write a policy and sign it, as an owner does."""
    (folder / "policies").mkdir(exist_ok=True)
    text = policy if isinstance(policy, str) else policy.text()
    (folder / "policies" / f"{name}.toml").write_text(text)
    sign(folder, draft(folder, name, key.public), key)


def load(folder: Path, name: str = "heart", public: bytes = KEY.public, **more: Any) -> Policy:
    """What a worker that starts now goes by."""
    return Policies(folder, public, **more).get(name, DENY)


def test_a_signed_policy_holds(tmp_path: Path) -> None:
    put(tmp_path, Policy.open_to("alice"))
    assert load(tmp_path) == Policy.open_to("alice")
    assert list(Policies(tmp_path, KEY.public)) == policy_names(tmp_path) == ["heart"]
    assert Policies(tmp_path, KEY.public).why("heart") == ""
    for path in (tmp_path / "policies").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_what_is_not_signed_permits_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "heart.toml").write_text(Policy.open_to("*").text())
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path) is DENY
    assert "data set 'heart': nothing is permitted: the policy is not signed" in caplog.text
    assert "heart" in Policies(tmp_path, KEY.public)
    assert "labs" not in Policies(tmp_path, KEY.public)


def test_another_key_signs_nothing_here(tmp_path: Path) -> None:
    put(tmp_path, Policy.open_to("*"), key=OwnerKey.generate())
    assert load(tmp_path) is DENY
    assert load(tmp_path, public=b"") is DENY
    assert load(tmp_path, public=b"x" * 32) is DENY
    assert "signature of this worker's owner" in standing(tmp_path, "heart", KEY.public)[1]


@pytest.mark.parametrize("file", ["heart.toml", "heart.signed"])
def test_no_byte_can_be_changed_cut_or_added(tmp_path: Path, file: str) -> None:
    put(tmp_path, 'version = 1\n[use]\nplans = ["al"]\n')
    path = tmp_path / "policies" / file
    whole = path.read_bytes()
    assert load(tmp_path) != DENY
    for at in range(len(whole)):
        for flip in (0x01, 0x20, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            assert load(tmp_path) is DENY, (at, flip)
        for other in (whole[:at], whole[:at] + whole[at + 1 :], whole[:at] + b" " + whole[at:]):
            path.write_bytes(other)
            assert load(tmp_path) is DENY, at
    path.write_bytes(whole + b"\n")
    assert load(tmp_path) is DENY
    path.write_bytes(whole)
    assert load(tmp_path) != DENY


def test_one_data_sets_policy_is_none_for_another(tmp_path: Path) -> None:
    put(tmp_path, Policy.open_to("*"), "toys")
    for end in ("toml", "signed"):
        (tmp_path / "policies" / f"heart.{end}").write_bytes((tmp_path / "policies" / f"toys.{end}").read_bytes())
    assert load(tmp_path, "toys") != DENY
    assert load(tmp_path, "heart") is DENY


@pytest.mark.parametrize("name", ["../heart", "policies/heart", ".", "", "a\0b", "/etc/passwd", "x" * 64])
def test_strange_names_reach_no_file(tmp_path: Path, name: str) -> None:
    put(tmp_path, Policy.open_to("*"))
    assert load(tmp_path, name) is DENY
    assert standing(tmp_path, name, KEY.public)[0] is DENY
    with pytest.raises(PolicyError, match="no name of a data set"):
        draft(tmp_path, name, KEY.public)


def test_an_older_policy_put_back_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "policies"
    put(tmp_path, Policy.open_to("*"))
    assert load(tmp_path) == Policy.open_to("*")
    old = {path.name: path.read_bytes() for path in place.glob("heart.*")}
    put(tmp_path, Policy(version=2))
    new = {path.name: path.read_bytes() for path in place.glob("heart.*")}
    running = Policies(tmp_path, KEY.public)
    assert running["heart"] == Policy(version=2)
    for name, data in old.items():
        (place / name).write_bytes(data)
    assert running["heart"] is DENY
    assert "version 1 is older than 2" in running.why("heart")
    assert load(tmp_path) is DENY  # a restart forgets nothing
    for name, data in new.items():
        (place / name).write_bytes(data)
    assert load(tmp_path) == Policy(version=2)
    (place / "seen.json").write_bytes(b"{")
    assert load(tmp_path) is DENY


def test_one_number_stands_for_one_text() -> None:
    seen = Seen()
    seen.note("heart", 3, b"one")
    seen.note("heart", 3, b"one")
    with pytest.raises(PolicyError, match="another version 3"):
        seen.note("heart", 3, b"two")
    with pytest.raises(PolicyError, match="older"):
        seen.note("heart", 2, b"one")
    assert seen.check("labs", 1, b"one")
    assert (seen.last("heart"), seen.last("labs")) == (3, 0)


def test_signing_raises_the_version_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, "# mine\nversion = 7\n")
    put(tmp_path, '# mine\nversion = 3\n[use]\nplans = ["a"]  # since May\n')
    assert (tmp_path / "policies" / "heart.toml").read_text() == (
        '# mine\nversion = 8\n[use]\nplans = ["a"]  # since May\n'
    )
    put(tmp_path, '[use]\nplans = ["b"]\n')
    assert load(tmp_path) == Policy(version=9, use=Use(plans=("b",)))
    with pytest.raises(PolicyError, match="write `version = 10`"):
        put(tmp_path, '"version" = 2\n')
    (tmp_path / "policies" / "heart.toml").write_text("version = 30\n")
    assert draft(tmp_path, "heart", KEY.public).policy.version == 30


def test_a_draft_that_changed_meanwhile_is_not_signed(tmp_path: Path) -> None:
    put(tmp_path, Policy())
    made = draft(tmp_path, "heart", KEY.public)
    assert made.signed
    (tmp_path / "policies" / "heart.toml").write_text(Policy(version=2).text())
    made = draft(tmp_path, "heart", KEY.public)
    assert not made.signed
    assert made.old == Policy()
    (tmp_path / "policies" / "heart.toml").write_text(Policy.open_to("*").text())
    with pytest.raises(PolicyError, match="changed meanwhile"):
        sign(tmp_path, made, KEY)
    assert load(tmp_path) is DENY


def test_a_running_worker_sees_changes_and_tells_of_them_first(tmp_path: Path) -> None:
    told: list[Turn] = []
    running = Policies(tmp_path, KEY.public, changed=told.append)
    assert "heart" not in running
    put(tmp_path, Policy(version=1, use=Use(plans=("a",))))
    first = running["heart"]
    text = (tmp_path / "policies" / "heart.toml").read_bytes()
    assert told == [Turn("heart", DENY, first, hashlib.sha256(text).hexdigest())]
    assert running["heart"] is first  # not read again
    put(tmp_path, Policy(version=2))
    assert running["heart"] == Policy(version=2)
    assert [turn[:3] for turn in told[1:]] == [("heart", first, Policy(version=2))]
    os.unlink(tmp_path / "policies" / "heart.toml")
    assert running["heart"] is DENY
    assert running["heart"] is DENY
    assert told[2:] == [Turn("heart", Policy(version=2), DENY, why="there is no policy")]
    put(tmp_path, Policy(version=2))
    assert running["heart"] == Policy(version=2)
    assert [turn[:3] for turn in told[3:]] == [("heart", Policy(version=2), Policy(version=2))]  # in force again
    again = Policies(tmp_path, KEY.public, changed=told.append)
    assert again["heart"] == Policy(version=2)
    assert len(told) == 4  # what was told once is no change after a restart
    put(tmp_path, Policy(version=3))
    later = Policies(tmp_path, KEY.public, changed=told.append)
    assert later["heart"] == Policy(version=3)
    assert told[4].old is None  # it changed while no worker ran


def test_what_is_signed_is_compared_with_what_was_in_force_before_it_was_edited(tmp_path: Path) -> None:
    """A running worker looks each second, so it sees each file before its owner has signed it."""
    told: list[Turn] = []
    first, second = Policy(version=1, use=Use(plans=("a",))), Policy(version=2, use=Use(plans=("a", "b")))
    put(tmp_path, first)
    running = Policies(tmp_path, KEY.public, changed=told.append)
    assert running["heart"] == first
    for text in ("[use", second.text()):  # it is edited twice
        (tmp_path / "policies" / "heart.toml").write_text(text)
        assert running["heart"] is DENY
    put(tmp_path, second)
    assert running["heart"] == second
    assert [(turn.old, turn.new) for turn in told] == [(DENY, first), (first, DENY), (first, second)]


def test_a_change_that_cannot_be_written_down_does_not_happen(tmp_path: Path) -> None:
    full = [True]

    def changed(turn: Turn) -> None:
        if full[0]:
            raise OSError("no space left")

    put(tmp_path, Policy.open_to("alice"))
    running = Policies(tmp_path, KEY.public, changed=changed)
    assert running["heart"] is DENY
    assert "no space left" in running.why("heart")
    full[0] = False
    assert running["heart"] == Policy.open_to("alice")
    full[0] = True
    with pytest.raises(OSError, match="no space"):
        running.register("toys", Policy.open_to("bob"))
    assert "toys" not in running


def test_what_this_process_registers_needs_no_signature() -> None:
    known = Policies()
    wrong: Any = {"use": {}}
    with pytest.raises(PolicyError, match=r"expected a housecall\.Policy"):
        known.register("heart", wrong)
    known.register("heart", Policy.open_to("me"))
    assert dict(known) == {"heart": Policy.open_to("me")}
    assert decide(known, ("heart",), Asked("exact", "me"), NOW).allowed
    known.forget("heart")
    assert not decide(known, ("heart",), Asked("exact", "me"), NOW).allowed


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, Policy())
    (tmp_path / "policies" / "heart.toml").write_text("#" * 300_000)
    assert load(tmp_path) is DENY


# -- the owner's key --------------------------------------------------------------------------------------------


def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    made = OwnerKey.create(tmp_path)
    assert stat.S_IMODE((tmp_path / "owner.key").stat().st_mode) == 0o600
    assert OwnerKey.load(tmp_path).public == made.public == public_key(tmp_path)
    signature = OwnerKey.load(tmp_path).sign(b"word")
    assert verify(made.public, b"word", signature)
    assert not verify(made.public, b"words", signature)
    assert not verify(made.public, b"word", signature[:-1])
    assert not verify(b"", b"word", signature)
    with pytest.raises(PolicyError, match="already"):
        OwnerKey.create(tmp_path)
    (tmp_path / "owner.key").chmod(0o640)
    with pytest.raises(PolicyError, match="0600"):
        OwnerKey.load(tmp_path)
    assert made.public.hex()[:16] in repr(made)


def test_a_key_whose_halves_disagree_is_refused(tmp_path: Path) -> None:
    made = OwnerKey.create(tmp_path)
    (tmp_path / "owner.pub").unlink()
    with pytest.raises(PolicyError, match=r"no owner\.pub"):
        public_key(tmp_path)
    assert OwnerKey.load(tmp_path).public == made.public == public_key(tmp_path)
    (tmp_path / "owner.pub").write_text(KEY.public.hex())
    with pytest.raises(PolicyError, match="exchanged"):
        OwnerKey.load(tmp_path)
    (tmp_path / "owner.key").unlink()
    with pytest.raises(PolicyError, match=r"no owner\.key"):
        OwnerKey.load(tmp_path)
    with pytest.raises(PolicyError, match="already"):
        OwnerKey.create(tmp_path)
    for text in ("", "xx", "ab", "é"):
        (tmp_path / "owner.pub").write_text(text)
        with pytest.raises(PolicyError, match=r"owner\.pub"):
            public_key(tmp_path)
    (tmp_path / "owner.key").write_text("key")
    (tmp_path / "owner.key").chmod(0o600)
    with pytest.raises(PolicyError, match="no key that can be used"):
        OwnerKey.load(tmp_path)


# -- the commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / CONFIG_FILE).write_text('name = "clinic"\n')
    (tmp_path / "policies").mkdir()
    return tmp_path


def run(place: Path, *arguments: str, fails: bool = False, answer: str | None = None) -> str:
    result: Result = CliRunner().invoke(cli.app, [*arguments, "--folder", str(place)], input=answer)
    if isinstance(result.exception, HousecallError):
        raise result.exception
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_an_owner_writes_signs_and_loosens(place: Path) -> None:
    shown = run(place, "show", "heart")
    assert "[release]" in shown
    assert "nothing is permitted: there is no policy" in shown
    with pytest.raises(PolicyError, match="policy show heart"):
        run(place, "sign", "heart")
    path = place / "policies" / "heart.toml"
    path.write_text(Policy(use=Use(plans=("alice",))).text())
    assert "NOTHING IS PERMITTED: the policy is not signed" in run(place, "check", fails=True)
    assert "LOOSER  use.plans: adds alice" in run(place, "sign", "heart", answer="n\n", fails=True)
    assert load(place, public=public_key(place)) is DENY
    run(place, "sign", "heart", fails=True)  # nobody there to ask
    assert load(place, public=public_key(place)) is DENY
    assert "permits MORE than before. Sign it? [y/N]" in run(place, "sign", "heart", answer="y\n")
    assert load(place, public=public_key(place)).use.plans == ("alice",)
    assert "signed already" in run(place, "sign", "heart")
    assert "version 1 is in force" in run(place, "check")
    path.write_text(Policy().text())
    assert "changed since it was signed" in run(place, "check", "heart", fails=True)
    assert "tighter  use.plans: removes alice" in run(place, "sign", "heart", "--yes")
    assert "version = 2" in run(place, "show", "heart")


def test_data_without_a_policy_is_told_of(place: Path) -> None:
    (place / "data").mkdir()
    for name in ("heart", "lungs"):
        (place / "data" / f"{name}.toml").touch()
    path = place / "policies" / "heart.toml"
    path.write_text(Policy().text())
    run(place, "sign", "heart", "--yes")
    said = run(place, "check")
    assert "lungs: nobody may use it: there is no policy" in said
    assert f"housecall worker policy show lungs --folder {place}" in said
    assert "heart: version 1 is in force" in said
    assert "lungs" not in run(place, "check", "heart")


def test_an_empty_file_is_no_policy_to_begin_with(place: Path) -> None:
    """As `show heart > policies/heart.toml` makes it, before `show` begins."""
    (place / "policies" / "heart.toml").touch()
    assert "[release]" in run(place, "show", "heart")


def test_looking_takes_no_note(place: Path) -> None:
    """The worker's ledger must have each change: only the worker may count one as seen."""
    path = place / "policies" / "heart.toml"
    path.write_text(Policy.open_to("alice").text())
    run(place, "sign", "heart", "--yes")
    for command in (["check"], ["show", "heart"], ["explain", "heart"]):
        run(place, *command)
    assert not (place / "policies" / "seen.json").exists()


def test_explain_and_check_as_commands(place: Path) -> None:
    text = Policy(use=Use(interactive=("alice", "worker/*")), release=Release(exact=("alice",))).text()
    (place / "policies" / "heart.toml").write_text(text)
    assert "Nothing, for nobody: the policy is not signed" in run(place, "explain", "heart")
    run(place, "sign", "heart", "--yes")
    everybody = run(place, "explain", "heart")
    assert "scientist 'alice'\n  May compute" in everybody
    assert "any other worker\n  May compute" in everybody
    assert "any other scientist\n  Nothing: no rule permits anybody else anything." in everybody
    assert "Nothing: no rule permits 'bob'" in run(place, "explain", "heart", "bob")
    assert "MAY TAKE EXACT" in run(place, "explain", "heart", "alice")
    assert "note: it never ends" in run(place, "check")
    (place / "policies" / "heart.toml").write_text("expires = 2001-01-01T00:00:00Z\n")
    run(place, "sign", "heart", "--yes")
    assert "it ended at 2001-01-01" in run(place, "check", fails=True)


def test_deciding_needs_no_torch() -> None:
    code = (
        "import sys\nimport housecall.owner.policies, housecall.owner.approvals, housecall.cli.policy\n"
        "import housecall.cli.requests\nassert 'torch' not in sys.modules\nprint('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "light\n", done.stderr
