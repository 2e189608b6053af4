"""An `nn.Sequential` that is away is one node: what it gives, and its gradients, are torch's bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

import housecall as hc
from housecall.errors import UsageError
from housecall.pointers import chain as subject
from housecall.pointers.tensor import PointerTensor


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chains that were one node."""
    found: list[Any] = []

    def applied(chain: Any, *args: Any) -> Any:
        found.append(chain)
        return real(chain, *args)

    real = subject._apply
    monkeypatch.setattr(subject, "_apply", applied)
    return found


def twins(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = make()
    return model, copy.deepcopy(model)


def home(value: Any) -> Any:
    return value.detach().copy().get() if isinstance(value, PointerTensor) else value


def same(one: Any, other: Any) -> None:
    one = home(one)
    assert (one is None) == (other is None)
    if one is not None:
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


def compare(model: Any, plain: Any, x: torch.Tensor, clinic: Any, *, needs_x: bool = True, rounds: int = 3) -> None:
    """Forward and backward, some times over."""
    model.send(clinic)
    away, here = x.send(clinic).requires_grad_(needs_x), x.clone().requires_grad_(needs_x)  # type: ignore[attr-defined]  # the hook's
    for _ in range(rounds):
        for one in (model, plain):
            one.zero_grad()
        away.grad = here.grad = None
        found, expected = model(away), plain(here)
        same(found, expected.detach())
        assert found.requires_grad == expected.requires_grad
        if expected.requires_grad:
            (found * found).sum().backward()
            (expected * expected).sum().backward()
        same(away.grad, here.grad)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            same(one.grad, other.grad)
        clinic.session.wait()
    model.get()
    assert "forward" not in model.__dict__


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "an MLP": mlp,
    "activations": lambda: nn.Sequential(
        nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 5)
    ),
    "that ends with one": lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4), nn.Tanh()),
    "that begins with one": lambda: nn.Sequential(nn.ReLU(), nn.GELU("tanh"), nn.Linear(12, 4)),
    "within another": lambda: nn.Sequential(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), nn.Dropout(0.0), mlp_head()),
    "double": lambda: mlp().double(),
}


