"""Messages to bytes and back: what travels is what was sent, and what is not a message is one `CodecError`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from housecall.errors import CodecError, ProtocolError
from housecall.program.call import Call, Complex, Input, Items, Program, Symbol
from housecall.program.typing import DTYPES, type_of
from housecall.transport.arrays import pack, unpack
from housecall.transport.parcel import Assembler, packed
from housecall.types import Ref, TensorType
from housecall.wire import codec
from housecall.wire.codec import ITEM_BYTES, blob_sizes, decode, decode_control, encode
from housecall.wire.messages import (
    Array,
    Clear,
    Column,
    Define,
    Describe,
    Drop,
    Evaluate,
    Failure,
    Fetch,
    Found,
    Frame,
    Heard,
    Info,
    Load,
    Message,
    Mock,
    Mocked,
    Noised,
    Open,
    Owned,
    Put,
    Reply,
    Request,
    Requested,
    Result,
    Run,
    Search,
    Seed,
    Statistic,
    Statistics,
    Status,
    Submit,
    Tag,
    Types,
    Update,
    Updated,
    Value,
)

FIXED = settings(deadline=None, database=None, derandomize=True)  # the same examples in every run

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def travelled(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it arrives at the other end of a wire."""
    assembler = Assembler(Frame)
    arrived = [assembler.feed(packet) for packet in packed(Frame(1, (Put(7, Array(None, tensor)),))).packets(5)]
    assert arrived[-1] is not None
    assert arrived[:-1] == [None] * (len(arrived) - 1)
    begun, sent = arrived[-1]
    assert (begun.number, begun.acknowledged) == (1, 5)
    (put,) = sent.messages
    assert isinstance(put, Put)
    assert put.id == 7
    return put.value.data


def bits(tensor: torch.Tensor) -> bytes:
    """The elements as bytes, in order: equal for equal NaNs too, and for dtypes that torch cannot compare."""
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_arrives(tensor: torch.Tensor) -> None:
    found = travelled(tensor)
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert found.is_conj() == tensor.is_conj()
    assert found.is_neg() == tensor.is_neg()
    assert bits(found) == bits(tensor)
    assert found.storage_offset() == 0
    fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if fills and torch._debug_has_internal_overlap(tensor) == 0:
        assert found.stride() == tensor.stride()


def made(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of this dtype; every bit pattern but, for bool, those that are no truth."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count * ITEM_BYTES[dtype],), generator=generator, dtype=torch.uint8)
    if dtype == "bool":
        raw %= 2
    return raw.view(DTYPES[dtype]).reshape(shape)


# -- tensors ----------------------------------------------------------------------------------------------


def test_item_sizes_are_torchs() -> None:
    assert {name: DTYPES[name].itemsize for name in ITEM_BYTES} == ITEM_BYTES


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (1, 4, 1)])
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_dtype_travels(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = made(dtype, shape)
    assert_arrives(tensor)
    if tensor.dim() > 1:
        assert_arrives(tensor.transpose(0, 1))
        assert_arrives(tensor[:, :1])
    if tensor.dim() and tensor.numel():
        assert_arrives(tensor[::2])
        assert_arrives(tensor[:1].expand(3, *tensor.shape[1:]))


@pytest.mark.parametrize("dtype", ["complex32", "complex64", "complex128"])
def test_lazy_bits_travel_as_bits(dtype: str) -> None:
    tensor = made(dtype, (2, 3))
    conj = tensor.conj()
    assert conj.is_conj()
    assert_arrives(conj)
    assert_arrives(conj[0])
    assert_arrives(conj.t())
    if dtype != "complex32":
        negative = conj.imag
        assert negative.is_neg()
        assert_arrives(negative)
        assert_arrives(torch._neg_view(tensor))
        assert_arrives(torch._neg_view(conj))


def test_special_values_travel() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        info = torch.finfo(dtype)
        assert_arrives(
            torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, info.tiny, info.max, info.eps], dtype=dtype)
        )
    assert_arrives(torch.tensor([2**64 - 1], dtype=torch.uint64))


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    tensor = made(dtype, shape, draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 4))):
        dims = tensor.dim()
        kind = draw(st.sampled_from(["transpose", "slice", "select", "expand", "unsqueeze", "conj", "neg", "diagonal"]))
        if kind == "transpose" and dims > 1:
            tensor = tensor.permute(draw(st.permutations(range(dims))))
        elif kind == "slice" and dims:
            dim = draw(st.integers(0, dims - 1))
            size = tensor.shape[dim]
            start = draw(st.integers(0, size))
            tensor = tensor[(slice(None),) * dim + (slice(start, None, draw(st.integers(1, 3))),)]
        elif kind == "select" and dims and tensor.shape[0]:
            tensor = tensor.select(0, draw(st.integers(0, tensor.shape[0] - 1)))
        elif kind == "expand":
            tensor = tensor.expand(draw(st.integers(0, 3)), *tensor.shape)
        elif kind == "unsqueeze":
            tensor = tensor.unsqueeze(draw(st.integers(0, dims)))
        elif kind == "conj":
            tensor = tensor.conj()
        elif kind == "neg" and tensor.is_floating_point() and ITEM_BYTES[dtype] > 1:
            tensor = torch._neg_view(tensor)
        elif kind == "diagonal" and dims > 1:
            tensor = tensor.diagonal(0, 0, 1)
    return tensor


