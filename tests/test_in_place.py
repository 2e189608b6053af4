"""Writes in place that need no graph go straight to the trace: as torch's in everything but the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import housecall as hc
from housecall.pointers import in_place as subject
from housecall.pointers.tensor import PointerTensor


@pytest.fixture
def clinic() -> hc.VirtualWorker:
    return hc.VirtualWorker(id="clinic")


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of the calls that went straight to the trace."""
    found: list[str] = []

    def again(cls: Any, session: Any, expected: Any, args: Any, kwargs: Any) -> Any:
        result = real(cls, session, expected, args, kwargs)
        if result is not None:
            found.append(expected.call.op)
        return result

    real = subject.again
    monkeypatch.setattr(subject, "again", again)
    return found


# Calls of each method that torch hands down as they come; x, y, z are tensors of one shape, positive.
CALLS = {
    "add_": (lambda x, y, z: x.add_(y, alpha=0.5), lambda x, y, z: x.add_(y)),
    "sub_": (lambda x, y, z: x.sub_(y, alpha=0.25), lambda x, y, z: x.sub_(y)),
    "mul_": (lambda x, y, z: x.mul_(0.5), lambda x, y, z: x.mul_(y)),
    "div_": (lambda x, y, z: x.div_(3.0), lambda x, y, z: x.div_(y, rounding_mode="floor")),
    "lerp_": (lambda x, y, z: x.lerp_(y, 0.25), lambda x, y, z: x.lerp_(y, z)),
    "addcmul_": (lambda x, y, z: x.addcmul_(y, z, value=0.5), lambda x, y, z: x.addcmul_(y, z)),
    "addcdiv_": (lambda x, y, z: x.addcdiv_(y, z, value=-0.5), lambda x, y, z: x.addcdiv_(y, z)),
}


def test_every_method_that_goes_straight_is_tried_here() -> None:
    assert sorted(CALLS) == sorted(subject.NAMES)


@pytest.mark.parametrize("name", subject.NAMES)
@pytest.mark.parametrize("which", [0, 1])
def test_what_goes_straight_is_what_torch_does(
    clinic: hc.VirtualWorker, straight: list[str], name: str, which: int
) -> None:
    call = CALLS[name][which]
    torch.manual_seed(0)
    local = [torch.rand(3, 4) + 0.5 for _ in range(3)]
    away = [x.send(clinic) for x in local]
    for _ in range(4):
        with torch.no_grad():
            expected, found = call(*local), call(*away)
        assert expected is local[0]
        assert found is away[0]
        assert torch.equal(away[0].copy().get(), local[0])
    assert straight
    assert {op.partition(".")[0] for op in straight} == {name}


def test_the_step_of_an_optimizer_does_not_pass_through_the_dispatcher(
    clinic: hc.VirtualWorker, straight: list[str]
) -> None:
    model: Any = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 4).send(clinic)
    for _ in range(4):
        straight.clear()
        model.send(clinic)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        model.get()
    assert straight == ["add_.Tensor", "add_.Tensor"]


def test_a_write_is_counted(clinic: hc.VirtualWorker, straight: list[str]) -> None:
    """A graph that has saved a value refuses it after a write, however that went."""
    p = torch.rand(3).send(clinic).requires_grad_()
    step = torch.rand(3).send(clinic)
    for _ in range(4):
        straight.clear()
        loss = (p * p).sum()
        before = p._version
        with torch.no_grad():
            p.add_(step, alpha=0.5)
        assert p._version == before + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        clinic.session.wait()
    assert straight


def test_with_a_graph_it_is_torchs(clinic: hc.VirtualWorker, straight: list[str]) -> None:
    for _ in range(4):
        w = torch.tensor([1.0, 2.0]).send(clinic).requires_grad_()
        x = torch.tensor([3.0, 4.0]).send(clinic)
        y = (x * w).mul_(w)
        y.sum().backward()
        assert w.grad.copy().get().tolist() == [6.0, 16.0]
    assert not straight


def test_a_leaf_that_needs_a_gradient_is_refused_with_a_graph(clinic: hc.VirtualWorker) -> None:
    w = torch.ones(2).send(clinic).requires_grad_()
    y = torch.ones(2).send(clinic)
    for _ in range(3):
        with torch.no_grad():
            w.add_(y, alpha=0.5)
        clinic.session.wait()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        w.add_(y, alpha=0.5)


def test_modes_see_it(clinic: hc.VirtualWorker, straight: list[str]) -> None:
    seen: list[str] = []

    class Below(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Above(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x, y = torch.ones(2).send(clinic), torch.ones(2).send(clinic)

    def once() -> None:
        with torch.no_grad():
            x.add_(y, alpha=0.5)
        clinic.session.wait()

    for _ in range(3):
        once()
    assert straight
    straight.clear()
    with Below():
        once()
    assert "aten.add_.Tensor" in seen
    seen.clear()
    with Above():
        once()
    assert "add_" in seen
    assert not straight
    assert x.get().tolist() == [3.5, 3.5]


def test_what_was_made_in_inference_mode_stays_as_torch_has_it(clinic: hc.VirtualWorker) -> None:
    y = torch.ones(2).send(clinic)
    with torch.inference_mode():
        x = torch.ones(2).send(clinic)
    for _ in range(3):
        with torch.inference_mode():
            x.add_(y, alpha=0.5)
            clinic.session.wait()
    plain = torch.inference_mode()(torch.ones)(2)
    for tensor, other in ((plain, torch.ones(2)), (x, y)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            tensor.add_(other, alpha=0.5)


def test_other_arguments_are_torchs(clinic: hc.VirtualWorker) -> None:
    x, y = torch.ones(2).send(clinic), torch.ones(2).send(clinic)
    other = hc.VirtualWorker(id="other")
    with torch.no_grad():
        for _ in range(3):
            x.add_(y, alpha=0.5)
            clinic.session.wait()
        with pytest.raises(hc.errors.PlaceError):
            x.add_(torch.ones(2).send(other), alpha=0.5)
        with pytest.raises(hc.errors.PlaceError):
            x.add_(torch.ones(2), alpha=0.5)
        with pytest.raises(RuntimeError, match="size"):
            x.add_(torch.ones(3).send(clinic), alpha=0.5).sum().item()
        with pytest.raises(TypeError):
            x.add_()  # type: ignore[call-arg]
    spent = torch.ones(2).send(clinic)
    spent.get()
    with pytest.raises(hc.errors.SpentPointerError):
        spent.add_(y)


def test_the_methods_are_torchs_by_name() -> None:
    for name in subject.NAMES:
        assert getattr(PointerTensor, name).__name__ == name
        assert getattr(PointerTensor, name) is not getattr(torch.Tensor, name)