def mlp_head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4), nn.GELU())


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_a_chain_equals_torch(name: str, needs_x: bool, clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    model, plain = twins(KNOWN[name])
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    shape = (5, 3, 4) if isinstance(model[0], nn.Flatten) else (5, 12)
    compare(model, plain, torch.randn(shape).to(dtype), clinic, needs_x=needs_x)
    assert chains


def test_images_are_flattened(clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    model, plain = twins(mlp)
    compare(model, plain, torch.randn(5, 3, 2, 2), clinic)
    assert chains


def test_what_it_says(clinic: hc.VirtualWorker) -> None:
    """Torch's calls forward; backward none that only shares, or turns for nothing."""
    model, _ = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    model.send(clinic)

    def said() -> list[str]:
        return [step.call.op.partition(".")[0] for step in clinic.session.trace.step.path() if step.call]

    for _ in range(3):
        model.zero_grad()
        out = model(torch.randn(5, 12).send(clinic))  # type: ignore[attr-defined]  # the hook's
        forward = said()
        assert forward == ["t", "addmm", "relu", "t", "addmm"]
        out.sum().backward()
        assert said()[len(forward) :] == [
            "sum", "ones_like", "expand", "mm", "t", "mm", "sum", "threshold_backward", "t", "mm", "sum",
        ]  # fmt: skip
        clinic.session.wait()


# Of these torch does it: what is not known, or is watched, or lies otherwise.
def _hooked(model: Any) -> Any:
    model[1].register_forward_hook(lambda module, args, out: out * 2)
    return model


def _hooked_backward(model: Any) -> Any:
    model[1].register_full_backward_hook(lambda module, given, taken: (given[0] * 2,))
    return model


def _own_forward(model: Any) -> Any:
    model[1].forward = lambda x: x.relu() * 2
    return model


def parametrizations_removed() -> nn.Sequential:
    """It is known again, with its bias first."""
    layer = parametrizations.weight_norm(nn.Linear(12, 8))
    remove_parametrizations(layer, "weight")
    return nn.Sequential(layer, nn.Softplus())


class _Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "a layer that is not known": lambda: nn.Sequential(nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 3)),
    "a layer of one's own": lambda: nn.Sequential(_Own(12, 8), nn.ReLU(), nn.Linear(8, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)),
    "one column": lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)),
    "in place": lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
    "a hook": lambda: _hooked(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))),
    "a backward hook": lambda: _hooked_backward(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))),
    "a forward of its own": lambda: _own_forward(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))),
    "a parametrization": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(12, 8)), nn.ReLU()),
    "nothing to flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8)),
    "a tied layer": lambda: (lambda one: nn.Sequential(one, nn.ReLU(), one, one))(nn.Linear(12, 12)),
    "flat at the end": lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Flatten(0)),
    "parameters in another order": lambda: parametrizations_removed(),
    "one layer": lambda: nn.Sequential(nn.Linear(12, 8)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_torchs(name: str, clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    model, plain = twins(UNKNOWN[name])
    if name == "a forward of its own":
        _own_forward(plain)  # a copy has the original's layer within its function
    compare(model, plain, torch.randn(5, 12), clinic)
    assert not chains


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(12, 5).t(),
        torch.randn(1, 12),
        torch.randn(2, 3, 12),
        torch.randn(12),
        torch.randn(10, 12)[::2],
        torch.randn(5, 1).expand(5, 12),
        torch.randn(0, 12),
    ],
    ids=["turned", "one row", "more dimensions", "one dimension", "every other row", "repeated", "no rows"],
)
def test_what_lies_otherwise_is_torchs(x: torch.Tensor, clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    model, plain = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))
    model.send(clinic)
    found = model(x.send(clinic))  # type: ignore[attr-defined]  # the hook's
    found.sum().backward()
    expected = plain(x)
    expected.sum().backward()
    same(found, expected.detach())
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        same(one.grad, other.grad)


def test_a_view_of_a_column(clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    """Rows that begin within their storage: the flat view of them begins there too."""
    model, plain = twins(mlp)
    model.send(clinic)
    x = torch.randn(20, 3, 4)
    column = x.send(clinic)  # type: ignore[attr-defined]  # the hook's
    for start in (0, 5, 10, 0, 15):
        for one in (model, plain):
            one.zero_grad()
        found, expected = model(column[start : start + 5]), plain(x[start : start + 5])
        same(found, expected.detach())
        found.sum().backward()
        expected.sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            same(one.grad, other.grad)
        clinic.session.wait()
    assert chains


def test_settings_may_change_between_calls(clinic: hc.VirtualWorker) -> None:
    model, plain = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3)))
    model.send(clinic)
    x = torch.randn(5, 12)
    for approximate in ("none", "tanh", "none"):
        model[1].approximate = plain[1].approximate = approximate
        same(model(x.send(clinic)), plain(x).detach())  # type: ignore[attr-defined]  # the hook's