@settings(FIXED, max_examples=400)
@given(tensors())
def test_every_view_of_every_tensor_travels(tensor: torch.Tensor) -> None:
    assert_arrives(tensor)


def test_a_view_carries_its_own_elements_only() -> None:
    rows = torch.randn(1000, 10)
    assert len(pack(Array(None, rows)).data) == 40_000
    for view in (rows[:1], rows[500], rows[::1000], rows.t()[:, 3]):
        packed = pack(Array(None, view))
        assert len(packed.data) == 40
        assert packed.type is not None
        assert packed.type.offset == 0
    assert len(encode(Frame(1, (Put(1, pack(Array(None, rows[:1]))),)))) < 150


def test_what_lies_between_the_elements_stays_at_home() -> None:
    secret = torch.tensor([1.0, 1234.5, 2.0, 1234.5, 3.0])
    packed = pack(Array(None, secret[::2]))
    assert torch.tensor([1234.5]).numpy().tobytes() not in bytes(packed.data)
    assert len(packed.data) == 12


def test_a_repeated_dimension_travels_once() -> None:
    row = torch.randn(10)
    assert len(pack(Array(None, row.expand(1000, 10))).data) == 40
    assert len(pack(Array(None, torch.tensor(1.0).expand(1000, 1000))).data) == 4
    assert_arrives(row.expand(1000, 10))


def test_what_arrives_is_its_own() -> None:
    tensor = torch.zeros(3)
    data = bytearray(encode(Frame(1, (Put(7, pack(Array(None, tensor))),))))
    (put,) = decode(bytes(data), Frame).messages
    first, second = unpack(put.value), unpack(put.value)  # type: ignore[union-attr]
    first.add_(1)
    assert torch.equal(second, tensor)
    assert torch.equal(tensor, torch.zeros(3))


# -- messages ---------------------------------------------------------------------------------------------

TYPE = TensorType("float32", (2,), (1,))
ARRAY = Array(TYPE, b"\0" * 8)
FAILURE = Failure(3, 4, "mm.default", "RuntimeError: no", writes=True)
CALL = Call(
    "op.overload",
    (None, True, False, 0, -1, 2**63 - 1, -(2**63), 1.5, float("inf"), "text", Ref(5), Complex(1.0, -2.0)),
    {"dtype": Symbol("dtype", "float32"), "many": Items((None, Ref(1), Items((1, 2.0, True)), Items(())))},
    (0, 6, 7),
)
MESSAGES: tuple[Message, ...] = (
    Put(1, ARRAY),
    CALL,
    Drop((2, 3)),
    Heard(7),
    Fetch((1, 2)),
    Fetch(()),
    Describe((3,)),
    Seed(ARRAY),
    Tag(4, ("#a", "#b"), "of mice"),
    Search(("#a",)),
    Search(()),
    Clear(),
    Open("heart"),
    Load("heart", (8, 9)),
    Load("heart", (8,), 2**40, (Column("x", "float32", (13,)),)),
    Mock("heart"),
    Statistics("heart", Statistic("histogram", "x", (0.0, 1.0, 2.0), (3,)), 0.5),
    Define(Program((Input("x", 1, TYPE, updates=True),), (CALL,), (("y", 6),), (("lr", 2),))),
    Run("5f" * 32, (1,), (8,), (0.5,)),
    Request((6,), "for the paper"),
    Status("request-1"),
    Submit("ab" * 32, (1, 2), "for science", 3),
    Evaluate("heart", "ab" * 32, (1, "x", "y"), (0.0, 1.0)),
    Evaluate("heart", "ab" * 32, (2, "x"), (-0.5, 0.5), "for science", 3),
    Update((1, 2), (3, 4)),
)
OWNED = Owned("heart", (Column("x", "float32", (13,)), Column("y", "int64", ())), 2**40, ("#heart",), "of Cleveland")
RESULTS = (
    Value((ARRAY, FAILURE)),
    Types((ARRAY.type, FAILURE, None)),
    Found((Info(1, TensorType("complex64", (2, 3), (3, 1), 4, "cuda:0", conj=True, neg=True), ("#a",), "words"),)),
    Found(()),
    Found((), (OWNED, OWNED, msgspec.structs.replace(OWNED, unit="person", mock=9))),
    Mocked((ARRAY, ARRAY)),
    Mocked(()),
    Updated((ARRAY, ARRAY), 0.25),
    Noised((0.5, -1.0), 0.25, 0.5, 2.0),
    Requested("request-1", "denied", "not for this"),
)


