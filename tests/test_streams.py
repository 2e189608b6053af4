"""Sessions over streams keep the contract of transports: through memory, through gRPC, and through breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from streams import DoorWorker, grpc_dial, memory_dial
from transport_contract import Connect, TransportContract

from housecall.transport.stream import StreamTransport
from housecall.types import Door
from housecall.worker.host import Host


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
