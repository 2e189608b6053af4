"""What every `Transport` must do. A test class inherits `TransportContract` and gives a `connect` fixture.

No test sleeps: doors report through events, and a wait that ends by its time limit is a failure. Nothing here
knows how a transport works, so it may run a frame at once, later, or in another process of threads: only the
order, the count, and that `send` never waits for a reply.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch

from housecall.errors import WorkerGone
from housecall.types import Door, Transport
from housecall.wire.messages import Array, Drop, Fetch, Frame, Message, Put, Reply, Value

__all__ = ["Connect", "GatedDoor", "RecordingDoor", "TransportContract", "frame"]

PATIENCE = 60.0  # seconds until a test that waits for an event has failed

Connect = Callable[[Door], Transport]


def frame(number: int, *messages: Message) -> Frame:
    return Frame(number, messages or (Drop((number,)),))


class RecordingDoor:
    """Answers each frame with its number, and remembers what came and on which thread."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.threads: list[int] = []
        self.closed = 0

    def handle(self, frame: Frame) -> Reply:
        self.frames.append(frame)
        self.threads.append(threading.get_ident())
        return Reply(frame.number, (), ())

    def close(self) -> None:
        self.closed += 1


class GatedDoor(RecordingDoor):
    """Stands in `handle` until `gate` is set; `inside` says that somebody stands there."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.Event()
        self.gate = threading.Event()
        self.answered: list[int] = []

    def handle(self, frame: Frame) -> Reply:
        self.inside.set()
        assert self.gate.wait(PATIENCE), "the gate never opened: somebody waited for this frame"
        self.answered.append(frame.number)
        return super().handle(frame)


class TransportContract:
    """The contract. `connect(door)` gives a fresh transport to a door."""

    @pytest.fixture
    def connect(self) -> Connect:
        raise NotImplementedError

    def test_one_reply_for_each_frame_in_order(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        for number in range(1, 31):
            transport.send(frame(number))
        assert [transport.receive().number for _ in range(30)] == list(range(1, 31))
        assert [seen.number for seen in door.frames] == list(range(1, 31))
        transport.close()

    def test_sending_and_receiving_may_take_turns(self, connect: Connect) -> None:
        transport = connect(RecordingDoor())
        for number in range(1, 11):
            transport.send(frame(2 * number - 1))
            transport.send(frame(2 * number))
            assert transport.receive().number == 2 * number - 1
            assert transport.receive().number == 2 * number
        transport.close()

    def test_messages_arrive_as_they_were_sent(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        messages = (Put(1, Array(None, torch.arange(6.0).view(2, 3).t())), Fetch((1, 2)), Drop((3,)))
        transport.send(frame(1, *messages))
        transport.receive()
        (seen,) = door.frames
        put, *rest = seen.messages
        assert rest == list(messages[1:])
        assert isinstance(put, Put)
        assert put.id == 1
        torch.testing.assert_close(put.value.data, torch.arange(6.0).view(2, 3).t(), rtol=0, atol=0)
        assert put.value.data.stride() == (1, 3)
        transport.close()

    def test_values_come_home(self, connect: Connect) -> None:
        value = torch.randn(3)

        class Giving(RecordingDoor):
            def handle(self, frame: Frame) -> Reply:
                return Reply(frame.number, (Value((Array(None, value),)),), ())

        transport = connect(Giving())
        transport.send(frame(1, Fetch((1,))))
        (result,) = transport.receive().results
        assert isinstance(result, Value)
        (array,) = result.arrays
        assert isinstance(array, Array)
        assert torch.equal(array.data, value)
        transport.close()

    def test_send_does_not_wait_for_a_reply(self, connect: Connect) -> None:
        door = GatedDoor()
        transport = connect(door)
        for number in (1, 2, 3):
            transport.send(frame(number))
        assert door.answered == []  # the gate is shut, and we are here
        door.gate.set()
        assert [transport.receive().number for _ in range(3)] == [1, 2, 3]
        transport.close()

    def test_what_was_started_runs_beside_the_caller(self, connect: Connect) -> None:
        door = GatedDoor()
        transport = connect(door)
        transport.send(frame(1))
        transport.send(frame(2))
        transport.start()
        assert door.inside.wait(PATIENCE), "start() did not let the frame run"
        assert door.answered == []
        door.gate.set()
        assert [transport.receive().number for _ in range(2)] == [1, 2]
        assert threading.get_ident() != door.threads[0]
        transport.close()

    def test_starting_twice_or_with_nothing_to_do_is_harmless(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        transport.start()
        transport.send(frame(1))
        transport.start()
        transport.start()
        transport.send(frame(2))
        transport.start()
        assert [transport.receive().number for _ in range(2)] == [1, 2]
        transport.start()
        transport.send(frame(3))
        assert transport.receive().number == 3
        assert [seen.number for seen in door.frames] == [1, 2, 3]
        transport.close()

    def test_two_transports_overlap(self, connect: Connect) -> None:
        """Each door opens the other's gate from inside: done one after the other, neither would ever end."""
        one, other = GatedDoor(), GatedDoor()
        transports = connect(one), connect(other)
        for transport in transports:
            transport.send(frame(1))
        for transport in transports:
            transport.start()
        assert one.inside.wait(PATIENCE)
        assert other.inside.wait(PATIENCE)
        assert one.answered == other.answered == []  # both are inside now
        one.gate.set()
        other.gate.set()
        for transport in transports:
            assert transport.receive().number == 1
            transport.close()

    def test_a_caller_waits_for_one_while_another_runs(self, connect: Connect) -> None:
        meeting = threading.Barrier(2, timeout=PATIENCE)

        class Meeting(RecordingDoor):
            def handle(self, frame: Frame) -> Reply:
                meeting.wait()
                return super().handle(frame)

        waited, beside = connect(Meeting()), connect(Meeting())
        waited.send(frame(1))
        beside.send(frame(1))
        beside.start()
        assert waited.receive().number == 1
        assert beside.receive().number == 1
        waited.close()
        beside.close()

    def test_closing_twice_is_harmless_and_ends_the_session_once(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        transport.send(frame(1))
        transport.receive()
        transport.close()
        transport.close()
        assert door.closed == 1

    def test_sending_after_close_is_an_error(self, connect: Connect) -> None:
        door = RecordingDoor()
        transport = connect(door)
        transport.close()
        with pytest.raises(WorkerGone, match="closed"):
            transport.send(frame(1))
        assert door.frames == []

    def test_receiving_what_nobody_owes_is_an_error(self, connect: Connect) -> None:
        transport = connect(RecordingDoor())
        with pytest.raises(WorkerGone, match="owes no reply"):
            transport.receive()
        transport.send(frame(1))
        transport.receive()
        with pytest.raises(WorkerGone):
            transport.receive()
        transport.close()
        with pytest.raises(WorkerGone):
            transport.receive()

    def test_a_frame_that_was_cut_off_by_close_is_an_error_and_no_hang(self, connect: Connect) -> None:
        door = GatedDoor()
        transport = connect(door)
        transport.send(frame(1))
        door.gate.set()
        transport.close()
        with contextlib.suppress(WorkerGone):
            assert transport.receive().number == 1  # it may have run before the end
        with pytest.raises(WorkerGone):
            transport.receive()
