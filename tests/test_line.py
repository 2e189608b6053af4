"""Lines and assemblers by themselves: random breaks, resends and duplicates deliver exactly once, in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from housecall.errors import CodecError, ProtocolError
from housecall.transport.line import Line
from housecall.transport.parcel import Assembler, Parcel, packed
from housecall.wire.messages import Ack, Array, Drop, Frame, Message, Put
from housecall.wire.packets import MAX_PACKET, MORE, control


def parcel(number: int, size: int = 1) -> Parcel:
    return Parcel(number, b"x" * size, [])


# -- lines ------------------------------------------------------------------------------------------------


def test_a_line_keeps_what_is_not_acknowledged() -> None:
    line = Line()
    for number in (1, 2, 3, 4):
        line.send(parcel(number, size=10 * number))
    assert line.kept_bytes == 100
    line.acknowledge(2)
    assert line.kept_bytes == 70
    assert [line.parcel(number) is not None for number in range(7)] == [False, False, False, True, True, False, False]
    found = line.parcel(3)
    assert found is not None
    assert found.number == 3
    line.acknowledge(2)  # heard before
    line.acknowledge(0)
    assert line.kept_bytes == 70
    line.acknowledge(4)
    assert line.kept_bytes == 0
    assert line.parcel(4) is None
    line.send(parcel(5))
    assert line.parcel(5) is not None


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_line_sends_in_order(number: int) -> None:
    with pytest.raises(ProtocolError, match=f"message {number} was to be sent after message 0"):
        Line().send(parcel(number))


def test_what_was_never_sent_cannot_be_acknowledged() -> None:
    line = Line()
    line.send(parcel(1))
    with pytest.raises(ProtocolError, match="message 2 was acknowledged, but only 1 were sent"):
        line.acknowledge(2)
    assert line.parcel(1) is not None


def test_a_gap_is_an_error_and_a_repetition_is_not() -> None:
    line = Line()
    assert line.accept(1)
    assert line.accept(2)
    assert not line.accept(2)
    assert not line.accept(1)
    with pytest.raises(ProtocolError, match="message 4 came after message 2: one is missing"):
        line.accept(4)
    assert line.received == 2
    assert line.accept(3)


class BrokenStreams(RuleBasedStateMachine):
    """A sender and a receiver, and between them streams that break anywhere, deliver twice, and lose what is under
    way. Acknowledgements are as unreliable."""

    def __init__(self) -> None:
        super().__init__()
        self.sender, self.receiver = Line(), Line()
        self.delivered: list[int] = []
        self.cursor = 1  # the next that the present stream carries
        self.under_way: list[int] = []

    @rule(size=st.integers(0, 5))
    def send(self, size: int) -> None:
        self.sender.send(parcel(self.sender.sent + 1, size))

    @precondition(lambda self: self.sender.parcel(self.cursor) is not None)
    @rule(twice=st.booleans())
    def carry(self, twice: bool) -> None:
        carried = self.sender.parcel(self.cursor)
        assert carried is not None
        self.under_way += [carried.number] * (2 if twice else 1)
        self.cursor += 1

    @precondition(lambda self: self.under_way)
    @rule(count=st.integers(1, 4))
    def deliver(self, count: int) -> None:
        for number in self.under_way[:count]:
            if self.receiver.accept(number):
                self.delivered.append(number)
        del self.under_way[:count]

    @rule(lag=st.integers(0, 3))
    def acknowledge(self, lag: int) -> None:
        self.sender.acknowledge(max(0, self.receiver.received - lag))

    @rule(late=st.booleans())
    def break_and_resume(self, late: bool) -> None:
        """The receiver says what it has, before or after it has read what the old stream still held."""
        says = self.receiver.received
        if late:
            self.deliver(len(self.under_way))
        self.under_way = []
        self.sender.acknowledge(says)
        self.cursor = says + 1

    @invariant()
    def exactly_once_in_order(self) -> None:
        assert self.delivered == list(range(1, self.receiver.received + 1))
        assert self.receiver.received <= self.sender.sent

    @invariant()
    def nothing_is_forgotten_before_it_came(self) -> None:
        for number in range(self.receiver.received + 1, self.sender.sent + 1):
            assert self.sender.parcel(number) is not None

    def teardown(self) -> None:
        """After a last resumption, all that was sent comes."""
        self.break_and_resume(late=False)
        while self.sender.parcel(self.cursor) is not None:
            self.carry(twice=True)
        self.deliver(len(self.under_way))
        assert self.delivered == list(range(1, self.sender.sent + 1))
        self.sender.acknowledge(self.receiver.received)
        assert self.sender.kept_bytes == 0


BrokenStreams.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestBrokenStreams = BrokenStreams.TestCase


# -- assemblers -------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 3, 1024, 1025, 5000, (MAX_PACKET - 200) // 4, MAX_PACKET // 4, 3 * MAX_PACKET // 4 + 7])


def frame(number: int, sizes: list[int]) -> Frame:
    """A frame of tensors whose elements say where they belong."""
    messages: list[Message] = [
        Put(place, Array(None, torch.arange(size, dtype=torch.float32) + number * 100 + place))
        for place, size in enumerate(sizes)
    ]
    return Frame(number, (*messages, Drop((number,))))


def cut(body: Frame, acknowledged: int = 0) -> list[bytes]:
    return list(packed(body).packets(acknowledged))


def same(one: Frame, other: Frame) -> bool:
    tensors = [[m.value.data for m in body.messages if isinstance(m, Put)] for body in (one, other)]
    return (
        one.number == other.number
        and len(one.messages) == len(other.messages)
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(SIZES, max_size=4), min_size=1, max_size=3))
def test_what_was_cut_is_put_together(bodies: list[list[int]]) -> None:
    assembler = Assembler(Frame)
    for number, sizes in enumerate(bodies, 1):
        whole = frame(number, sizes)
        *parts, last = cut(whole, acknowledged=7)
        assert all(len(packet) <= MAX_PACKET for packet in (*parts, last))
        assert [assembler.feed(packet) for packet in parts] == [None] * len(parts)
        arrived = assembler.feed(last)
        assert arrived is not None
        begun, found = arrived
        assert (begun.number, begun.acknowledged) == (number, 7)
        assert same(found, whole)
        assert assembler.nbytes == packed(whole).nbytes


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=6), st.data())
def test_over_streams_that_break_each_frame_comes_once(bodies: list[list[int]], data: st.DataObject) -> None:
    """A stream ends after any number of packets, within a frame as well; a frame may be passed twice."""
    sender, receiver = Line(), Line()
    frames = [frame(number, sizes) for number, sizes in enumerate(bodies, 1)]
    for body in frames:
        sender.send(packed(body))
    arrived: list[Frame] = []
    while receiver.received < len(frames):
        left = data.draw(st.integers(1, 12), label="packets until the stream breaks")
        assembler = Assembler(Frame)
        for number in range(receiver.received + 1, len(frames) + 1):
            kept = sender.parcel(number)
            assert kept is not None
            passed = list(kept.packets(0)) * data.draw(st.sampled_from([1, 1, 2]), label="times")
            for packet in passed[:left]:
                done = assembler.feed(packet)
                if done is not None and receiver.accept(done[0].number):
                    arrived.append(done[1])
            left -= len(passed)
            if left <= 0:
                break
        sender.acknowledge(receiver.received)
    assert len(arrived) == len(frames)
    assert all(same(one, other) for one, other in zip(arrived, frames, strict=True))


def test_a_parcel_can_be_sent_again() -> None:
    kept = packed(frame(1, [500_000]))
    assert list(kept.packets(0)) == list(kept.packets(0))
    assert next(len(packet) for packet in kept.packets(3)) == MAX_PACKET


def test_a_frame_within_a_frame_is_refused() -> None:
    assembler = Assembler(Frame)
    first, *_ = cut(frame(1, [500_000]))
    assembler.feed(first)
    with pytest.raises(CodecError, match="message 1 was cut off by another"):
        assembler.feed(cut(frame(2, []))[0])


def test_more_than_was_named_is_refused() -> None:
    assembler = Assembler(Frame)
    first, second = cut(frame(1, [300_000]))
    assembler.feed(first)
    with pytest.raises(CodecError, match="message 1 is followed by 3 bytes that it did not name"):
        assembler.feed(second + b"abc")


@pytest.mark.parametrize("packet", [b"", bytes((MORE,)), b"\x01short", b"\x09" * 40, control(Ack(1))])
def test_what_begins_no_frame_is_refused(packet: bytes) -> None:
    with pytest.raises(CodecError, match="expected the first packet of a message"):
        Assembler(Frame).feed(packet)


def test_tensors_beyond_the_limit_are_refused_before_anything_is_allocated() -> None:
    (first, *_) = cut(frame(1, [2000, 2000]))
    with pytest.raises(CodecError, match="tensors of 16,000 bytes in one message; at most 15,999 are allowed"):
        Assembler(Frame, limit=15_999).feed(first)
    Assembler(Frame, limit=16_000).feed(first)


def test_a_packet_that_names_another_number_is_refused() -> None:
    (packet,) = cut(frame(2, []))
    lying = packet[:1] + (5).to_bytes(8, "little") + packet[9:]
    with pytest.raises(CodecError, match="packet 5 brought message 2"):
        Assembler(Frame).feed(lying)
