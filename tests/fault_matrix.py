"""The matrix of faults: every kind, during every operation, on the way out and back.

A cell is a small world of its own: an operation on it while a fault strikes what is sent, and once more while it
strikes what comes back. `test_faults` asserts every cell, `bench/faults.py` prints the table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from housecall.errors import ProtocolError, WorkerGone
from housecall.testing import Fault, Faults, Kind, Way, World

PATIENCE = 30.0  # seconds until what should have ended has failed
ONCE, ERROR = "exactly once", "one clear error"
BALLAST = torch.arange(700_000.0)  # 2.8 MB: three packets

T = TypeVar("T")


class Hang(AssertionError):
    """What should have ended has not."""


class Leak(AssertionError):
    """Something is left that belongs to nobody."""


def nothing(left: Any, what: str) -> None:
    if left:
        raise Leak(f"{what} left behind: {left}")


def within(work: Callable[[], T], patience: float = PATIENCE) -> T:
    """What `work` returns or raises. That it hangs is a failure."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, name="test", daemon=True)
    thread.start()
    thread.join(patience)
    if not ended:
        raise Hang(f"a hang: not done after {patience:g} s")
    value, error = ended[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def housecall_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("housecall-")}


@contextmanager
def nothing_left() -> Iterator[None]:
    """Every thread of ours that begins within the block ends soon after it."""
    before = housecall_threads()
    yield
    for thread in housecall_threads() - before:
        thread.join(PATIENCE)
        nothing(thread.is_alive() and thread.name, "a thread was")


# -- operations: one frame of three packets goes out, one reply of three packets comes back ----------------

Strike = Callable[[int], None]  # strike the n-th packet from now


def round_trip(world: World, big: torch.Tensor) -> None:
    """Wait for what was queued, and let a large value go along each way."""
    ballast = BALLAST.send(world.worker)
    assert torch.equal(big.clone().get(), BALLAST)
    del ballast


def settled(world: World) -> int:
    """How many slots the worker holds when it has done everything."""
    world.worker.session.forget()
    world.worker.session.wait()
    world.host.turns.wait_idle(PATIENCE)
    return world.slots


def send(world: World, big: torch.Tensor, strike: Strike) -> None:
    strike(1)
    pointers = [torch.full((3,), float(n)).send(world.worker) for n in range(4)]
    round_trip(world, big)
    assert settled(world) == 5
    assert [pointer.get().tolist() for pointer in pointers] == [[float(n)] * 3 for n in range(4)]


def run(world: World, big: torch.Tensor, strike: Strike) -> None:
    counter = torch.zeros(3).send(world.worker)
    world.worker.session.wait()
    strike(1)
    for _ in range(5):
        counter.add_(1)
    round_trip(world, big)
    assert counter.get().tolist() == [5.0] * 3


def get(world: World, big: torch.Tensor, strike: Strike) -> None:
    counter = torch.zeros(3).send(world.worker)
    ballast = BALLAST.send(world.worker)
    strike(1)
    assert torch.equal((ballast + counter.add_(1)[0]).get(), BALLAST + 1)
    assert counter.get().tolist() == [1.0] * 3


def drop(world: World, big: torch.Tensor, strike: Strike) -> None:
    pointers = [torch.full((3,), float(n)).send(world.worker) for n in range(4)]
    world.worker.session.wait()
    assert settled(world) == 5
    strike(1)
    del pointers
    round_trip(world, big)
    assert settled(world) == 1


def resume(world: World, big: torch.Tensor, strike: Strike) -> None:
    """The connection breaks while nobody waits; the fault strikes the resumption itself."""
    counter = torch.zeros(3).send(world.worker)
    world.worker.session.wait()
    world.faults.cut()
    strike(0)
    counter.add_(1)
    round_trip(world, big)
    assert counter.get().tolist() == [1.0] * 3


OPERATIONS = {"send": send, "run": run, "get": get, "drop": drop, "resume": resume}


# -- kinds of fault ---------------------------------------------------------------------------------------


