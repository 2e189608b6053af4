"""What a frame or reply says beside elements is bounded, and so is the memory that it becomes; honest ones are cut."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
import torch

import housecall as hc
from housecall.program.call import Call
from housecall.transport import arrays, parcel
from housecall.transport.parcel import HEAD_COST, INLINE, INLINE_TOGETHER, Assembler, HeadTooLong, packed, packed_reply
from housecall.types import Ref, TensorType
from housecall.wire.codec import MAX_HEAD_BYTES, decode
from housecall.wire.messages import Array, Define, Drop, Failure, Fetch, Frame, Put, Reply, Types, Value
from housecall.worker.plans import MOST_CALLS
from housecall.worker.worker import MOST_FAILURES

encode = msgspec.msgpack.encode


@pytest.fixture
def clinic() -> hc.VirtualWorker:
    return hc.VirtualWorker(id="clinic", codec=True)


# -- an honest client ---------------------------------------------------------------------------------------


def test_many_small_tensors_travel_behind_the_head() -> None:
    count = 3 * INLINE_TOGETHER // INLINE
    frame = Frame(1, tuple(Put(n + 1, Array(None, torch.full((INLINE // 4,), float(n)))) for n in range(count)))
    made = packed(frame)
    assert len(made.head) < 2 * INLINE_TOGETHER
    assert len(made.blobs) == count - INLINE_TOGETHER // INLINE
    assembler = Assembler(Frame)
    *_, arrived = [assembler.feed(packet) for packet in made.packets(0)]
    assert arrived is not None
    for n, message in enumerate(arrived[1].messages):
        assert isinstance(message, Put)
        assert torch.equal(message.value.data, torch.full((INLINE // 4,), float(n)))


def test_what_is_too_much_for_one_frame_is_cut(clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3).send(clinic)
    clinic.session.wait()
    before = clinic.session.frames
    monkeypatch.setattr(parcel, "MAX_HEAD_BYTES", 1_500)
    values = [torch.full((3,), float(n)).send(clinic) for n in range(200)]
    for value in values:
        x.add_(value)
    assert x.get().tolist() == [sum(range(200))] * 3
    assert clinic.session.frames - before > 10


def test_a_message_that_no_frame_holds_is_named_and_the_session_goes_on(
    clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(3).send(clinic)
    clinic.session.wait()
    with monkeypatch.context() as patch:
        patch.setattr(parcel, "MAX_HEAD_BYTES", 1_500)
        many = torch.stack([x] * 300)
        y = x + 1
        with pytest.raises(hc.UsageError, match=r"(?s)stack\.default was not sent: a Frame of .*at most 1,500.*fewer"):
            clinic.session.wait()
    assert y.get().tolist() == [2.0] * 3
    with pytest.raises(hc.OperatorError, match="no slot"):
        many.get()


def test_a_tensor_that_does_not_travel_leaves_the_session_whole(
    clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(3).send(clinic)
    clinic.session.wait()
    with monkeypatch.context() as patch:
        known = {name: size for name, size in arrays.ITEM_BYTES.items() if name != "int16"}
        patch.setattr(arrays, "ITEM_BYTES", known)
        lost = torch.ones(3, dtype=torch.int16).send(clinic)
        with pytest.raises(hc.CodecError, match="int16 does not travel"):
            clinic.session.wait()
    assert (x + 1).get().tolist() == [2.0] * 3
    with pytest.raises(hc.OperatorError, match="no slot"):
        lost.get()


def a_program(calls: int) -> hc.Program:
    """A long chain of calls with many arguments, as those of a convolution's backward."""
    listed = tuple(
        Call("convolution_backward.default", (Ref(n), Ref(n), Ref(n), None, 1, 0, 1, False, 0, 1), {}, (n + 1, 0, 0))
        for n in range(10**10, 10**10 + calls)
    )
    return hc.Program((), listed, ())


def test_the_longest_program_that_a_worker_keeps_travels() -> None:
    assert len(packed(Frame(1, (Define(a_program(MOST_CALLS)),))).head) < MAX_HEAD_BYTES


