"""Devices are the worker's: a caller without one can name it, and a worker without it says so."""

from __future__ import annotations

import pytest
import torch

import housecall as hc
from housecall.errors import UsageError
from housecall.program.call import Call, Symbol
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Frame, Put
from housecall.worker.device import at_home, home
from housecall.worker.worker import Worker

NO_CUDA = not torch.cuda.is_available()


@pytest.mark.skipif(not NO_CUDA, reason="this machine has a CUDA device")
@pytest.mark.parametrize("move", [lambda x: x.to("cuda"), lambda x: x.to(device="cuda:0"), lambda x: x.cuda()])
def test_a_worker_without_the_device_says_so(clinic: hc.VirtualWorker, move: object) -> None:
    x = torch.ones(3).send(clinic)
    moved = move(x)  # type: ignore[operator]
    assert isinstance(moved, hc.PointerTensor)
    with pytest.raises(hc.OperatorError, match="_to_copy") as caught:
        moved.get()
    assert "test_devices.py" in caught.value.site
    assert torch.equal(x.get(), torch.ones(3))


def test_to_cpu_and_to_a_dtype_are_as_ever(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic)
    assert x.to("cpu") is x
    assert x.to() is x
    assert x.to(torch.device("cpu")) is x
    assert x.to("cpu", torch.float64).get().dtype is torch.float64
    assert x.to(torch.int64).get().dtype is torch.int64
    assert x.to(device="cpu", dtype=torch.float16).get().dtype is torch.float16
    assert x.to(torch.ones(1, dtype=torch.int32).send(clinic)).get().dtype is torch.int32


@pytest.mark.skipif(not NO_CUDA, reason="this machine has a CUDA device")
def test_a_home_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        home("cuda")
    with pytest.raises(UsageError, match="no CUDA device"):
        Worker("clinic", device="cuda:1")


def test_at_home_cpu_means_home() -> None:
    """With torch's meta device as the home: it holds no values, but says where they would be."""
    meta = torch.device("meta")
    call = Call("new_zeros.default", (Ref(1),), {"device": Symbol("device", "cpu"), "pin_memory": None}, (2,))
    other = Call("_to_copy.default", (Ref(1),), {"device": Symbol("device", "cuda")}, (3,))
    put, placed, left = at_home(Frame(4, (Put(1, share(torch.ones(2))), call, other)), meta).messages
    assert put.value.data.device == meta  # type: ignore[union-attr]
    assert placed.kwargs["device"] == Symbol("device", "meta")  # type: ignore[union-attr]
    assert left == other


@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_a_worker_with_a_gpu_computes_on_it() -> None:
    worker = Worker("clinic", device="cuda")
    session = worker.open("alice")
    session.handle(Frame(1, (Put(1, share(torch.ones(3))), Call("mul.Tensor", (Ref(1), 2.0), {}, (2,)))))
    assert session.store[2].is_cuda
    assert torch.equal(session.store[2].cpu(), torch.full((3,), 2.0))


@pytest.mark.skipif(NO_CUDA, reason="needs a CUDA device")
def test_training_on_a_gpu_comes_home() -> None:
    with hc.LocalCluster(1, device="cuda") as (worker,):
        model = torch.nn.Linear(3, 2).send(worker)
        x = torch.randn(4, 3).send(worker)
        model(x).square().sum().backward()
        assert not model.get().weight.is_cuda