def packet(kind: Kind, at: int = 1) -> Callable[[World, Way, int], None]:
    """A fault of the first packet; of the Hello or Welcome, if those are due."""

    def strike(world: World, way: Way, first: int) -> None:
        world.faults.strike(Fault(kind, way, at if first else max(1, 2 * at - 1)))

    return strike


def refused(world: World, way: Way, first: int) -> None:
    world.faults.strike(Fault(Kind.BREAK_BEFORE, way), *(Fault(Kind.REFUSED, "dial", n) for n in (1, 2, 3)))


def restarted(world: World, way: Way, first: int) -> None:
    world.faults.strike(Fault(Kind.BREAK_BEFORE, way))
    world.before_next_dial(world.restart)


FAULTS: dict[str, tuple[Callable[[World, Way, int], None], set[str]]] = {
    Kind.DELAYED.value: (packet(Kind.DELAYED), {ONCE}),
    Kind.SLOW.value: (packet(Kind.SLOW), {ONCE}),
    Kind.BREAK_BEFORE.value: (packet(Kind.BREAK_BEFORE), {ONCE}),
    Kind.BREAK_AFTER.value: (packet(Kind.BREAK_AFTER), {ONCE}),
    "break within a large message": (packet(Kind.BREAK_BEFORE, at=2), {ONCE}),
    Kind.TRUNCATED.value: (packet(Kind.TRUNCATED), {ONCE, ERROR}),
    Kind.CORRUPTED.value: (packet(Kind.CORRUPTED), {ERROR}),
    Kind.DUPLICATED.value: (packet(Kind.DUPLICATED), {ONCE}),
    Kind.REORDERED.value: (packet(Kind.REORDERED), {ONCE}),
    Kind.HALF_OPEN.value: (packet(Kind.HALF_OPEN), {ONCE}),
    "refused connections": (refused, {ONCE}),
    "restarted worker": (restarted, {ERROR}),
}


# -- the matrix -------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The outcome of an operation under a fault of what is sent, and of what comes."""

    kind: str
    operation: str
    sent: str
    came: str


def outcome(kind: str, operation: str, way: Way) -> str:
    """Run one cell, and check that nothing is left."""
    faults = Faults(delay_s=0.001, silence_s=0.01)
    with nothing_left():
        world = World(faults=faults)
        big = BALLAST.send(world.worker)
        world.worker.session.wait()
        strike, _ = FAULTS[kind]
        try:
            within(lambda: OPERATIONS[operation](world, big, lambda first: strike(world, way, first)))
            found = ONCE
        except (WorkerGone, ProtocolError) as error:
            found = ERROR
            clear(error, world, big)
        assert faults.struck, "no fault struck"
        within(world.worker.close)
        if found is ERROR:  # the worker may not have heard of it: the lease is for that
            world.lapse()
        nothing(world.host.seats, "seats were")
        nothing(world.host.worker.sessions, "sessions were")
        nothing(world.host.heads.used + world.host.blobs.used, "bytes of room were")
        world.close()
    return found


def clear(error: Exception, world: World, big: torch.Tensor) -> None:
    """One clear error: it names the worker and what was lost, and whoever asks again hears the same."""
    assert "worker 'clinic'" in str(error), error
    assert "lost" in str(error), error
    reason = str(error).split(".")[0]
    again = "nothing"
    try:
        within(big.clone().get)
    except WorkerGone as gone:
        again = str(gone)
    assert again.split(".")[0] == reason


def found(kind: str, operation: str, way: Way) -> str:
    """The outcome of a cell, for whoever prints it: a hang, a leak and a wrong value are some too."""
    try:
        return outcome(kind, operation, way)
    except Hang:
        return "a hang"
    except Leak as leak:
        return f"a leak: {leak}"
    except AssertionError as error:
        return f"wrong: {str(error).splitlines()[0] if str(error) else 'a value'}"


def matrix() -> list[Row]:
    """All outcomes."""
    return [
        Row(kind, operation, found(kind, operation, "out"), found(kind, operation, "in"))
        for kind in FAULTS
        for operation in OPERATIONS
    ]
