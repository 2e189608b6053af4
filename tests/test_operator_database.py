"""PyTorch's own operator database through pointers: equal to local torch to the bit, but for two listed tables."""

from __future__ import annotations

import re
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

ENTRIES = [(name, dtype, kind) for dtype, kind in RUNS for name in entries(dtype, kind)]
EQUAL = [entry for entry in ENTRIES if entry[0] not in EXCEPTIONS]
UNEQUAL = [entry for entry in ENTRIES if entry[0] in EXCEPTIONS]


@pytest.fixture(scope="module")
def workers() -> dict[bool, hc.VirtualWorker]:
    return {codec: hc.VirtualWorker(id="w", codec=codec) for codec in (False, True)}


@pytest.fixture
def worker(request: pytest.FixtureRequest, workers: dict[bool, hc.VirtualWorker]) -> Iterator[hc.VirtualWorker]:
    """For the element types that are least alike, a worker that gets every message through bytes."""
    codec = request.node.callspec.params["dtype"] in ("complex64", "int64", "bool")
    worker = workers[codec]
    failed = request.session.testsfailed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many samples are there to make torch warn
        yield worker
    if request.session.testsfailed > failed:  # what failed here shall not be seen in the next test
        worker.session.close()
        workers[codec] = hc.VirtualWorker(id="w", codec=codec)


@pytest.mark.parametrize(("name", "dtype", "kind"), EQUAL)
def test_an_operator_through_pointers_equals_local(name: str, dtype: str, kind: str, worker: hc.VirtualWorker) -> None:
    check(name, dtype, kind, worker, **tolerance(name))


def test_the_tables_name_operators_of_the_database() -> None:
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
def test_no_tolerance_is_given_without_need(name: str, workers: dict[bool, hc.VirtualWorker]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tried = [entry for entry in EQUAL if entry[0] == name]
        assert any(unequal(*entry, workers[False]) for entry in tried), f"take {name} out of ROUNDING"
