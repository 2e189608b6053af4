"""`as_strided` in other words: the same elements, the same memory, for any geometry that stays within the value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import housecall as hc
from housecall.errors import UsageError
from housecall.pointers.strided import dense_order, steps
from housecall.pointers.tensor import send
from housecall.program.ops import table
from housecall.program.typing import type_of

FIXED = settings(deadline=None, database=None, derandomize=True, max_examples=400)

Geometry = tuple[list[int], list[int], int]


@st.composite
def sources(draw: st.DrawFn) -> torch.Tensor:
    """A dense tensor in any order of dimensions, some of one element, some repeated, perhaps at an offset."""
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    value = torch.arange(2.0 * math.prod(shape)).reshape(2, *shape)[draw(st.integers(0, 1))]
    value = value.permute(draw(st.permutations(range(value.dim()))))
    if draw(st.booleans()):
        value = value.unsqueeze(draw(st.integers(0, value.dim())))
    if draw(st.integers(0, 4)) == 0:
        value = value.unsqueeze(0).expand(3, *value.shape)
    return value


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    dims = draw(st.integers(0, 4))
    size = draw(st.lists(st.sampled_from([1, 2, 3, 4, 2, 3, 0]), min_size=dims, max_size=dims))
    stride = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 0]), min_size=dims, max_size=dims))
    return size, stride, draw(st.integers(0, 3))


def viewed(value: Any, found: list[Any]) -> Any:
    for function, args in found:
        value = function(value, *args)
    return value


def needs(value: torch.Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    """First and last element that a geometry reads, first and last that the value has."""
    size, stride, start = geometry
    first = value.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    return start, start + sum((n - 1) * s for n, s in zip(size, stride, strict=True)), first, last


@FIXED
@given(sources(), geometries())
def test_steps_are_as_strided_or_a_clear_error(value: torch.Tensor, relative: Geometry) -> None:
    size, stride, start = relative
    geometry = (size, stride, start + value.storage_offset())
    first, last, least, most = needs(value, geometry)
    if 0 not in size and (first < least or last > most):
        with pytest.raises(UsageError, match="reaches elements that are not this value's"):
            steps(type_of(value), *geometry)
        return
    found = viewed(value, steps(type_of(value), *geometry))
    expected = value.as_strided(*geometry)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    if 0 not in size:
        assert found.data_ptr() == expected.data_ptr()
        kept = [dim for dim, n in enumerate(size) if n > 1]
        assert [found.stride(dim) for dim in kept] == [stride[dim] for dim in kept]


@FIXED
@given(sources(), geometries())
def test_every_step_is_an_operator_that_a_worker_has(value: torch.Tensor, relative: Geometry) -> None:
    size, stride, start = relative
    try:
        found = steps(type_of(value), size, stride, start + value.storage_offset())
    except UsageError:
        return
    assert {function.name().removeprefix("aten::") for function, _ in found} <= {
        name.removesuffix(".default") for name in table()
    }


def test_the_same_geometry_takes_no_step() -> None:
    value = torch.arange(6.0).reshape(2, 3).t()
    assert steps(type_of(value), [3, 2], [1, 3], 0) == []


@pytest.mark.parametrize(("size", "stride", "offset"), [([-1], [1], 0), ([2], [-1], 0), ([2], [1], -1), ([2], [], 0)])
def test_what_no_tensor_has_is_refused(size: list[int], stride: list[int], offset: int) -> None:
    with pytest.raises(UsageError, match="no such tensor"):
        steps(type_of(torch.ones(4)), size, stride, offset)


def test_a_value_with_gaps_says_so() -> None:
    with pytest.raises(UsageError, match="not side by side"):
        steps(type_of(torch.ones(4, 4)[:, :2]), [2, 2], [1, 1], 0)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [((2, 3), (3, 1), [0, 1]), ((2, 3), (1, 2), [1, 0]), ((), (), []), ((2, 1, 3), (3, 9, 1), [0, 2, 1])],
)
def test_a_dense_order_is_found(size: Any, stride: Any, expected: list[int]) -> None:
    assert dense_order(size, stride) == expected


@pytest.mark.parametrize(("size", "stride"), [((2, 3), (4, 1)), ((2,), (2,)), ((2,), (0,)), ((3, 3), (1, 1))])
def test_what_is_not_dense_has_no_order(size: Any, stride: Any) -> None:
    assert dense_order(size, stride) is None


# -- through pointers -------------------------------------------------------------------------------------


def test_windows_of_a_pointer_alias_it(clinic: hc.VirtualWorker) -> None:
    here = torch.arange(10.0)
    there: Any = send(here, clinic)
    windows = there.as_strided((4, 3), (2, 1))
    assert torch.equal(windows.copy().get(), here.as_strided((4, 3), (2, 1)))
    there.as_strided((3,), (3,), 1).mul_(10)
    here.as_strided((3,), (3,), 1).mul_(10)
    assert torch.equal(there.copy().get(), here)
    assert torch.equal(windows.copy().get(), here.as_strided((4, 3), (2, 1)))


@pytest.mark.parametrize("copied", [torch.as_strided_copy, torch.as_strided])
def test_a_copy_has_memory_of_its_own(copied: Any, clinic: hc.VirtualWorker) -> None:
    there = send(torch.arange(6.0), clinic)
    found = copied(there, (2, 2), (3, 1))
    there.zero_()
    assert found.get().any() == (copied is torch.as_strided_copy)


def test_scatter_writes_into_a_copy(clinic: hc.VirtualWorker) -> None:
    here, source = torch.zeros(3, 4).t(), torch.arange(1.0, 5.0).reshape(2, 2)
    there = send(here, clinic)
    for args in (((2, 2), (1, 3)), ((2, 2), (4, 2), 1)):
        expected = torch.as_strided_scatter(here, source, *args)
        assert torch.equal(torch.as_strided_scatter(there, send(source, clinic), *args).get(), expected)
    assert not there.get().any()


def test_in_place_geometry(clinic: hc.VirtualWorker) -> None:
    there: Any = send(torch.arange(6.0), clinic)
    there.as_strided_((2, 2), (3, 1), 1)
    assert there.shape == (2, 2)
    assert torch.equal(there.get(), torch.arange(6.0).as_strided((2, 2), (3, 1), 1))


def gradient(x: Any) -> Any:
    y = x * 1
    y.t()[1:].mul_(3)
    y[:, 1].add_(y[:, 0])
    y.diagonal().pow_(2)
    (y * y).sum().backward()
    return x.grad


def test_gradients_of_writes_through_views(clinic: hc.VirtualWorker) -> None:
    """Autograd takes views of the base's gradient by `as_strided`."""
    here = torch.arange(12.0).reshape(3, 4).requires_grad_()
    there = send(here.detach(), clinic).requires_grad_()
    assert torch.equal(gradient(there).get(), gradient(here))


@pytest.mark.parametrize("stride", [(4, 1), (1, 3), (8, 1), (1, 1), (0, 1)])
def test_an_empty_strided_tensor_is_zeros_of_that_geometry(stride: tuple[int, int], clinic: hc.VirtualWorker) -> None:
    found = send(torch.ones(1), clinic).new_empty_strided((3, 4), stride)
    assert found.stride() == stride
    assert torch.equal(found.get(), torch.zeros(3, 4))


def test_nothing_strided_is_sent() -> None:
    assert not [name for name in table() if name.startswith("as_strided")]
