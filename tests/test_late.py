"""Gradients that come home late: whatever is done with one is what would be done with a plain gradient."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from at_once import at_once
from torch import nn, optim

import housecall as hc
from housecall.pointers import module
from housecall.pointers.late import LateTensor
from housecall.testing import World


def backward(model: Any, x: torch.Tensor) -> Any:
    model(x).square().sum().backward()
    return model


def local() -> Any:
    torch.manual_seed(0)
    return backward(nn.Linear(3, 2), torch.ones(4, 3))


def late(worker: Any) -> Any:
    """The same, where the gradients are still at the worker."""
    torch.manual_seed(0)
    model: Any = nn.Linear(3, 2).send(worker)  # type: ignore[operator]  # the hook's
    backward(model, torch.ones(4, 3).send(worker)).get()  # type: ignore[attr-defined]  # the hook's
    assert type(model.weight.grad) is LateTensor
    return model


def written(model: Any, write: Callable[[Any], object]) -> Any:
    write(model.weight.grad)
    return model.weight.grad.clone()


def torch_save(tensor: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save(tensor, file)
    return torch.load(io.BytesIO(file.getvalue()))


def stepped(model: Any, make: Callable[..., optim.Optimizer]) -> torch.Tensor:
    make(list(model.parameters())).step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def added_up(model: Any) -> torch.Tensor:
    return backward(model, torch.ones(4, 3)).weight.grad.clone()


def clipped(model: Any) -> torch.Tensor:
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return torch.cat([total.view(1), model.weight.grad.flatten(), model.bias.grad])


def into(model: Any) -> torch.Tensor:
    return torch.zeros(2, 3).copy_(model.weight.grad)


USES: dict[str, Callable[[Any], Any]] = {
    "read": lambda m: m.weight.grad + 0,
    "printed": lambda m: torch.tensor(list(repr(m.weight.grad).encode())),
    "formatted": lambda m: float(f"{m.bias.grad[0]:.3f}"),
    "add_": lambda m: written(m, lambda g: g.add_(1)),
    "element": lambda m: written(m, lambda g: g.__setitem__(0, 5)),
    "out=": lambda m: written(m, lambda g: torch.add(torch.ones(2, 3), 1, out=g)),
    "copied into": lambda m: written(m, lambda g: g.copy_(torch.ones(2, 3))),
    "copied from": into,
    "its data": lambda m: written(m, lambda g: g.data.mul_(3)),
    "new data": lambda m: written(m, lambda g: setattr(g, "data", torch.ones(2, 3))),
    "numpy": lambda m: torch.from_numpy(np.asarray(m.weight.grad)),
    "pickled": lambda m: pickle.loads(pickle.dumps(m.weight.grad)),
    "saved": lambda m: torch_save(m.weight.grad),
    "deep copy": lambda m: copy.deepcopy(m.weight.grad),
    "copy": lambda m: copy.copy(m.weight.grad),
    "list": lambda m: m.weight.grad.tolist(),
    "rows": lambda m: torch.stack(list(m.weight.grad)),
    "in a list": lambda m: torch.cat([m.weight.grad, torch.ones(1, 3)]),
    "as an argument": lambda m: torch.full((2, 3), 2.0).mul(m.weight.grad),
    "other dtype": lambda m: m.weight.grad.to(torch.float64),
    "foreach": lambda m: torch.stack(torch._foreach_norm([m.weight.grad, m.bias.grad])),
    "to a vector": lambda m: torch.nn.utils.parameters_to_vector([p.grad for p in m.parameters()]),
    "transposed": lambda m: m.weight.grad.T,
    "clipped": clipped,
    "added up": added_up,
    "zeroed": lambda m: (m.zero_grad(set_to_none=False), m.weight.grad.clone())[1],
    "SGD": lambda m: stepped(m, lambda p: optim.SGD(p, lr=0.1, momentum=0.9)),
    "Adam": lambda m: stepped(m, optim.Adam),
    "Adam, foreach": lambda m: stepped(m, lambda p: optim.Adam(p, foreach=True)),
    "Adam, fused": lambda m: stepped(m, lambda p: optim.Adam(p, fused=True)),
}


@pytest.mark.parametrize("name", USES)
def test_a_late_gradient_is_used_as_a_plain_one(name: str, clinic: hc.VirtualWorker) -> None:
    use = USES[name]
    found, expected = use(late(clinic)), use(local())
    if not isinstance(expected, torch.Tensor):
        assert found == expected
        return
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


def test_what_is_known_without_a_value_waits_for_nothing(clinic: hc.VirtualWorker) -> None:
    grad = late(clinic).weight.grad
    waits = clinic.session.waits
    assert (grad.shape, grad.dtype, grad.is_leaf, grad.requires_grad) == ((2, 3), torch.float32, True, False)
    assert (grad.size(0), grad.stride(), grad.dim(), grad.numel(), len(grad)) == (2, (3, 1), 2, 6, 2)
    assert clinic.session.waits == waits


def test_all_of_a_visit_come_in_one_round_trip_when_one_is_looked_at(clinic: hc.VirtualWorker) -> None:
    model = late(clinic)
    waits = clinic.session.waits
    assert model.weight.grad.sum() == local().weight.grad.sum()
    assert model.bias.grad.sum() == local().bias.grad.sum()
    assert clinic.session.waits == waits + 1
    assert model.bias.grad.slot is None
    gc.collect()
    assert clinic._objects == {}


def test_what_nobody_looks_at_never_comes(clinic: hc.VirtualWorker) -> None:
    model = late(clinic)
    waits, fetched = clinic.session.waits, clinic.session.bytes_fetched
    model.zero_grad()
    gc.collect()
    assert (clinic.session.waits, clinic.session.bytes_fetched) == (waits, fetched)
    assert clinic._objects == {}


def test_it_goes_back_without_having_come(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    for other in schools:
        model, expected = late(schools[0]), local()
        waits = schools[0].session.waits
        model.send(other)
        assert schools[0].session.waits == waits  # not even to another worker, until something uses it there
        backward(model, torch.ones(4, 3).send(other)).get()  # type: ignore[attr-defined]  # the hook's
        assert torch.equal(model.weight.grad + 0, backward(expected, torch.ones(4, 3)).weight.grad)


def test_a_gradient_that_was_written_goes_back_as_written(clinic: hc.VirtualWorker) -> None:
    model = late(clinic)
    model.weight.grad.fill_(7)
    model.send(clinic)
    assert model.weight.grad.copy().get().unique().tolist() == [7]
    model.get()


def test_it_comes_before_its_worker_is_closed() -> None:
    gone = hc.VirtualWorker(id="gone")
    model = late(gone)
    gone.session.close()
    assert torch.equal(model.weight.grad + 0, local().weight.grad)


def test_what_was_cleared_says_so(clinic: hc.VirtualWorker) -> None:
    model = late(clinic)
    clinic.clear()
    with pytest.raises(hc.OperatorError, match="it was dropped"):
        _ = model.weight.grad + 0
    assert model.weight.grad.shape == (2, 3)


def test_over_the_wire_and_when_the_worker_is_lost() -> None:
    with World() as world:
        assert torch.equal(late(world.worker).weight.grad + 0, local().weight.grad)
        lost = late(world.worker)
        world.lapse()
        with pytest.raises(hc.WorkerGone, match="lease ended"):
            _ = lost.weight.grad + 0
        assert lost.weight.grad.shape == (2, 3)


def test_four_threads_look_at_once(clinic: hc.VirtualWorker) -> None:
    model, found = late(clinic), []
    at_once(*[lambda: found.append(model.weight.grad.sum().item())] * 4)
    assert found == [local().weight.grad.sum().item()] * 4


def test_a_gradient_that_somebody_else_has_stays_a_pointer(clinic: hc.VirtualWorker) -> None:
    model: Any = nn.Linear(3, 2).send(clinic)  # type: ignore[operator]  # the hook's
    backward(model, torch.ones(4, 3).send(clinic))  # type: ignore[attr-defined]  # the hook's
    held, alone = model.weight.grad, id(model.bias.grad)
    model.get()
    assert type(held) is hc.PointerTensor
    assert type(model.weight.grad) is LateTensor
    assert torch.equal(held.copy().get(), model.weight.grad.clone())
    assert id(model.bias.grad) == alone  # nobody would have seen the difference
    assert type(model.bias.grad) is LateTensor


def test_a_gradient_goes_back_as_it_came(clinic: hc.VirtualWorker) -> None:
    model = late(clinic)
    there = model.weight.grad.slot.id
    held = model.bias.grad
    model.send(clinic)
    assert type(model.weight.grad) is hc.PointerTensor
    assert model.weight.grad.id_at_location == there
    assert type(held) is LateTensor  # somebody has it
    assert torch.equal(held.clone(), local().bias.grad)
    expected = local()
    backward(expected, torch.ones(4, 3))
    backward(model, torch.ones(4, 3).send(clinic))  # type: ignore[attr-defined]  # the hook's
    model.get()
    assert torch.equal(model.weight.grad.clone(), expected.weight.grad)
    assert torch.equal(model.bias.grad.clone(), expected.bias.grad)
    clinic.session.close()  # brings what is left of earlier visits, and none that went back


def test_a_send_that_fails_leaves_late_gradients(clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = late(clinic)
    real, count = module._swap, []

    def swap(tensor: Any, other: Any) -> None:
        count.append(1)
        if len(count) == 2:
            raise hc.UsageError("torch holds it elsewhere")
        real(tensor, other)

    monkeypatch.setattr(module, "_swap", swap)
    with pytest.raises(hc.UsageError, match="elsewhere"):
        model.send(clinic)
    monkeypatch.setattr(module, "_swap", real)
    expected = local()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert type(one.grad) is LateTensor
        assert torch.equal(one.grad.clone(), other.grad)