def test_frozen_parameters(clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    model, plain = twins(mlp)
    for frozen in ([1], [3], [1, 3]):
        for one in (model, plain):
            for at in (1, 3):
                for p in one[at].parameters():
                    p.requires_grad_(at not in frozen)
        compare(model, plain, torch.randn(5, 3, 4), clinic)
        compare(model, plain, torch.randn(5, 3, 4), clinic, needs_x=False)
    assert chains


def test_without_gradients(clinic: hc.VirtualWorker) -> None:
    model, plain = twins(mlp)
    model.send(clinic)
    x = torch.randn(5, 3, 4)
    away = x.send(clinic)  # type: ignore[attr-defined]  # the hook's
    with torch.no_grad():
        found = model(away)
    assert not found.requires_grad
    same(found, plain(x).detach())
    with torch.inference_mode():
        same(model(away), plain(x).detach())


def test_gradients_of_gradients(clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    """They have a graph of torch's own."""
    model, plain = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3), nn.Sigmoid()))
    model.send(clinic)
    x = torch.randn(5, 12)
    away, here = x.send(clinic).requires_grad_(), x.clone().requires_grad_()  # type: ignore[attr-defined]  # the hook's
    for _ in range(2):
        results = []
        for one, given in ((model, away), (plain, here)):
            one.zero_grad()
            (grad,) = torch.autograd.grad(one(given).square().sum(), given, create_graph=True)
            (grad.norm(dim=1) - 1).square().mean().backward()
            results.append([grad.detach(), *[p.grad for p in one.parameters()]])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(home(found), expected)
        given = None
    assert chains


def test_gradients_of_some(clinic: hc.VirtualWorker) -> None:
    model, plain = twins(mlp)
    model.send(clinic)
    x = torch.randn(5, 3, 4)
    away = model(x.send(clinic)).sum()  # type: ignore[attr-defined]  # the hook's
    here = plain(x).sum()
    for _ in range(2):
        wanted = [
            torch.autograd.grad(out, [m[3].bias, m[1].weight], retain_graph=True)
            for out, m in ((away, model), (here, plain))
        ]
        for one, other in zip(*wanted, strict=True):
            same(one, other)


def test_a_written_value_is_noticed(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(mlp)
    model.send(clinic)
    loss = model(torch.randn(5, 12, 1).send(clinic)).sum()  # type: ignore[attr-defined]  # the hook's
    with torch.no_grad():
        model[3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_walked_once(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(mlp)
    model.send(clinic)
    for _ in range(3):
        model.zero_grad()
        loss = model(torch.randn(5, 12, 1).send(clinic)).sum()  # type: ignore[attr-defined]  # the hook's
        loss.backward()
        clinic.session.wait()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        clinic.session.wait()


def test_a_chain_that_moved(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(mlp)
    model.send(clinic)
    loss = model(torch.randn(5, 12, 1).send(clinic)).sum()  # type: ignore[attr-defined]  # the hook's
    model.get()
    with pytest.raises(UsageError, match="has moved"):
        loss.backward()


def test_a_wrong_shape_is_torchs_own_error(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(mlp)
    model.send(clinic)
    x = torch.randn(5, 7, 2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"5, 14|5x14"):
            model(x.send(clinic))  # type: ignore[attr-defined]  # the hook's


def test_a_copy_is_its_own(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(mlp)
    model.send(clinic)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].bias.zero_()
        other[3].weight.zero_()
    x = torch.randn(5, 12, 1).send(clinic)  # type: ignore[attr-defined]  # the hook's
    assert torch.equal(home(other(x)), torch.zeros(5, 3))
    assert not torch.equal(home(model(x)), torch.zeros(5, 3))


def test_a_loop_with_every_kind_of_step(clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    """Training, evaluation and gradients that add up, in any order, over one model."""
    draw = random.Random(0)
    model, plain = twins(mlp)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, plain)]
    model.send(clinic)
    for number in range(40):
        x, y = torch.randn(6, 3, 4), torch.randint(0, 3, (6,))
        kind = draw.choice(["train", "train", "train", "evaluate", "add up", "retain"])
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            xs, ys = (x.send(clinic), y.send(clinic)) if m is model else (x, y)  # type: ignore[attr-defined]  # the hook's
            if kind == "evaluate":
                with torch.no_grad():
                    m(xs)
                continue
            loss = F.cross_entropy(m(xs), ys)
            loss.backward(retain_graph=kind == "retain")
            if kind == "retain":
                loss.backward()
            if kind == "train":
                optimizer.step()
                optimizer.zero_grad()
        if number % 7 == 0:
            model.get().send(clinic)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            same(one, other.detach())
    assert chains


@pytest.mark.parametrize(
    "write",
    [
        lambda m, x: m[0].bias.add_(0.1),  # which no gradient reads
        lambda m, x: m[2].bias.mul_(2),
    ],
)
def test_what_no_gradient_reads_may_be_written(write: Callable[[Any, Any], Any], clinic: hc.VirtualWorker) -> None:
    model, plain = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)))
    model.send(clinic)
    x = torch.randn(5, 12)
    for _ in range(3):
        for m, given in ((model, x.send(clinic)), (plain, x)):  # type: ignore[attr-defined]  # the hook's
            m.zero_grad()
            out = m(given)
            with torch.no_grad():
                write(m, given)
            out.square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            same(one.grad, other.grad)


def test_data_that_is_replaced_is_an_error(clinic: hc.VirtualWorker, chains: list[Any]) -> None:
    """Torch computes with what was saved, which is not there any more."""
    model, _ = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)))
    model.send(clinic)
    x = torch.randn(5, 12).send(clinic)  # type: ignore[attr-defined]  # the hook's
    for _ in range(4):
        model.zero_grad()
        out = model(x)
        model[2].weight.data = model[2].weight.data * 1.5
        with pytest.raises(UsageError, match=r"\.data of a parameter"):
            out.square().sum().backward()
        clinic.session.wait()
    assert chains


