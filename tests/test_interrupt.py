"""Ctrl-C wherever Python may look for it: the session is usable, a module is here or there, and every slot counts.

Python raises `KeyboardInterrupt` after a call in C, and as a function begins. A profile function is called at just
these places: at the n-th of them it sends SIGINT to this process, for as many n as there is time for.
"""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

import housecall as hc
from housecall.testing import World
from housecall.transport.memory import MemoryTransport

HERE = os.path.dirname(hc.__file__) + os.sep
X = torch.arange(6.0).view(3, 2)


class Interrupt:
    """SIGINT at the `at`-th place; `left` is 0 or less once it has come."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event in ("c_return", "call") and frame.f_code.co_filename.startswith(HERE):
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

    def during(self, act: Callable[[], None]) -> bool:
        """Whether it came while this was done."""
        sys.setprofile(self)
        try:
            act()
        except KeyboardInterrupt as error:
            traceback.clear_frames(error.__traceback__)
        finally:
            sys.setprofile(None)
        return self.left <= 0


class Scene:
    """A worker with a tensor, another worker, and a module at home."""

    def __init__(self) -> None:
        self.clinic, self.school = hc.VirtualWorker(id="clinic"), hc.VirtualWorker(id="school")
        self.x: Any = X.send(self.clinic)  # type: ignore[attr-defined]  # the hook's
        torch.manual_seed(0)
        self.model: Any = nn.Linear(2, 2)
        self.before = copy.deepcopy(self.model)
        self.trained = False

    def check(self) -> None:
        """All is as it was, what is done now is right, and nothing is left."""
        self.clinic.synchronous = False
        self.clinic.session.wait()
        self.school.session.wait()
        assert torch.equal((self.x * 3).get(), X * 3)
        assert torch.is_grad_enabled()
        if hc.location_of(self.model) is not None:
            self.model.get()
        assert [type(p) for p in self.model.parameters()] == [nn.Parameter] * 2
        if not self.trained:
            for found, expected in zip(self.model.parameters(), self.before.parameters(), strict=True):
                assert torch.equal(found, expected)
        self.model.zero_grad()
        local = copy.deepcopy(self.model)
        local(X).square().sum().backward()
        self.model.send(self.clinic)
        self.model(self.x).square().sum().backward()
        self.model.get()
        assert torch.equal(self.model.weight.grad, local.weight.grad)
        self.model = self.x = None
        gc.collect()
        assert self.clinic._objects == {}
        assert self.school._objects == {}
        assert not self.clinic.session.busy
        assert self.clinic.session.transport._owed == 0


def twice(scene: Scene) -> None:
    scene.trained = True
    scene.model.send(scene.clinic)
    optimizer = optim.SGD(scene.model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        scene.model(scene.x).square().sum().backward()
        optimizer.step()
    scene.model.get()


def known(scene: Scene) -> None:
    scene.model.send(scene.clinic)
    for _ in range(3):
        scene.model.zero_grad()
        scene.model(scene.x).square().sum().backward()
        scene.clinic.session.wait()
    scene.model.get()


def late(scene: Scene) -> None:
    scene.model.send(scene.clinic)
    scene.model(scene.x).square().sum().backward()
    scene.model.get()
    scene.model.weight.grad.sum().item()


def both(scene: Scene) -> None:
    y: Any = X.send(scene.school)  # type: ignore[attr-defined]  # the hook's
    y = y @ y.t()
    z = scene.x @ scene.x.t()
    z.sum().item()
    y.sum().item()


def at_once(scene: Scene) -> None:
    scene.clinic.synchronous = True
    _ = scene.x * 2 + 1


def many(scene: Scene) -> None:
    for _ in range(3):
        _ = scene.x.neg().relu()
        scene.clinic.session.cut()
    scene.clinic.session.wait()


def drawn(scene: Scene) -> None:
    torch.nn.functional.dropout(scene.x, 0.5).sum().item()


def tagged(scene: Scene) -> None:
    scene.x.tag("#a")
    scene.clinic.search("#a")


def recorded(scene: Scene) -> None:
    hc.record(lambda x: x * 2, scene.x)(scene.x).get()


SCENES: dict[str, tuple[Callable[[Scene], object], int]] = {
    "get": (lambda scene: (scene.x * 2 + 1).get(), 5),
    "item": (lambda scene: scene.x.sum().item(), 5),
    "a shape that only the worker knows": (lambda scene: scene.x[scene.x > 1], 5),
    "wait": (lambda scene: (scene.x * 2, scene.clinic.session.wait()), 5),
    "send": (lambda scene: X.send(scene.clinic) + scene.x, 3),  # type: ignore[attr-defined]  # the hook's
    "move": (lambda scene: (scene.x + 1).move(scene.school), 7),
    "in place": (lambda scene: (scene.x.copy().t_().add_(1), scene.clinic.session.wait()), 7),
    "a module is sent": (lambda scene: scene.model.send(scene.clinic), 2),
    "a module is fetched": (lambda scene: scene.model.send(scene.clinic).get(), 7),
    "steps of an optimizer": (twice, 211),
    "a backward that is known": (known, 61),
    "a late gradient": (late, 61),
    "two workers": (both, 13),
    "synchronous": (at_once, 17),
    "frames": (many, 17),
    "random numbers": (drawn, 17),
    "tags": (tagged, 11),
    "a recorded program": (recorded, 31),
}  # what is interrupted, and at each how manieth place


@pytest.fixture
def _still() -> Iterator[None]:
    """The collector has little to look through, so that it can be asked often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_still")
