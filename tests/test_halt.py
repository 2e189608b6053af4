"""After a failure nothing is changed in place until its caller has heard: a bad batch is as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import housecall as hc
from housecall.pointers import trace
from housecall.testing import World
from housecall.types import Ref
from housecall.wire.messages import Array, Call, Fetch, Frame, Heard, Put, Value
from housecall.worker.limits import UNLIMITED, Limits
from housecall.worker.worker import Worker, WorkerSession

# -- at the door ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["free", "metered"])
def door(request: pytest.FixtureRequest) -> WorkerSession:
    """A session that holds ones at 1 and 2, and positions that are not there at 3."""
    session = Worker("clinic", UNLIMITED if request.param == "free" else Limits()).open("me")
    values = {1: torch.ones(2), 2: torch.ones(2), 3: torch.tensor([9])}
    session.handle(Frame(1, tuple([Put(ref, Array(None, found)) for ref, found in values.items()])))
    return session


FAILS = Call("index_select.default", (Ref(1), 0, Ref(3)), {}, (10,))
WRITES = Call("add_.Tensor", (Ref(2), Ref(1)), {}, ())


def value(door: WorkerSession, frame: int, ref: int) -> Any:
    (found,) = door.handle(Frame(frame, (Fetch((ref,)),))).results
    assert isinstance(found, Value)
    return found.arrays[0].data.tolist()  # type: ignore[union-attr]  # it did not fail


def test_a_write_after_a_failure_is_not_done_and_said(door: WorkerSession) -> None:
    reply = door.handle(Frame(2, (FAILS, WRITES)))
    assert [(failure.index, failure.writes) for failure in reply.failures] == [
        (0, False),
        (0, True),
    ]  # told twice
    assert reply.undone == ((1, None),)
    assert value(door, 3, 2) == [1, 1]


def test_what_changes_nothing_is_done(door: WorkerSession) -> None:
    reply = door.handle(Frame(2, (FAILS, Call("neg.default", (Ref(1),), {}, (11,)))))
    assert len(reply.failures) == 1
    assert value(door, 3, 11) == [-1, -1]


def test_it_lasts_until_the_caller_has_heard_of_that_very_frame(door: WorkerSession) -> None:
    door.handle(Frame(2, (FAILS,)))
    assert door.handle(Frame(3, (WRITES,))).undone  # she issued it before she could hear
    assert door.handle(Frame(4, (Heard(1), WRITES))).undone  # of another frame
    assert door.handle(Frame(5, (Heard(2), WRITES))).undone == ()
    assert value(door, 6, 2) == [2, 2]


def test_the_first_failure_is_the_one_to_hear_of(door: WorkerSession) -> None:
    door.handle(Frame(2, (FAILS,)))
    door.handle(Frame(3, (Call("index_select.default", (Ref(1), 0, Ref(3)), {}, (11,)),)))
    assert door.handle(Frame(4, (Heard(2), WRITES))).undone == ()


def test_a_new_failure_halts_again(door: WorkerSession) -> None:
    door.handle(Frame(2, (FAILS,)))
    again = Call("index_select.default", (Ref(1), 0, Ref(3)), {}, (11,))
    assert door.handle(Frame(3, (Heard(2), WRITES, again, WRITES))).undone == ((3, None),)
    assert value(door, 4, 2) == [2, 2]


# -- as a scientist sees it ---------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p),
    "Adam, foreach": lambda p: optim.Adam(p, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.5),
}
BAD = 2  # the batch whose labels are out of range


def train(place: Any, make: Callable[[Any], optim.Optimizer], reads: bool) -> tuple[list[float], int]:
    """Six batches, one of which is bad, by someone who goes on after an error; the parameters, and the errors."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = make(list(model.parameters()))
    generator, errors = torch.Generator().manual_seed(1), 0
    if place is not None:
        model.send(place)
    for number in range(6):
        x, y = torch.randn(5, 3, generator=generator), torch.randint(0, 2, (5,), generator=generator)
        if number == BAD:
            y[0] = 7
        if place is not None:
            x, y = x.send(place), y.send(place)  # type: ignore[attr-defined]  # the hook's
        try:
            optimizer.zero_grad()
            loss = F.nll_loss(F.log_softmax(model(x), 1), y)
            loss.backward()
            optimizer.step()
            if reads:
                loss.item()
        except (IndexError, hc.OperatorError):
            errors += 1
    if place is not None:
        try:
            model.get()
        except hc.OperatorError:  # a write was not done: it is home
            errors += 1
        assert hc.location_of(model) is None
    return [value for p in model.parameters() for value in p.detach().flatten().tolist()], errors


@pytest.mark.parametrize("seen", [0, 1 << 60])  # as runs, and call by call
@pytest.mark.parametrize("how", ["direct", "codec", "metered", "wire"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_batch_is_as_if_it_had_not_been(name: str, how: str, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is read in each batch, as in plain torch, which raises at the loss."""
    monkeypatch.setattr(trace, "SEEN", seen)
    expected, _ = train(None, OPTIMIZERS[name], reads=True)
    if how == "wire":
        with World() as world:
            found, errors = train(world.worker, OPTIMIZERS[name], reads=True)
    else:
        clinic = hc.VirtualWorker(id="clinic", codec=how == "codec")
        if how == "metered":
            clinic.worker.limits = Limits()
            clinic._door._begin_metering()
        found, errors = train(clinic, OPTIMIZERS[name], reads=True)
    assert errors == 1
    assert found == expected


def test_where_nothing_is_read_all_after_the_bad_batch_waits_for_the_caller(clinic: hc.VirtualWorker) -> None:
    found, errors = train(clinic, OPTIMIZERS["Adam"], reads=False)
    assert errors == 1  # at model.get()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, generator = optim.Adam(model.parameters()), torch.Generator().manual_seed(1)
    for _ in range(BAD):
        x, y = torch.randn(5, 3, generator=generator), torch.randint(0, 2, (5,), generator=generator)
        optimizer.zero_grad()
        F.nll_loss(F.log_softmax(model(x), 1), y).backward()
        optimizer.step()
    assert found == [value for p in model.parameters() for value in p.detach().flatten().tolist()]
