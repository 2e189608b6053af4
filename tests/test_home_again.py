"""A module whose visit did not come about, or that lost its worker, is at home as if it had not left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import housecall as hc
from housecall.errors import UsageError, WorkerGone
from housecall.pointers.session import Session
from housecall.testing import World


@pytest.fixture
def clinic() -> hc.VirtualWorker:
    return hc.VirtualWorker(id="clinic")


def graph(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model(torch.randn(4, 3)).sum()  # type: ignore[no-any-return]  # a tensor


def test_after_a_send_that_failed_graphs_of_before_and_after_hold(
    clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = nn.Linear(3, 2)
    loss = graph(model)
    put = Session.put

    def fails(session: Session, tensor: torch.Tensor, site: Any = None) -> Any:
        if tensor.dim() == 1:  # the bias, behind the weight
            raise UsageError("too large")
        return put(session, tensor, site)

    monkeypatch.setattr(Session, "put", fails)
    with pytest.raises(UsageError, match="too large"):
        model.send(clinic)
    assert type(model.weight) is type(model.bias) is nn.Parameter
    loss.backward()
    first = model.weight.grad.clone()
    graph(model).backward()
    assert torch.equal(model.weight.grad, 2 * first)
    assert not clinic._objects


def test_after_the_worker_was_lost_graphs_of_before_and_after_hold() -> None:
    model: Any = nn.Linear(3, 2)
    loss = graph(model)
    with World() as world:
        model.send(world.worker)
        world.worker.session.wait()
        world.restart()
        with pytest.raises(WorkerGone, match="The module is home"):
            model.get()
    loss.backward()
    first = model.weight.grad.clone()
    graph(model).backward()
    assert torch.equal(model.weight.grad, 2 * first)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")
def test_a_traced_module_is_looked_through(clinic: hc.VirtualWorker) -> None:
    """torch.jit's modules keep what they hold elsewhere than others."""
    traced = torch.jit.trace(nn.Linear(3, 2), torch.randn(1, 3))
    model: Any = nn.Sequential(traced, nn.Linear(2, 2))
    assert hc.location_of(model) is None
    model.send(clinic)
    assert hc.location_of(model) is clinic
    model.get()
    assert hc.location_of(model) is None
