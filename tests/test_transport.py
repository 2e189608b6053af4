"""The transport in memory keeps the contract, directly and through bytes; and what is its own."""

from __future__ import annotations

import threading

import pytest
import torch
from transport_contract import Connect, GatedDoor, RecordingDoor, TransportContract, frame

from housecall.errors import WorkerGone
from housecall.transport import memory
from housecall.transport.memory import BACKLOG, MemoryTransport
from housecall.wire.messages import Array, Frame, Put, Reply


class OfMemory(TransportContract):
    """What holds for the transport in memory besides the contract."""

    def test_a_short_queue_is_not_begun_by_sending(self, connect: Connect) -> None:
        door = GatedDoor()
        transport = connect(door)
        for number in range(1, BACKLOG + 1):
            transport.send(frame(number))
        assert not door.inside.is_set()
        door.gate.set()
        assert [transport.receive().number for _ in range(BACKLOG)] == list(range(1, BACKLOG + 1))

    def test_the_queue_is_bounded(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        for number in range(1, 5 * BACKLOG):
            transport.send(frame(number))
            assert len(door.frames) == max(0, number - BACKLOG)
        assert [seen.number for seen in door.frames] == list(range(1, 4 * BACKLOG))

    def test_the_caller_runs_what_she_waits_for(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        transport.send(frame(1))
        transport.receive()
        assert door.threads == [threading.get_ident()]

    def test_closing_drops_what_has_not_run(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        transport.send(frame(1))
        transport.close()
        assert door.frames == []
        assert door.closed == 1

    def test_closing_waits_for_the_frame_that_runs(self, connect: Connect) -> None:
        door = GatedDoor()
        transport = connect(door)
        transport.send(frame(1))
        transport.start()
        assert door.inside.wait(60)
        closer = threading.Thread(target=transport.close)
        closer.start()
        assert door.closed == 0
        door.gate.set()
        closer.join(60)
        assert not closer.is_alive()
        assert door.answered == [1]
        assert door.closed == 1

    def test_threads_of_torch_are_as_before(self, connect: Connect) -> None:
        for thread in tuple(memory._background):  # of tests before, which need not wait for theirs
            thread.join(60)
        before = torch.get_num_threads()
        seen = []

        class Counting(RecordingDoor):
            def handle(self, frame: Frame) -> Reply:
                seen.append(torch.get_num_threads())
                return super().handle(frame)

        torch.set_num_threads(8)
        try:
            for number in range(1, 5):
                door = Counting()
                transport = connect(door)
                transport.send(frame(number))
                transport.start()
                transport._thread.join(60)  # type: ignore[attr-defined]  # it ends by itself
                transport.receive()
            assert torch.get_num_threads() == 8
            assert seen == [4] * 4  # a half, whenever it is started, never a half of a half
        finally:
            torch.set_num_threads(before)


class TestMemoryDirect(OfMemory):
    @pytest.fixture
    def connect(self) -> Connect:
        return lambda door: MemoryTransport(door, name="clinic")

    def test_a_tensor_arrives_as_a_copy_on_write(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        array = Array(None, torch.zeros(3))
        transport.send(frame(1, Put(1, array)))
        transport.receive()
        (put,) = door.frames[0].messages
        assert put.value.data is array.data  # type: ignore[union-attr]  # the session made it lazily a copy


class TestMemoryThroughBytes(OfMemory):
    @pytest.fixture
    def connect(self) -> Connect:
        return lambda door: MemoryTransport(door, name="clinic", codec=True)

    def test_a_tensor_arrives_in_memory_of_its_own(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        value = torch.zeros(3)
        transport.send(frame(1, Put(1, Array(None, value))))
        transport.receive()
        (put,) = door.frames[0].messages
        put.value.data.add_(1)  # type: ignore[union-attr]
        assert torch.equal(value, torch.zeros(3))


def test_errors_name_the_worker() -> None:
    transport = MemoryTransport(RecordingDoor(), name="clinic")
    with pytest.raises(WorkerGone, match="worker 'clinic' owes no reply"):
        transport.receive()
    transport.close()
    with pytest.raises(WorkerGone, match="worker 'clinic' is closed; its values are gone"):
        transport.send(frame(1))