def test_every_kind_of_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(Message.__args__)  # type: ignore[attr-defined]
    assert {type(result) for result in RESULTS} == set(Result.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_every_message_travels(message: Message) -> None:
    frame = Frame(9, (message,))
    assert decode(encode(frame), Frame) == frame


def test_frames_and_replies_travel_whole() -> None:
    frame = Frame(2**40, MESSAGES)
    assert decode(encode(frame), Frame) == frame
    reply = Reply(3, RESULTS, (FAILURE, FAILURE), ((0, None), (4, 7)))
    assert decode(encode(reply), Reply) == reply
    assert decode(encode(Frame(0, ())), Frame) == Frame(0, ())
    assert decode(encode(Reply(0, (), ())), Reply) == Reply(0, (), ())


def test_a_truth_an_int_and_a_float_stay_what_they_are() -> None:
    sent = Call("op", (True, 1, 1.0, False, 0, 0.0, -0.0), {}, ())
    (found,) = decode(encode(Frame(1, (sent,))), Frame).messages
    assert [type(arg) for arg in found.args] == [type(arg) for arg in sent.args]  # type: ignore[union-attr]
    assert str(found.args[-1]) == "-0.0"  # type: ignore[union-attr]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=10),
    st.builds(Ref, st.integers(0, 2**63 - 1)),
    st.builds(Complex, st.floats(allow_nan=False), st.floats(allow_nan=False)),
    st.builds(Symbol, st.sampled_from(["dtype", "device", "layout", "memory_format"]), st.text(max_size=5)),
)
ARGS = st.recursive(SCALARS, lambda inner: st.builds(Items, st.lists(inner, max_size=4).map(tuple)), max_leaves=10)
IDS = st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple)
CALLS = st.builds(
    Call, st.text(max_size=12), st.lists(ARGS, max_size=4).map(tuple), st.dictionaries(st.text(max_size=5), ARGS), IDS
)


@FIXED
@given(st.lists(CALLS, max_size=3).map(tuple), st.integers(0, 2**63 - 1))
def test_every_call_travels(calls: tuple[Call, ...], number: int) -> None:
    frame = Frame(number, calls)
    found = decode(encode(frame), Frame)
    assert found == frame
    assert encode(found) == encode(frame)  # equal to the byte: True is not 1


# -- what is no message -----------------------------------------------------------------------------------


def read(data: bytes, body: Any) -> None:
    """All that a receiver does with bytes before torch or a worker sees them."""
    blob_sizes(decode(data, body))


def refused(data: bytes, body: Any = Frame) -> str:
    with pytest.raises(CodecError) as caught:
        read(data, body)
    return str(caught.value)


GOOD_FRAME = encode(Frame(5, (*MESSAGES, *MESSAGES)))
GOOD_REPLY = encode(Reply(5, RESULTS, (FAILURE,)))


def test_the_good_ones_are_read() -> None:
    read(GOOD_FRAME, Frame)
    read(GOOD_REPLY, Reply)


@pytest.mark.parametrize("body", [Frame, Reply])
def test_every_truncation_is_refused(body: Any) -> None:
    good = GOOD_FRAME if body is Frame else GOOD_REPLY
    for length in range(len(good)):
        refused(good[:length], body)
    refused(good + b"\0", body)