def test_a_program_that_would_not_travel_is_refused_before_it_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    clinic = hc.VirtualWorker(id="clinic")
    monkeypatch.setattr(clinic.session.transport, "remote", True)
    long = a_program(MAX_HEAD_BYTES // 50)
    with pytest.raises(hc.UsageError, match=r"a program of 83,886 calls has .* bytes; at most .*: divide it"):
        clinic.session._define(long, long.digest)
    assert clinic.session.outbox == []


# -- replies --------------------------------------------------------------------------------------------------


def test_a_reply_that_is_too_long_says_so_and_nothing_else_is_lost() -> None:
    type_ = TensorType("float32", (1,) * 30, (1,) * 30)
    long = Reply(7, (Types((type_,) * 60_000),), (), ((1, None),))
    with pytest.raises(HeadTooLong):
        packed(long)
    reply = decode(packed_reply(long).head, Reply)
    (failure,) = reply.failures
    assert (reply.number, reply.results, reply.undone) == (7, (), ((1, None),))
    assert "beside the elements of its tensors; at most 4,194,304 travel" in failure.reason


def test_a_reply_of_nothing_but_failures_is_always_told() -> None:
    told = tuple(Failure(1, n, "é" * 2_000, "é" * 2_000, writes=True) for n in range(MOST_FAILURES))
    made = packed_reply(Reply(1, (Value(()),), told, tuple((n, None) for n in range(MOST_FAILURES))))
    assert len(made.head) <= MAX_HEAD_BYTES
    assert len(decode(made.head, Reply).undone) == MOST_FAILURES


def test_who_asks_for_too_much_at_once_is_told(clinic: hc.VirtualWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.full((3,), float(n)).send(clinic) for n in range(100)]
    clinic.session.wait()
    with monkeypatch.context() as patch:
        patch.setattr(parcel, "MAX_HEAD_BYTES", 2_000)
        with pytest.raises(hc.OperatorError, match="fetch failed at worker 'clinic': a Reply of"):
            clinic.session.fetch([value._slot for value in values])
    assert values[3].get().tolist() == [3.0] * 3


# -- what a head becomes --------------------------------------------------------------------------------------


def repeated(message: object) -> bytes:
    """A head of as many of a message as it holds."""
    one = encode(message)
    count = (MAX_HEAD_BYTES - 16) // len(one)
    return b"\x92\x01\xdd" + count.to_bytes(4, "big") + one * count


def within(start: bytes, one: bytes, end: bytes = b"") -> bytes:
    """A head of one message with an array of as many items as it holds."""
    count = (MAX_HEAD_BYTES - 64 - len(start) - len(end)) // len(one)
    return b"\x92\x01\x91" + start + b"\xdd" + count.to_bytes(4, "big") + one * count + end


HEADS = {
    "messages of nothing": repeated(["clear"]),
    "drops": repeated(["drop", [1]]),
    "calls": repeated(["call", "", [], {}, []]),
    "calls with a name": repeated(["call", "x", [], {"": None}, []]),
    "lists": repeated(["call", "x", [["items", []]], {}, []]),
    "numbers": within(b"\x95\xa3run\xa1x\x90\x90", b"\x01"),
    "nothings": within(b"\x95\xa4call\xa1x", b"\xc0", b"\x80\x90"),
    "texts": within(b"\x95\xa4call\xa1x", b"\xa2\xc3\xa9", b"\x80\x90"),
    "lists in a call": within(b"\x95\xa4call\xa1x", encode(["items", [None]]), b"\x80\x90"),
    "ids": within(b"\x92\xa5fetch", encode(300)),
    "small tensors": repeated(["put", 1, ["array", ["type", "int8", [1], [1]], b"1"]]),
    "tags": repeated(["tag", 1, ["a"], "b"]),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_becomes_no_more_memory_than_is_counted_for_it(kind: str) -> None:
    head = HEADS[kind]
    assert len(head) <= MAX_HEAD_BYTES
    tracemalloc.start()
    try:
        frame = decode(head, Frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert frame.messages
    assert peak < (HEAD_COST + 1) * len(head)


def test_the_cost_that_is_counted_is_not_far_from_what_it_is() -> None:
    tracemalloc.start()
    try:
        decode(HEADS["numbers"], Frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > HEAD_COST / 2 * len(HEADS["numbers"])


def test_room_is_asked_for_before_memory_is_taken() -> None:
    asked: list[tuple[str, int]] = []
    assembler = Assembler(
        Frame, head_room=lambda n: asked.append(("head", n)), blob_room=lambda n: asked.append(("blobs", n))
    )
    made = packed(Frame(1, (Put(1, Array(None, torch.zeros(5_000))), Fetch((1,)), Drop((1,)))))
    for packet in made.packets(0):
        assembler.feed(packet)
    assert asked == [("head", HEAD_COST * len(made.head)), ("blobs", 20_000)]
