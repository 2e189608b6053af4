"""PyTorch's own operator database through pointers: equal to local torch to the bit, but for two listed tables."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opdb import (
    CUDA_ONLY,
    EXCEPTIONS,
    ONE,
    OPS,
    REFUSALS,
    ROUNDING,
    RUNS,
    UNINITIALISED,
    check,
    entries,
    same,
    samples,
    tolerance,
)

import housecall as hc
from housecall.worker.limits import Limits, Meter

ENTRIES = [(name, dtype, kind) for dtype, kind in RUNS for name in entries(dtype, kind)]
EQUAL = [entry for entry in ENTRIES if entry[0] not in EXCEPTIONS]
UNEQUAL = [entry for entry in ENTRIES if entry[0] in EXCEPTIONS]


def made(how: str) -> hc.VirtualWorker:
    """A worker in this process: "direct"; "codec", which gets every message through bytes; or "metered", which holds
    its session to the default limits of a worker behind a wire."""
    worker = hc.VirtualWorker(id="w", codec=how == "codec")
    if how == "metered":
        door = worker._door
        door.meter = Meter(Limits(), door.store, door.randomness, time.perf_counter)
    return worker


# The element types that are least alike go through bytes; real ones, forward and backward, past the limits.
HOW = {
    ("float32", "forward"): "direct",
    ("float32", "gradient"): "metered",
    ("float64", "forward"): "metered",
}


# Their kernels follow indices that cannot be checked: a worker that holds sessions to limits refuses them.
TRUSTING = (
    "_segment_reduce.lengths",
    "_segment_reduce.offsets",
    "linalg.ldl_solve",
    "nn.functional.ctc_loss",
    "nn.functional.embedding_bag",
)


@pytest.fixture(scope="module")
def workers() -> dict[str, hc.VirtualWorker]:
    return {how: made(how) for how in ("direct", "codec", "metered")}


@pytest.fixture
def worker(request: pytest.FixtureRequest, workers: dict[str, hc.VirtualWorker]) -> Iterator[hc.VirtualWorker]:
    params = request.node.callspec.params
    how = HOW.get((params["dtype"], params["kind"]), "codec")
    if how == "metered" and params["name"] in TRUSTING:
        how = "direct"
    failed = request.session.testsfailed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many samples are there to make torch warn
        yield workers[how]
    if request.session.testsfailed > failed:  # what failed here shall not be seen in the next test
        workers[how].session.close()
        workers[how] = made(how)


@pytest.mark.parametrize(("name", "dtype", "kind"), EQUAL)
def test_an_operator_through_pointers_equals_local(name: str, dtype: str, kind: str, worker: hc.VirtualWorker) -> None:
    check(name, dtype, kind, worker, **tolerance(name))


@pytest.mark.parametrize("name", TRUSTING)
def test_what_trusts_its_indices_is_refused_by_name(name: str) -> None:
    errors = [error for error in results(name, "float32", "forward", made("metered")) if error is not None]
    assert any("trusts arguments that cannot be checked" in str(error) for error in errors)


def test_the_tables_name_operators_of_the_database() -> None:
    assert set(TRUSTING) <= set(OPS)
    assert sorted(set(EXCEPTIONS) - set(OPS)) == []
    assert sorted(set(ROUNDING) - set(OPS)) == []
    assert sorted(set(EXCEPTIONS) & set(ROUNDING)) == []
    assert list(EXCEPTIONS) == sorted(EXCEPTIONS)
    assert list(ROUNDING) == sorted(ROUNDING)
    assert {name for name, _, _ in UNEQUAL} == set(EXCEPTIONS)
    assert len(EQUAL) > 3000


def results(name: str, dtype: str, kind: str, worker: Any) -> list[Exception | None]:
    """For each sample: `None` if it was equal, or what it raised. An unequal result is a failure."""
    found: list[Exception | None] = []
    for number, sample in enumerate(samples(OPS[name], getattr(torch, dtype), grad=kind == "gradient")):
        try:
            pair = ONE[kind](OPS[name], sample, worker)
        except (hc.HousecallError, RuntimeError) as error:
            found.append(error)
        else:
            same(*pair, f"sample {number}", rtol=0, atol=0)
            found.append(None)
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "kind"), [e for e in UNEQUAL if e[0] not in UNINITIALISED and e[0] not in CUDA_ONLY]
)
def test_an_exception_says_so(name: str, dtype: str, kind: str, worker: hc.VirtualWorker) -> None:
    """It is equal or a clear error, never silently something else; and it is an error at least once."""
    errors = [error for error in results(name, dtype, kind, worker) if error is not None]
    assert errors, f"{name} passes every sample: take it out of EXCEPTIONS"
    for error in errors:
        assert re.search(REFUSALS[EXCEPTIONS[name]], str(error), re.DOTALL), error


@pytest.mark.parametrize(("name", "dtype", "kind"), [e for e in UNEQUAL if e[0] in UNINITIALISED])
def test_what_is_uninitialised_has_the_right_type_and_gives_nothing_away(
    name: str, dtype: str, kind: str, worker: hc.VirtualWorker
) -> None:
    assert kind == "forward"
    there = name in ("empty_like", "new_empty", "new_empty_strided")  # the others take sizes, and make it here
    for sample in samples(OPS[name], getattr(torch, dtype), grad=False):
        found, expected = ONE[kind](OPS[name], sample, worker)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        if there:
            assert not found.any(), "a worker handed out memory that others left behind"


@pytest.mark.parametrize(("name", "dtype", "kind"), [e for e in UNEQUAL if e[0] in CUDA_ONLY])
def test_what_needs_cuda_fails_here_too(name: str, dtype: str, kind: str) -> None:
    op = OPS[name]
    for sample in samples(op, getattr(torch, dtype), grad=kind == "gradient"):
        with pytest.raises(AssertionError, match="Jiterator is only supported on CUDA"):
            op.op(sample.input, *sample.args, **sample.kwargs)


def unequal(name: str, dtype: str, kind: str, worker: hc.VirtualWorker) -> bool:
    try:
        check(name, dtype, kind, worker, rtol=0.0, atol=0.0)
    except AssertionError:
        return True
    return False


# Where LAPACK's work space lies is chance, and so is whether its rounding shows.
@pytest.mark.parametrize("name", [name for name in ROUNDING if "LAPACK's rounding" not in ROUNDING[name]])
def test_no_tolerance_is_given_without_need(name: str, workers: dict[str, hc.VirtualWorker]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried = [entry for entry in EQUAL if entry[0] == name]
        assert any(unequal(*entry, workers["direct"]) for entry in tried), f"take {name} out of ROUNDING"