def mutated(count: int, seed: int) -> int:
    """Flip, insert and delete bytes in good frames and replies; return how many were refused."""
    rng = random.Random(seed)
    refusals = 0
    for number in range(count):
        body: Any = (Frame, Reply)[number % 2]
        data = bytearray(GOOD_FRAME if body is Frame else GOOD_REPLY)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.randrange(256)
                case 2:
                    data.insert(at, rng.randrange(256))
                case 3:
                    del data[at]
        try:
            read(bytes(data), body)
        except CodecError:
            refusals += 1
    return refusals


def test_damaged_frames_are_refused_or_read() -> None:
    count = 100_000
    assert count // 2 < mutated(count, seed=0) < count  # a flipped bit in a number or in elements is still a message


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_more_damaged_frames_are_refused_or_read(seed: int) -> None:
    count = 100_000
    assert count // 2 < mutated(count, seed) < count


@settings(FIXED, max_examples=500)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(data: bytes) -> None:
    for body in (Frame, Reply):
        with contextlib.suppress(CodecError):
            read(data, body)


def raw(*message: Any) -> bytes:
    """A frame with one message, given as plain lists: what a dishonest peer may write."""
    return msgspec.msgpack.encode([1, [list(message)]])


def put(type_: Any, data: Any) -> bytes:
    return raw("put", 1, ["array", type_, data])


def tensor_type(dtype: Any = "float32", shape: Any = (2,), stride: Any = (1,), *more: Any) -> list[Any]:
    return ["type", dtype, shape, stride, *more]


def test_the_writer_of_lies_can_tell_the_truth() -> None:
    read(put(tensor_type(), b"\0" * 8), Frame)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "truncated"),
        (b"\xc1", "not a Frame"),
        (msgspec.msgpack.encode([1, [["exec", "import os"]]]), "not a Frame: Invalid value 'exec'"),
        (raw("put"), "not a Frame"),
        (raw("ref", 1), "not a Frame"),
        (raw(), "not a Frame"),
        (raw("call", "op", [["pickle", "x"]], {}, []), "not a Frame: Invalid value 'pickle'"),
        (raw("call", "op", [["symbol", "module", "os"]], {}, []), "not a Frame: Invalid enum value 'module'"),
        (raw("call", "op", [b"bytes"], {}, []), "not a Frame"),
        (raw("call", "op", [{}], {}, []), "not a Frame"),
        (raw("call", 5, [], {}, []), "not a Frame"),
        (raw("call", "op", [], {1: 2}, []), "not a Frame"),
        (raw("call", "op", [], {}, ["1"]), "not a Frame"),
        (raw("call", "op", [2**64 - 1], {}, [1.5]), "not a Frame"),
        (raw("drop", None), "not a Frame"),
        (raw("fetch", 1), "not a Frame"),
        (msgspec.msgpack.encode([1]), "not a Frame"),
        (msgspec.msgpack.encode({"number": 1, "messages": []}), "not a Frame"),
        (msgspec.msgpack.encode([-1.5, []]), "not a Frame"),
        (put(None, b""), "an array came without its type"),
        (put(tensor_type("float33"), b"\0" * 8), "unknown dtype 'float33'"),
        (put(tensor_type("os.system"), b"\0" * 8), "unknown dtype 'os.system'"),
        (put(tensor_type("qint8"), b"\0" * 2), "unknown dtype 'qint8'"),
        (put(tensor_type("float8_e8m0fnu"), b"\0" * 2), "unknown dtype"),
        (put(tensor_type(shape=(-2,)), b"\0" * 8), "is no tensor's type"),
        (put(tensor_type(shape=(-2, -1), stride=(1, 1)), b"\0" * 8), "is no tensor's type"),
        (put(tensor_type(stride=(-1,)), b"\0" * 8), "is no tensor's type"),
        (put(tensor_type("float32", (2,), (1,), -1), b"\0" * 8), "is no tensor's type"),
        (put(tensor_type(shape=(2, 1)), b"\0" * 8), "is no tensor's type"),
        (put(tensor_type(stride=()), b"\0" * 8), "is no tensor's type"),
        (put(tensor_type(shape=(1,) * 65, stride=(1,) * 65), b"\0" * 4), "is no tensor's type"),
        (put(tensor_type(), b"\0" * 7), "float32[2] came with 7 bytes, expected 8"),
        (put(tensor_type(), b"\0" * 9), "float32[2] came with 9 bytes, expected 8"),
        (put(tensor_type(), b""), "float32[2] came with 0 bytes, expected 8"),
        (put(tensor_type(shape=(0,)), b"\0"), "float32[0] came with 1 bytes, expected 0"),
        (put(tensor_type(shape=(1 << 62,)), b"\0" * 8), "came with 8 bytes, expected 18,446,744,073,709,551,616"),
        (put(tensor_type(shape=(1 << 63, 1 << 63), stride=(1, 1)), b"\0" * 8), "came with 8 bytes"),
        (put(tensor_type(), "\0" * 8), "Expected `bytes | array`, got `str`"),
        (put(tensor_type(), [0, 0]), "not a Frame: "),
        (put(tensor_type(), None), "Expected `bytes | array`, got `None`"),
        (put(tensor_type(), {"__reduce__": "os.system"}), "Expected `bytes | array`, got `object`"),
        (put(tensor_type(), msgspec.msgpack.Ext(5, b"\0" * 8)), "Expected `bytes | array`, got `ext`"),
        (raw("seed", ["array", tensor_type(), b""]), "came with 0 bytes"),
    ],
)  # fmt: skip
def test_lies_are_refused(data: bytes, text: str) -> None:
    assert text in refused(data)


