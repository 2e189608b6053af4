"""Every optimizer of torch, unmodified, while the model travels: equal to local training bit for bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import housecall as hc

Make = Callable[[Any], optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, Nesterov, weight decay": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, foreach": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p),
    "Adam, amsgrad": lambda p: optim.Adam(p, amsgrad=True, weight_decay=0.01),
    "Adam, foreach": lambda p: optim.Adam(p, foreach=True),
    "Adam, fused": lambda p: optim.Adam(p, fused=True),
    "AdamW": lambda p: optim.AdamW(p),
    "AdamW, fused": lambda p: optim.AdamW(p, fused=True),
    "Adamax": lambda p: optim.Adamax(p),
    "Adagrad": lambda p: optim.Adagrad(p),
    "Adagrad, fused": lambda p: optim.Adagrad(p, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p),
    "ASGD": lambda p: optim.ASGD(p),
    "Adafactor": lambda p: optim.Adafactor(p),
    "LBFGS": lambda p: optim.LBFGS(p, max_iter=4),
    "LBFGS, line search": lambda p: optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "Muon": lambda p: optim.Muon([q for q in p if q.dim() == 2]),
    "NAdam": lambda p: optim.NAdam(p),
    "RAdam": lambda p: optim.RAdam(p),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p),
}


def test_every_optimizer_of_torch_is_here() -> None:
    known = {name.split(",")[0] for name in OPTIMIZERS}
    # SparseAdam takes sparse gradients only, and sparse layouts do not travel.
    found = {name for name in dir(optim) if name[0].isupper()} - {"Optimizer", "SparseAdam"}
    assert found == known


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 6, generator=generator), torch.randint(0, 3, (5,), generator=generator)) for _ in range(count)
    ]


def train(
    model: nn.Module, make: Make, places: list[hc.VirtualWorker | None], scheduler: Any = None
) -> tuple[list[float], optim.Optimizer]:
    optimizer = make(list(model.parameters()))
    schedule = scheduler(optimizer) if scheduler else None
    losses = []
    for place, (x, y) in zip(places, batches(len(places)), strict=True):
        if place is not None:
            model.send(place)
            x, y = x.send(place), y.send(place)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)  # noqa: B023  # called within the iteration
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
        if schedule is not None:
            schedule.step()
        if place is not None:
            model.get()
    return [float(loss.detach()) for loss in losses], optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_travelling_model_equals_local_training(name: str, schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    local, remote = network(), network()
    places: list[hc.VirtualWorker | None] = [west, grape, west, west, None, grape, grape, west]
    expected, _ = train(local, OPTIMIZERS[name], [None] * len(places))
    found, _ = train(remote, OPTIMIZERS[name], places)
    assert found == expected
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert torch.equal(a, b)


FLAGS = ("fused", "foreach", "capturable", "differentiable")
FLAGGED = [
    (kind, flag)
    for kind in sorted({name.split(",")[0] for name in OPTIMIZERS})
    for flag in FLAGS
    if flag in inspect.signature(getattr(optim, kind)).parameters
]


@pytest.mark.parametrize(("kind", "flag"), FLAGGED)
def test_what_a_setting_does_here_it_does_there(kind: str, flag: str, clinic: hc.VirtualWorker) -> None:
    """Training equal to local, or torch's own refusal, in its own words."""

    def outcome(place: hc.VirtualWorker | None) -> Any:
        model = network()
        try:
            train(model, lambda p: getattr(optim, kind)(p, **{flag: True}), [place] * 4)
        except Exception as error:
            return type(error), str(error)
        return model.state_dict()

    expected, found = outcome(None), outcome(clinic)
    assert isinstance(expected, tuple) == (flag in ("capturable", "differentiable"))
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_fused_step_does_not_wait(clinic: hc.VirtualWorker) -> None:
    model = network().send(clinic)
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
    waits = clinic.session.waits
    for x, y in batches(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x.send(clinic)), y.send(clinic)).backward()
        optimizer.step()
    assert clinic.session.waits == waits


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "StepLR": lambda o: optim.lr_scheduler.StepLR(o, 2),
    "OneCycleLR": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CosineAnnealingLR": lambda o: optim.lr_scheduler.CosineAnnealingLR(o, 5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    local, remote = network(), network()
    expected, _ = train(local, OPTIMIZERS["SGD, momentum"], [None] * 6, SCHEDULERS[name])
    found, _ = train(remote, OPTIMIZERS["SGD, momentum"], [*schools] * 3, SCHEDULERS[name])
    assert found == expected
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reduce_on_plateau_takes_a_pointer(clinic: hc.VirtualWorker) -> None:
    model = network().send(clinic)
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optim.SGD(model.parameters(), lr=0.1), patience=0)
    schedule.step(torch.tensor(1.0).send(clinic))
    schedule.step(torch.tensor(2.0).send(clinic))
    assert schedule.get_last_lr() == pytest.approx([0.01])


def test_state_moves_only_when_it_must(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    model = network()
    _, optimizer = train(model, OPTIMIZERS["SGD, momentum"], [west, west])
    assert {state["momentum_buffer"].location for state in optimizer.state.values()} == {west}
    model.send(grape)
    optimizer.zero_grad()
    waits = west.session.waits
    x, y = (tensor.send(grape) for tensor in batches(1)[0])
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert west.session.waits == waits + 1  # one round trip for all the buffers together
    assert {state["momentum_buffer"].location for state in optimizer.state.values()} == {grape}


def test_optimizer_state_can_be_saved_at_home(clinic: hc.VirtualWorker) -> None:
    model = network()
    _, optimizer = train(model, OPTIMIZERS["Adam"], [clinic, clinic, None])
    again = optim.Adam(model.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