def test_a_result_that_is_kept_keeps_nothing_of_a_visit(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)))
    x = torch.randn(5, 12).send(clinic)  # type: ignore[attr-defined]  # the hook's
    for _ in range(3):
        model.send(clinic)
        there = {parameter._slot.id for parameter in model.parameters()}
        out = model(x)
        out.sum().backward()
        model.get()
        assert there.isdisjoint(clinic._objects)
        assert out.id_at_location in clinic._objects


def test_a_graph_that_was_freed_is_not_walked_by_a_phrase(clinic: hc.VirtualWorker) -> None:
    model, _ = twins(lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)))
    model.send(clinic)
    x = torch.randn(5, 12).send(clinic)  # type: ignore[attr-defined]  # the hook's
    for retain in (True, True, True, False):
        out = model(x)
        one, two = out.sum(), (out * 2).sum()
        model.zero_grad()
        one.backward(retain_graph=retain)
        model.zero_grad()
        if retain:
            two.backward()
        else:
            with pytest.raises(RuntimeError, match="second time"):
                two.backward()
        clinic.session.wait()


def test_a_forward_that_is_replaced_for_all(clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = twins(mlp)
    model.send(clinic)
    x = torch.randn(5, 3, 4)
    plainly = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda part, given: plainly(part, given) * 2)
    same(model(x.send(clinic)), plain(x).detach())  # type: ignore[attr-defined]  # the hook's


def test_a_chain_that_came_home_in_pieces_is_torchs_again(clinic: hc.VirtualWorker) -> None:
    model, plain = twins(mlp)
    model.send(clinic)
    for layer in model:
        if list(layer.parameters()):
            layer.get()
    x = torch.randn(5, 3, 4)
    same(model(x), plain(x).detach())
    assert "forward" not in model.__dict__
    nothing = nn.Sequential(nn.ReLU(), nn.Tanh())
    nothing.send(clinic)  # type: ignore[operator]  # as above
    assert "forward" not in nothing.__dict__


def test_inference_mode_is_what_torch_does(clinic: hc.VirtualWorker) -> None:
    """Torch's own kernels, whatever decompositions there are in Python: dropout that does nothing gives its input."""
    with torch.inference_mode():
        for _ in range(2):
            x, y = torch.ones(3).send(clinic), torch.ones(3)  # type: ignore[attr-defined]  # as above
            for given in (x, y):
                F.dropout(given, 0.5, False).mul_(2)
            same(x, y)
