"""Pointers of modules that came home are used again, and nothing of what they were is left of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import housecall as hc
from housecall.errors import UsageError
from housecall.pointers import spare as subject


@pytest.fixture(autouse=True)
def none_kept() -> Iterator[None]:
    subject._kept.clear()
    yield
    subject._kept.clear()


@pytest.fixture
def clinic() -> hc.VirtualWorker:
    return hc.VirtualWorker(id="clinic")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ids of slots for which a new pointer was made."""
    found: list[Any] = []

    def point(cls: Any, slot: Any) -> Any:
        found.append(slot.id)
        return real(cls, slot)

    real = subject.point
    monkeypatch.setattr(subject, "point", point)
    return found


def kept() -> int:
    return sum(len(alike) for alike in subject._kept.values())


def test_a_pointer_is_used_again(clinic: hc.VirtualWorker, made: list[Any]) -> None:
    model: Any = nn.Linear(3, 2)
    model.send(clinic).get()
    assert len(made) == kept() == 2
    made.clear()
    model.send(clinic)
    assert not made
    assert kept() == 0
    assert model.weight.shape == (2, 3)
    assert model.weight.requires_grad
    model.get()
    assert isinstance(model.weight, nn.Parameter)


def test_one_that_a_graph_refers_to_is_left_alone(clinic: hc.VirtualWorker, made: list[Any]) -> None:
    model: Any = nn.Linear(3, 2)
    x = torch.randn(4, 3).send(clinic)
    model.send(clinic)
    loss = model(x).sum()
    model.get()
    made.clear()
    model.send(clinic)
    assert len(made) == 2
    model.get()
    del loss
    gc.collect()
    made.clear()
    model.send(clinic)
    assert not made
    model(x).sum().backward()  # what was stale is not, now that it is another's
    assert model.bias.grad.copy().get().tolist() == [4.0, 4.0]
    model.get()


def test_one_that_somebody_has_is_left_alone(clinic: hc.VirtualWorker, made: list[Any]) -> None:
    """A graph gives its leaves to whoever asks, and they outlive it."""
    model: Any = nn.Linear(3, 2)
    model.send(clinic)
    loss = model.bias.sum()
    model.get()
    leaf = loss.grad_fn.next_functions[0][0].variable
    del loss
    gc.collect()
    made.clear()
    model.send(clinic)
    assert len(made) == 1
    assert model.bias is not leaf
    model.get()


def test_a_graph_that_refers_to_one_still_refuses_it(clinic: hc.VirtualWorker) -> None:
    model: Any = nn.Linear(3, 2)
    model.send(clinic)
    loss = model(torch.randn(4, 3).send(clinic)).sum()
    model.get()
    model.send(clinic)
    with pytest.raises(UsageError, match="has moved since its forward"):
        loss.backward()
    model.get()


def test_a_gradient_is_not_left_over(clinic: hc.VirtualWorker) -> None:
    one: Any = nn.Linear(3, 2)
    one.send(clinic)
    one(torch.randn(4, 3).send(clinic)).sum().backward()
    grad = weakref.ref(one.weight.grad._slot)
    one.get()
    one.weight.grad = one.bias.grad = None
    gc.collect()
    assert grad() is None
    other: Any = nn.Linear(3, 2)
    other.send(clinic)
    assert other.weight.grad is None
    other.get()


def test_parameters_that_are_frozen_are_not_mixed_with_others(clinic: hc.VirtualWorker, made: list[Any]) -> None:
    model: Any = nn.Linear(3, 3)
    model.send(clinic)
    model.weight.requires_grad_(False)
    model.get()
    assert not model.weight.requires_grad
    made.clear()
    model.weight.requires_grad_(True)
    model.send(clinic)
    assert len(made) == 1  # the weight's: what is kept of it needs no gradient
    assert model.weight.requires_grad
    model.get()


def test_what_was_given_another_value_is_what_it_is_now(clinic: hc.VirtualWorker) -> None:
    model: Any = nn.Linear(3, 2)
    other = torch.zeros(5, 3).send(clinic)
    model.send(clinic)
    model.weight.data = other[1:]  # four rows, not at the start of a storage
    model.get()
    assert model.weight.shape == (4, 3)
    model.send(clinic)
    assert model.weight.shape == (4, 3)
    assert model.weight.storage_offset() == 0
    model.get()
    assert torch.equal(model.weight, torch.zeros(4, 3))


def test_inference_mode_has_its_own(clinic: hc.VirtualWorker) -> None:
    model: Any = nn.Linear(3, 2)
    with torch.inference_mode():
        model.send(clinic)
        model.get()
    assert kept() == 0
    model.send(clinic).get()
    assert kept() == 2
    with torch.inference_mode():
        model.send(clinic)
    assert kept() == 2
    model.get()


def test_no_more_are_kept_than_said(clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_TYPES", 3)
    models: list[Any] = [nn.Linear(1, 1, bias=False) for _ in range(subject._ALIKE + 5)]
    for model in models:
        model.send(clinic)
    for model in models:
        model.get()
    assert kept() == subject._ALIKE
    for size in range(2, 9):
        wide: Any = nn.Linear(size, size, bias=False)
        wide.send(clinic).get()
        assert len(subject._kept) <= 3


@pytest.mark.parametrize("alias", [lambda p: p.detach(), lambda p: p.data])
def test_one_that_has_an_alias_is_not_used_again(clinic: hc.VirtualWorker, alias: Any) -> None:
    """They share a version counter: a write to the one would be a write to the other."""
    one: Any = nn.Linear(3, 2)
    other: Any = nn.Linear(3, 2)
    one.send(clinic)
    t = alias(one.weight)
    x = torch.randn(4, 3).send(clinic).requires_grad_()
    y = (x @ t.t()).sum()
    one.get()
    other.send(clinic)
    with torch.no_grad():
        other.weight.zero_()
    y.backward()
    assert torch.equal(x.grad.copy().get()[0], t.copy().get().sum(0))
    other.get()


def test_a_setting_is_not_left_over(clinic: hc.VirtualWorker) -> None:
    one: Any = nn.Linear(3, 2)
    one.send(clinic)
    one.weight.grad_dtype = torch.float64
    one.get()
    other: Any = nn.Linear(3, 2)
    other.send(clinic)
    assert other.weight.grad_dtype is torch.float32
    other.get()


def test_one_that_is_held_for_long_does_not_stand_before_the_others(clinic: hc.VirtualWorker, made: list[Any]) -> None:
    model: Any = nn.Linear(3, 2)
    x = torch.randn(4, 3).send(clinic)
    model.send(clinic)
    loss = model(x).sum()
    model.get()
    model.send(clinic).get()
    for _ in range(20):
        model.send(clinic).get()
    assert len(made) <= 20  # of 44: the one that is held has its turn as well
    loss = None
    made.clear()
    model.send(clinic).get()
    assert loss is None
    assert not made


def test_what_is_kept_keeps_no_worker() -> None:
    worker = hc.VirtualWorker(id="clinic")
    session = weakref.ref(worker.session)
    model: Any = nn.Linear(3, 2)
    model.send(worker).get()
    del worker
    gc.collect()
    assert kept() == 2
    assert session() is None
