"""A worker with private data, and what a hostile scientist has against it: her session, raw frames, and patience.

An attack is a function of a `World` that returns what leaked, or `None` if it was refused. Each names the guard that
stands in its way; `guards.py` can take that away, and then it must succeed: else it would prove nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

import housecall as hc
from housecall.owner.policy import Policy, Release, Use
from housecall.program.call import Call
from housecall.transport.arrays import share
from housecall.transport.parcel import packed
from housecall.types import Label
from housecall.wire.messages import Array, Fetch, Frame, Load, Put, Reply, Request
from housecall.worker.owner import Owner
from housecall.worker.worker import Worker, WorkerSession

__all__ = ["ASKING", "ATTACKS", "HEART", "SECRET", "WHY_NONE", "Attack", "World", "attack", "call", "named", "stolen"]

ASKING = Policy(use=Use(interactive=("me", "mallory")), release=Release(approvals=True))
SECRET = 7000.0 + torch.arange(24.0).view(6, 4)
HEART = Label(("heart",))

Attack = Callable[["World"], Any]
WHY_NONE: dict[str, str] = {}  # name -> why no single guard can be taken away
ATTACKS: dict[str, tuple[Attack, tuple[str, ...]]] = {}  # name -> the attack, the guards each of which refuses it


def named(name: str, function: Attack, *guards: str, because: str = "") -> None:
    """List an attack. `guards`: the names, in `guards.py`, of what makes it fail, if taken away; or `because` there is
    no single one: it has nothing to take in this design, or more than one refuses it."""
    assert name not in ATTACKS, name
    assert bool(guards) != bool(because), f"{name}: which guard refuses it, or why is there none?"
    ATTACKS[name] = function, guards
    if because:
        WHY_NONE[name] = because


def attack(*guards: str, because: str = "") -> Callable[[Attack], Attack]:
    """`named`, as a decorator of functions `attack_xxx`."""

    def listed(function: Attack) -> Attack:
        named(function.__name__.removeprefix("attack_"), function, *guards, because=because)
        return function

    return listed


class World:
    """One worker, "clinic", with the owned data set "heart": `x` float[6, 4], `y` int[6] from 0 to 2.

    Raw: `door`, in which the columns are %1 and %2, and `frame(...)`. Pointers: `clinic`, `x`, `y`, made when asked
    for."""

    def __init__(self, secret: torch.Tensor = SECRET, y: torch.Tensor | None = None, policy: Policy = ASKING) -> None:
        self.secret, self.labels, self.policy = secret, torch.arange(6) % 3 if y is None else y, policy
        self.worker, self.owner = Worker("clinic"), Owner()
        self.worker.gate = self.owner.gate
        self.worker.catalogue.register("heart", {"x": secret.clone(), "y": self.labels.clone()})
        self.owner.policies.register("heart", policy)
        self._numbers = itertools.count(1)
        self.door = self.opened("mallory")
        self._clinic: hc.VirtualWorker | None = None

    # -- raw frames ---------------------------------------------------------------------------------------

    def opened(self, principal: str, role: str = "scientist", *, load: bool = True) -> WorkerSession:
        door = self.worker.open(principal, role)
        if load:
            door.handle(Frame(next(self._numbers), (Load("heart", (1, 2)),)))
        return door

    def frame(self, *messages: Any, door: WorkerSession | None = None) -> Reply:
        return (door or self.door).handle(Frame(next(self._numbers), messages))

    def done(self, *messages: Any, door: WorkerSession | None = None) -> Reply:
        """A step of an attack that is no offence yet: it must be done."""
        reply = self.frame(*messages, door=door)
        assert not reply.failures, reply.failures
        return reply

    def put(self, ref: int, value: torch.Tensor) -> None:
        self.done(Put(ref, share(value)))

    def taken(self, *ids: int, door: WorkerSession | None = None) -> Any:
        """What comes of fetching: the first value that leaves."""
        for result in self.frame(Fetch(ids), door=door).results:
            for array in result.arrays:
                if isinstance(array, Array):
                    return array.data.clone()
        return None

    def asked(self, *ids: int, door: WorkerSession | None = None) -> str:
        """The id of a request for values."""
        (said,) = self.done(Request(ids, "for science"), door=door).results
        return said.request

    def approved(self, *ids: int, **options: Any) -> str:
        request = self.asked(*ids)
        self.owner.approve(request, **options)
        return request

    def told(self, secrets: tuple[World, World], *messages: Any) -> Any:
        """What a session of two worlds, which differ in private values alone, tells of them: both transcripts."""
        seen = []
        for world in secrets:
            replies = [world.frame(message) for message in messages]
            seen.append(b"".join(part for reply in replies for part in _bytes(reply)))
        return None if seen[0] == seen[1] else seen

    # -- pointers -----------------------------------------------------------------------------------------

    @property
    def clinic(self) -> hc.VirtualWorker:
        if self._clinic is None:
            self._clinic = hc.VirtualWorker(id="clinic")
            self._clinic.add("heart", x=self.secret.clone(), y=self.labels.clone(), policy=self.policy)
        return self._clinic

    @property
    def x(self) -> torch.Tensor:
        return self.clinic.dataset("heart").column("x")

    @property
    def y(self) -> torch.Tensor:
        return self.clinic.dataset("heart").column("y")

    def mine(self, *shape: int) -> torch.Tensor:
        """A tensor of her own at the worker."""
        return torch.zeros(*(shape or (6, 4))).send(self.clinic)


def _bytes(reply: Reply) -> list[bytes]:
    return list(packed(reply).packets(0))


def call(op: str, *args: Any, outs: tuple[int, ...] = (10,), **kwargs: Any) -> Call:
    """A call, its outputs 10 unless said."""
    return Call(op, args, kwargs, outs)


def stolen(world: World, take: Callable[[], Any]) -> Any:
    """What an attempt with pointers gives; `None` if housecall refuses it, then or when the worker has answered."""
    try:
        taken = take()
        world.clinic.session.wait()
    except hc.HousecallError:
        return None
    return taken
