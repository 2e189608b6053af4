"""What came home and has not changed is not sent back; whatever may have changed is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import housecall as hc
from housecall.testing import World
from housecall.wire.messages import Put


@pytest.fixture
def world() -> Iterator[World]:
    made = World("clinic")
    yield made
    made.close()


def puts(world: World, act: Callable[[], object]) -> int:
    """How many tensors travel to the worker while `act` is done."""
    session = world.worker.session
    sent, original = [], session.transport.send

    def send(frame: object) -> None:
        sent.extend(message for message in frame.messages if isinstance(message, Put))  # type: ignore[attr-defined]
        original(frame)  # type: ignore[arg-type]

    session.transport.send = send  # type: ignore[method-assign]
    try:
        act()
        session.wait()
    finally:
        session.transport.send = original  # type: ignore[method-assign]
    return len(sent)


LARGE = 2000


def test_an_unchanged_value_goes_back_for_nothing(world: World) -> None:
    x = torch.randn(LARGE)
    home = x.send(world.worker).get()
    back: list[torch.Tensor] = []
    assert puts(world, lambda: back.append(home.send(world.worker))) == 0
    back[0].add_(1)
    assert torch.equal(home, x)  # the two are not one
    assert torch.equal(back[0].get(), x + 1)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.data.add_(1),
        lambda t: t.detach()[3:5].zero_(),
        lambda t: t.view(-1).numpy().__setitem__(7, 42.0),
        lambda t: t.copy_(torch.ones(LARGE)),
        lambda t: t.set_(torch.ones(LARGE)),
    ],
    ids=["in place", "data", "a view", "numpy", "copy_", "set_"],
)
def test_a_value_that_was_written_travels(world: World, write: Callable[[torch.Tensor], object]) -> None:
    home = torch.randn(LARGE).send(world.worker).get()
    write(home)
    assert torch.equal(home.clone().send(world.worker).get(), home)
    home = torch.randn(LARGE).send(world.worker).get()
    write(home)
    back: list[torch.Tensor] = []
    assert puts(world, lambda: back.append(home.send(world.worker))) == 1
    assert torch.equal(back[0].get(), home)


def test_a_view_or_another_shape_travels(world: World) -> None:
    home = torch.randn(LARGE).send(world.worker).get()
    for other in (home[1:], home[:1999], home.view(2, 1000), home[::2]):
        back: list[torch.Tensor] = []
        assert puts(world, lambda o=other, b=back: b.append(o.send(world.worker))) == 1  # type: ignore[misc]
        assert torch.equal(back[0].copy().get(), other)  # type: ignore[attr-defined]


def test_sending_twice_makes_two_values(world: World) -> None:
    home = torch.randn(LARGE).send(world.worker).get()
    one = home.send(world.worker)
    two = home.send(world.worker)
    one.zero_()
    assert torch.equal(two.get(), home)
    assert torch.equal(one.get(), torch.zeros(LARGE))


def test_a_slot_that_is_shared_is_not_taken_back(world: World) -> None:
    x = torch.randn(LARGE).send(world.worker)
    alias = x.detach()
    home = x.get()
    back = home.send(world.worker)
    back.zero_()
    assert torch.equal(alias.get(), home)  # type: ignore[attr-defined]


def test_a_small_value_between_changes_nothing(world: World) -> None:
    model = nn.Linear(100, 100)
    model.send(world.worker)
    loss = model(torch.ones(1, 100).send(world.worker)).sum()
    loss.backward()  # the graph points at the weights
    model.get()
    loss.get()
    model.zero_grad()
    assert puts(world, lambda: model.send(world.worker)) <= 1  # the bias is small, and travels
    model.get()


def test_a_model_trains_alike(world: World) -> None:
    torch.manual_seed(0)
    local, remote = nn.Linear(64, 64), nn.Linear(64, 64)
    remote.load_state_dict(local.state_dict())
    optimizers = [torch.optim.Adam(model.parameters()) for model in (local, remote)]
    for step in range(6):
        x = torch.randn(8, 64)
        remote.send(world.worker)
        optimizers[1].zero_grad()
        remote(x.send(world.worker)).square().mean().backward()
        optimizers[1].step()
        remote.get()
        optimizers[0].zero_grad()
        local(x).square().mean().backward()
        optimizers[0].step()
        if step == 3:  # averaged at home, as rounds do
            for model in (local, remote):
                model.weight.data.mul_(0.5)
    assert torch.equal(local.weight, remote.weight)


def test_clear_lets_go(world: World) -> None:
    home = torch.randn(LARGE).send(world.worker).get()
    world.worker.clear()
    assert world.slots == 0
    assert torch.equal(home.send(world.worker).get(), home)


def test_at_most_one_value_of_each_is_kept(world: World) -> None:
    for _ in range(5):
        torch.randn(LARGE).send(world.worker).get()
    world.worker.session.wait()
    assert world.slots == 1


def test_a_virtual_worker_keeps_nothing() -> None:
    clinic = hc.VirtualWorker(id="clinic")
    torch.randn(LARGE).send(clinic).get()
    assert clinic._objects == {}