@pytest.mark.parametrize("name", SCENES)
def test_ctrl_c_anywhere(name: str) -> None:
    act, stride = SCENES[name]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    Scene().check()
    struck, at = 0, 1
    while True:
        scene = Scene()
        came = Interrupt(at).during(lambda: act(scene))  # noqa: B023  # called here
        scene.check()
        if not came:
            break
        struck += 1
        at += stride
    assert struck > 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


FAR: dict[str, Callable[[Any, Any], object]] = {
    "get": lambda x, model: (x * 2).get(),
    "wait": lambda x, model: (x * 2, x.location.session.wait()),
    "a module is fetched": lambda x, model: model.send(x.location).get(),
}


@pytest.mark.parametrize("name", FAR)
def test_ctrl_c_at_a_worker_elsewhere(name: str) -> None:
    """Its stream breaks if it must, and the session resumes."""
    came, at = True, 1
    while came:
        with World() as world:
            x: Any = X.send(world.worker)  # type: ignore[attr-defined]  # the hook's
            model: Any = nn.Linear(2, 2)
            expected = copy.deepcopy(model)
            came = Interrupt(at).during(lambda: FAR[name](x, model))  # noqa: B023  # called here
            world.worker.session.wait()
            assert torch.equal((x * 3).get(), X * 3)
            if hc.location_of(model) is not None:
                model.get()
            assert torch.equal(model.weight, expected.weight)
            del x, model
            gc.collect(0)
            world.worker.session.wait()
            assert not world.worker.session.busy
        at += 29
    assert at > 200


@pytest.mark.parametrize("operation", ["send", "receive", "start"])
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_in_the_transport(operation: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until what is under way is done, and then it comes."""
    scene = Scene()
    _ = X.send(scene.school) * 2  # type: ignore[attr-defined]  # the hook's; so there is something to start
    plain = getattr(MemoryTransport, operation)

    def struck(self: MemoryTransport, *args: Any) -> Any:
        if not after:
            signal.raise_signal(signal.SIGINT)
        found = plain(self, *args)
        if after:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(MemoryTransport, operation, struck)
    with pytest.raises(KeyboardInterrupt):
        (scene.x * 2).get()
    monkeypatch.undo()
    del _
    scene.check()
