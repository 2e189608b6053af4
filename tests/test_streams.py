"""Sessions over streams keep the contract of transports: through memory, through gRPC, and through breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from streams import DoorWorker, grpc_dial, memory_dial
from transport_contract import Connect, TransportContract

from housecall.host.host import Host
from housecall.testing import Faults, Kind, faulty
from housecall.transport.stream import StreamTransport
from housecall.types import Door


class TestMemoryStream(TransportContract):
    @pytest.fixture
    def connect(self) -> Iterator[Connect]:
        hosts = []

        def connected(door: Door) -> StreamTransport:
            hosts.append(Host(DoorWorker(door)))  # type: ignore[arg-type]
            return StreamTransport(memory_dial(hosts[-1]), name="clinic")

        yield connected
        for host in hosts:
            host.close()


class TestGrpc(TransportContract):
    @pytest.fixture
    def connect(self) -> Iterator[Connect]:
        with ExitStack() as stack:

            def connected(door: Door) -> StreamTransport:
                host = Host(DoorWorker(door))  # type: ignore[arg-type]
                stack.callback(host.close)
                return StreamTransport(stack.enter_context(grpc_dial(host)), name="clinic")

            yield connected


class Calm(StreamTransport):
    """Meets no fault at its end: how soon the worker hears of it over broken streams is no part of the contract."""

    faults: Faults

    def close(self) -> None:
        self.faults.stop()
        super().close()


def faulty_connections(seed: int, kinds: tuple[Kind, ...]) -> Iterator[Connect]:
    hosts: list[Host] = []

    def connected(door: Door) -> StreamTransport:
        host = Host(DoorWorker(door))  # type: ignore[arg-type]
        hosts.append(host)
        faults = Faults.seeded(100 * seed + len(hosts), rate=0.2, kinds=kinds)
        transport = Calm(faulty(memory_dial(host), faults), name="clinic")
        transport.faults = faults
        return transport

    yield connected
    for host in hosts:
        host.close()


@pytest.mark.parametrize("seed", range(3))
class TestFaulty(TransportContract):
    """Delays, repetitions and connections that are refused at first are not seen by whoever keeps to the contract."""

    @pytest.fixture
    def connect(self, seed: int) -> Iterator[Connect]:
        yield from faulty_connections(seed, (Kind.DELAYED, Kind.SLOW, Kind.DUPLICATED, Kind.REFUSED))


@pytest.mark.parametrize("seed", range(6))
class TestBreaking(TransportContract):
    """Nor are breaks, and what an old stream still delivers after its successor has begun.

    Three tests watch the worker from beside while nobody reads. A session has no thread that would notice a break
    then, so what was lost is sent again when the caller next reads; they are for streams that hold."""

    test_what_was_started_runs_beside_the_caller = None  # type: ignore[assignment]
    test_two_transports_overlap = None  # type: ignore[assignment]
    test_a_caller_waits_for_one_while_another_runs = None  # type: ignore[assignment]

    @pytest.fixture
    def connect(self, seed: int) -> Iterator[Connect]:
        breaks = (Kind.BREAK_BEFORE, Kind.BREAK_AFTER, Kind.REORDERED, Kind.HALF_OPEN)
        yield from faulty_connections(seed, (*breaks, Kind.DELAYED, Kind.DUPLICATED, Kind.REFUSED))
