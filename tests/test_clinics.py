"""`examples/clinics` runs over real processes: ledgers say what left, and greed gets nothing. And two pages."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import housecall as hc
from housecall.owner.ledger import Account
from housecall.owner.policy import Policy

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CLINICS = ROOT / "examples" / "clinics"
PAGE = (CLINICS / "README.md").read_text()
MODULES = ("table", "hospitals", "train", "greedy")


@pytest.fixture(scope="module")
def clinics() -> Iterator[dict[str, Any]]:
    """The example's modules, by name; afterwards the names are free again."""
    sys.path.insert(0, str(CLINICS))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(CLINICS))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cluster(clinics: dict[str, Any]) -> Iterator[hc.LocalCluster]:
    """Both hospitals' workers, for all tests: to start them is most of the time."""
    with clinics["hospitals"].hospitals() as made:
        yield made


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_the_story(clinics: dict[str, Any], cluster: hc.LocalCluster) -> None:
    train = clinics["train"]
    before = released(cluster)
    with train.owners(cluster, "--answer", "approve"):
        told = train.story(cluster, train.public_rows(None))
    assert "rule release.approvals" in told.refusal
    assert "rule plans.ask" in told.refused_run
    assert f"one program of {len(told.program.calls)} operations" in PAGE
    assert told.rehearsal[1] < told.rehearsal[0]
    assert told.accuracy["average"] > 0.8 > told.accuracy["untrained"]
    assert released(cluster) == {name: count + 1 for name, count in before.items()}
    assert all(0.6 < score < 1.2 for score in told.scores.values())
    for entries in told.ledgers.values():
        *before_scores, paid, scored = entries
        last = {sealed.entry.kind: sealed for sealed in before_scores}
        order = [last[kind].sequence for kind in ("request", "approval", "run", "release")]
        assert order == sorted(order)
        digest = last["request"].entry.program
        assert all(last[kind].entry.program.startswith(digest) for kind in ("approval", "run", "release"))
        assert "and what it makes may leave" in last["approval"].entry.decision
        assert last["release"].entry.decision == "allowed by heart: 2 tensors, 14 values"
        assert (scored.entry.kind, scored.entry.of) == ("release", paid.sequence)
        assert scored.entry.decision == "a mean score between 0.0 and 1.0: allowed by heart"


def test_the_greedy_variant_is_refused_at_every_turn_with_the_texts_of_the_page(clinics: dict[str, Any]) -> None:
    """At hospitals of its own, since it spends their budgets."""
    with clinics["hospitals"].hospitals() as cluster:
        with clinics["train"].owners(cluster, "--answer", "approve-then-deny", "--count", "2"):
            answers = dict(clinics["greedy"].greedy(*cluster))
        left = released(cluster)
    rows = dict(re.findall(r"^\| (.+) \| \((\d)\) \|$", PAGE, re.M))
    texts = dict(re.findall(r"^\((\d)\) (.+)$", PAGE, re.M))
    assert {name: texts[number] for name, number in rows.items()} == answers
    assert set(left.values()) == {0}  # the approved model too: she never asked for it


def released(cluster: hc.LocalCluster) -> dict[str, int]:
    """How often anything left without noise, by the ledgers."""
    return {
        worker.id: sum(
            sealed.entry.kind == "release" and sealed.entry.of is None for sealed in Account(worker.folder).entries()
        )
        for worker in cluster
    }


def test_own_tables_are_read(clinics: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "westside.csv").write_text(
        "63,1,1,145,233,1,2,150,0,2.3,3,0,6,0\n55,0,3,130,?,0.2,0.5,145,0,1,?,0,3,2\n"
    )
    x, y = clinics["table"].table("westside", tmp_path)
    assert x.shape == (2, 13)
    assert y.tolist() == [0.0, 1.0]
    assert x.isfinite().all()
    with pytest.raises(SystemExit, match=r"processed.hungarian.data, grapevine.csv"):
        clinics["table"].table("grapevine", tmp_path)
    (tmp_path / "grapevine.csv").write_text("1,2,3\n")
    with pytest.raises(SystemExit, match="14 numbers"):
        clinics["table"].table("grapevine", tmp_path)


def test_the_auditors_reading_list_names_files_that_are_there() -> None:
    _, _, listed = (DOCS / "threat-model.md").read_text().partition("## The auditor's reading list")
    names = re.findall(r"^\| `(\S+)` \|", listed, re.M)
    assert len(names) > 20
    assert [name for name in names if not (ROOT / "housecall" / name).is_file()] == []


def test_the_owners_page_explains_every_key_of_a_policy() -> None:
    assert Policy().text().strip() in (DOCS / "owner.md").read_text()