def test_replies_are_not_trusted_either() -> None:
    lie = msgspec.msgpack.encode([1, [["value", [["array", tensor_type(), b""]]]], []])
    assert "came with 0 bytes" in refused(lie, Reply)
    assert "not a Reply" in refused(GOOD_FRAME, Reply)
    assert "not a Frame" in refused(GOOD_REPLY, Frame)


def places(tree: Any) -> Iterator[list[Any]]:
    """Every list in a tree of lists, from the outside in."""
    if isinstance(tree, list):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from places(item)


def structs(tree: list[Any]) -> list[list[Any]]:
    """The lists that are a struct's fields, not a sequence: they begin with a tag or, for columns, a name."""
    tags = {"array", "complex", "failure", "info", "items", "owned", "program", "ref", "symbol", "type", "x", "y"}
    tags |= {one.__struct_config__.tag for one in (*Message.__args__, *Result.__args__)}  # type: ignore[attr-defined]
    return [node for node in places(tree) if node is tree or (node and isinstance(node[0], str) and node[0] in tags)]


@pytest.mark.parametrize("body", [Frame, Reply])
def test_one_field_too_many_is_refused_wherever_it_stands(body: Any) -> None:
    """What one side means and the other does not know must not be passed over."""
    good = GOOD_FRAME if body is Frame else GOOD_REPLY
    count = len(structs(msgspec.msgpack.decode(good)))
    assert count > 15
    for number in range(count):
        tree = msgspec.msgpack.decode(good)
        structs(tree)[number].append(None)
        assert "Expected `array` of " in refused(msgspec.msgpack.encode(tree), body)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (["types", [["type", "float32", [-2], [1]]]], "a number is negative"),
        (["types", [["type", "float32", [2], []]]], "1 dimensions with 0 strides"),
        (["types", [["type", "float32", [2] * 65, [1] * 65]]], "at most 64"),
        (["types", [["type", "float32", [2], [1], 0, "cpu", True]]], "has the conjugate bit"),
        (["found", [["info", 1, ["type", "float32", [2], [-1]], [], ""]]], "a number is negative"),
        (["found", [], [["owned", "heart", [["x", "float32", [-1]]], 1, [], ""]]], "Expected `int` >= 0"),
        (["found", [], [["owned", "heart", [], -1, [], ""]]], "Expected `int` >= 0"),
        (["value", [["failure", 1, -1, "op", "reason", False]]], "Expected `int` >= 0"),
    ],
)
def test_types_and_counts_without_elements_are_checked_too(result: list[Any], text: str) -> None:
    assert text in refused(msgspec.msgpack.encode([1, [result], []]), Reply)


def test_a_dtype_that_does_not_travel_may_be_described() -> None:
    reply = Reply(1, (Types((TensorType("float8_e8m0fnu", (2,), (1,)),)),), ())
    read(encode(reply), Reply)


@pytest.mark.parametrize(
    "message",
    [Fetch((2**64,)), Fetch((-(2**63) - 1,)), Call("op", (10**30,), {}, ()), Tag(1, (), "\ud800"), Search(("\udfff",))],
    ids=repr,
)
def test_what_has_no_bytes_is_one_error_for_the_sender_too(message: Message) -> None:
    with pytest.raises(CodecError, match="a Frame that does not travel"):
        encode(Frame(1, (message,)))


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"])
def test_text_that_is_no_utf_8_is_refused_wherever_it_stands(text: bytes) -> None:
    """msgspec raises `UnicodeDecodeError` for it, which is not of its own errors."""
    packed = bytes((0xA0 | len(text),)) + text
    refused(b"\x92\x01\x91\x92" + packed + b"\x01")  # a tag
    refused(b"\x92\x01\x91\x92\xa4open" + packed)  # a field
    refused(b"\x92\x01\x91\x95\xa4call\xa2op\x91" + packed + b"\x80\x90")  # an argument
    refused(b"\x92\x01\x91\x95\xa4call\xa2op\x90\x81" + packed + b"\xc0\x90")  # a name
    with pytest.raises(CodecError):
        decode_control(b"\x92\xa7refused" + packed)


def test_of_two_arguments_of_one_name_the_last_is_meant() -> None:
    (call,) = decode(b"\x92\x01\x91\x95\xa4call\xa2op\x90\x82\xa1a\x01\xa1a\x02\x90", Frame).messages
    assert isinstance(call, Call)
    assert call.kwargs == {"a": 2}


@pytest.mark.parametrize("size", [2**16, 2**31, 2**32 - 1])
def test_declared_sizes_are_not_believed(size: int) -> None:
    """A header that announces gigabytes costs nothing: the bytes must be there."""
    length = size.to_bytes(4, "big")
    for header in (b"\xdd", b"\xdf", b"\xdb", b"\xc6"):  # list, map, text, bytes
        assert "truncated" in refused(header + length) or header != b"\xdd"
        refused(b"\x92\x01" + header + length)
        refused(b"\x92\x01\x91\x93\xa3put\x01\x93\xa5array\xc0" + header + length)
        refused(b"\x92\x01\x91\x95\xa4call\xa2op" + header + length)


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    items = b"\x92\xa5items\x91" * depth + b"\xc0"
    refused(b"\x92\x01\x91\x95\xa4call\xa2op\x91" + items + b"\x80\x90")
    refused(b"\x92\x01\x91\x93\xa3put\x01\x93\xa5array\xc0" + b"\x91" * depth + b"\xc0")
    refused(b"\x91" * depth)


def test_shallow_nesting_is_read() -> None:
    arg: Any = None
    for _ in range(50):
        arg = Items((arg,))
    frame = Frame(1, (Call("op", (arg,), {}, ()),))
    assert decode(encode(frame), Frame) == frame


def test_a_frame_that_is_too_long_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_HEAD_BYTES", len(GOOD_FRAME) - 1)
    assert "at most" in refused(GOOD_FRAME)
    monkeypatch.setattr(codec, "MAX_HEAD_BYTES", len(GOOD_FRAME))
    read(GOOD_FRAME, Frame)


def test_a_codec_error_is_a_protocol_error() -> None:
    assert issubclass(CodecError, ProtocolError)


# -- what torch would see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(2,), (1 << 40,), (1 << 62,)])
def test_gaps_between_elements_are_refused_before_anything_is_allocated(stride: tuple[int, ...]) -> None:
    with pytest.raises(CodecError, match="elements of storage, 2 came"):
        unpack(Array(TensorType("float32", (2,), stride), b"\0" * 8))


def test_elements_of_what_arrives_lie_within_what_arrived() -> None:
    for shape, stride, count in [((2, 2), (1, 1), 4), ((2, 2), (2, 1), 4), ((3, 2), (0, 1), 2), ((2,), (1,), 2)]:
        value = unpack(Array(TensorType("float32", shape, stride), b"\0" * (4 * count)))
        assert type_of(value).shape == shape
        assert value.untyped_storage().nbytes() == 4 * count


LIES_TO_TORCH = [
    TensorType("float32", (0, 1 << 63), (1, 1)),
    TensorType("float32", (0, 2), (1 << 63, 1)),
    TensorType("float32", (1 << 62, 4), (0, 0)),
    TensorType("float32", (1 << 63,), (0,)),
    TensorType("float32", (1,), (1 << 63,)),
    TensorType("float32", (1,), (1,), conj=True),
]


@pytest.mark.parametrize("type_", LIES_TO_TORCH, ids=range(len(LIES_TO_TORCH)))
def test_types_that_torch_cannot_make_are_codec_errors(type_: TensorType) -> None:
    data = b"" if 0 in type_.shape else b"\0" * 4
    with pytest.raises(CodecError):
        unpack(Array(type_, data))


def test_a_dtype_that_does_not_travel_is_refused_by_the_sender() -> None:
    with pytest.raises(CodecError, match="float8_e8m0fnu"):
        pack(Array(None, torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu)))
