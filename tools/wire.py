"""Write the tables and examples of `docs/wire.md` from the code: all between `<!-- NAME -->` and `<!-- end -->`.

A test fails if the page is not what this writes. `python tools/wire.py`
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch

from housecall.host import host, room
from housecall.host.config import Limits
from housecall.host.host import Host
from housecall.program.call import Arg, Call, Complex, Input, Items, Program, Symbol
from housecall.transport import grpc, stream
from housecall.transport.parcel import HEAD_COST, INLINE, INLINE_TOGETHER, MAX_BLOB_BYTES, packed
from housecall.types import Ref, TensorType
from housecall.wire import codec, packets
from housecall.wire.messages import (
    Ack,
    Array,
    Blob,
    Bye,
    Column,
    Control,
    Failure,
    Fetch,
    Frame,
    Hello,
    Info,
    Message,
    Owned,
    Put,
    Refused,
    Reply,
    Result,
    Statistic,
    Value,
    Welcome,
)

PAGE = Path(__file__).parent.parent / "docs" / "wire.md"

# What a message is answered by, in `Reply.results`. A message that is not listed asks for nothing.
ANSWERS = {
    "Fetch": "`Value`",
    "Describe": "`Types`",
    "Search": "`Found`",
    "Open": "`Found`",
    "Mock": "`Mocked`",
    "Statistics": "`Noised`",
    "Evaluate": "`Noised`, or `Requested`",
    "Update": "`Updated`",
    "Request": "`Requested`",
    "Submit": "`Requested`",
    "Status": "`Requested`",
}
SENDERS = {"Hello": "client", "Welcome": "worker", "Refused": "worker", "Ack": "client; worker may", "Bye": "client"}
PARTS = (Array, Blob, TensorType, Ref, Complex, Symbol, Items, Program, Input, Failure, Info, Owned, Column, Statistic)
CODES = {
    "version": "`Hello.version` is not the worker's; `reason` says which is",
    "identity": "the certificate was revoked: at a Hello, at a frame, before a step of one or a packet of an answer, "
    "and within two seconds where nothing happens; or it has ended, at a Hello",
    "session": "the worker was restarted, the lease has ended, or the token is another's: these are not told apart; or "
    "the worker had an error of its own, and says so",
    "draining": "the worker shuts down: no new sessions; those there are get the replies to what was done first",
    "protocol": "something arrived that this page does not allow; the session is over, but for a Hello: then only its "
    "stream is, and a session that it was to resume stays",
    "limit": "the worker has as many sessions as it takes, or as it takes of this principal; or the session's answers "
    "that nobody has read, or a frame whose rest does not come, take more room than they may: then it is over",
}
EXAMPLES: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    ("The client asks for a new session", (packets.control(Hello(stream.PROTOCOL, "", 0, "another client 1.0")),)),
    (
        "The worker gives one",
        (packets.control(Welcome(stream.PROTOCOL, "5f" * 16, 0, 300.0, 1 << 30, "clinic")),),
    ),
    (
        "Frame 1: send `[1.0, 2.0]` as slot 1, bind `add.Tensor(%1, %1)` to slot 2, fetch it",
        tuple(
            packed(
                Frame(
                    1,
                    (
                        Put(1, Array(None, torch.tensor([1.0, 2.0]))),
                        Call("add.Tensor", (Ref(1), Ref(1)), {"alpha": 1}, (2,)),
                        Fetch((2,)),
                    ),
                )
            ).packets(0)
        ),
    ),
    ("Its reply", tuple(packed(Reply(1, (Value((Array(None, torch.tensor([2.0, 4.0])),)),), ())).packets(1))),
    (
        "Frame 2, after reply 1 came: a tensor of 1,025 float32 zeros follows the head as a blob",
        tuple(packed(Frame(2, (Put(3, Array(None, torch.zeros(1025))),))).packets(1)),
    ),
    ("The client has reply 2", (packets.control(Ack(2)),)),
    ("The worker refuses to go on", (packets.control(Refused("protocol", "one is missing")),)),
    ("The client ends the session", (packets.control(Bye()),)),
)
SHOWN = 144  # bytes of a packet that are printed


def kinds(union: Any) -> tuple[Any, ...]:
    """The structs of a union."""
    return get_args(union)


_ARG = {name for kind in kinds(Arg) if isinstance(name := getattr(kind, "__name__", None), str)}


def written(type_: Any) -> str:
    """A type as the page writes it: `[int]` is an array of integers."""
    match type_:
        case msgspec.inspect.IntType(ge=0):
            return "count"
        case msgspec.inspect.VarTupleType(item_type=item):
            return f"[{written(item)}]"
        case msgspec.inspect.TupleType(item_types=items):
            return f"[{', '.join(map(written, items))}]"
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return f"{{{written(key)}: {written(value)}}}"
        case msgspec.inspect.StructType(cls=kind):
            return str(kind.__name__)
        case msgspec.inspect.LiteralType(values=values):
            return " or ".join(f'"{value}"' for value in values)
        case msgspec.inspect.UnionType(types=types):
            names = [written(one) for one in types]
            if len(names) == len(kinds(Arg)) and {"Ref", "Complex", "Symbol", "Items"} <= set(names):
                return "Arg"
            if set(names) == {one.__name__ for one in kinds(Message)}:
                return "Message"
            if set(names) == {one.__name__ for one in kinds(Result)}:
                return "Result"
            return " or ".join(sorted(names, key="nil".__eq__))
        case _:
            return {"NoneType": "nil", "BytesType": "bin"}.get(
                type(type_).__name__, type(type_).__name__.removesuffix("Type").lower()
            )


def layout(kind: Any) -> str:
    """A struct as the array that travels: `["drop", id: int]`."""
    info: Any = msgspec.inspect.type_info(kind)
    fields = [] if info.tag is None else [f'"{info.tag}"']
    for field in info.fields:
        default = "" if field.required else f" = {plain(field.default)}"
        fields.append(f"{field.name}: {written(field.type)}{default}")
    return f"[{', '.join(fields)}]"


def plain(value: Any) -> str:
    """A default as the page writes it."""
    return "[]" if value == () else msgspec.json.encode(value).decode()


def meaning(kind: Any) -> str:
    """What a struct's docstring says."""
    return " ".join(inspect.cleandoc(kind.__doc__).split()).replace("|", "\\|")


def table(heads: str, rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown; `heads` are separated by semicolons."""
    names = heads.split("; ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def frames() -> str:
    """The messages of a frame."""
    rows = [
        (kind.__name__, f"`{layout(kind)}`", ANSWERS.get(kind.__name__, "nothing"), meaning(kind))
        for kind in kinds(Message)
    ]
    return table("message; layout; answered by; meaning", rows)


def plain_table(union: Iterable[Any]) -> str:
    """Structs, without who sends them."""
    return table("name; layout; meaning", [(kind.__name__, f"`{layout(kind)}`", meaning(kind)) for kind in union])


def controls() -> str:
    """The control messages."""
    rows = [(kind.__name__, f"`{layout(kind)}`", SENDERS[kind.__name__], meaning(kind)) for kind in kinds(Control)]
    return table("message; layout; sent by; meaning", rows)


def refusals() -> str:
    """The codes of `Refused`."""
    info: Any = msgspec.inspect.type_info(Refused)
    (codes,) = [field.type.values for field in info.fields if field.name == "code"]
    return table("code; when", [(f"`{code}`", CODES[code]) for code in sorted(codes, key=list(CODES).index)])


def dtypes() -> str:
    """The dtypes that travel, by size."""
    sizes = sorted(set(codec.ITEM_BYTES.values()))
    rows = [(str(size), ", ".join(f"`{name}`" for name, n in codec.ITEM_BYTES.items() if n == size)) for size in sizes]
    return table("bytes; dtypes", rows)


def bytes_text(count: int) -> str:
    """A size that people read: 67,108,864 (64 MiB)."""
    for unit, step in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << step and not count % (1 << step):
            return f"{count:,} bytes ({count >> step} {unit})"
    return f"{count:,} bytes"


def limits() -> str:
    """What is bounded, by how much, and by whom."""
    options = dict(grpc._SERVER_OPTIONS)
    defaults = {name: one.default for name, one in inspect.signature(Host).parameters.items()}
    rows = [
        ("packet", bytes_text(packets.MAX_PACKET), "the sender, who cuts"),
        (
            "gRPC message, as received and after gRPC's own decompression",
            bytes_text(options["grpc.max_receive_message_length"]),
            "gRPC, which ends the stream",
        ),
        ("head", bytes_text(codec.MAX_HEAD_BYTES), "`read_begin`, from the declared length: nothing is kept yet"),
        (
            "tensors as blobs, of one frame together",
            f"`Welcome.frame_bytes`; {Limits().frame_mb:,} MB unless the owner says otherwise (`frame_mb`)",
            "the assembler, from the declared sizes: nothing is allocated yet",
        ),
        ("tensors as blobs, of one reply together", bytes_text(MAX_BLOB_BYTES), "the same, at the client"),
        (
            "elements within the head",
            f"{bytes_text(INLINE)} a tensor, {bytes_text(INLINE_TOGETHER)} together",
            "the sender; a reader takes what the head holds",
        ),
        ("dimensions of a tensor", f"{codec.MAX_DIMS}", "the codec"),
        ("nesting within a head", "Python's recursion limit, some hundreds of levels", "the codec"),
        ("integers", "64 bits: -2^63 to 2^64 - 1", "the codec; what an operator takes is fewer, and its own to say"),
        ("time until a stream's Hello", f"{host.HELLO_S:g} s", "the worker"),
        ("frames that came and wait for their turn", f"{host.INBOX_FRAMES}", "the worker: it reads no further"),
        (
            "tensors of all frames that are on their way or wait for their turn, of all sessions together",
            f"{Limits().inbox_mb:,} MB unless the owner says otherwise (`inbox_mb`); one principal has half of it, one "
            "session a quarter; a single frame has room whatever its size, when it is alone",
            "the worker: it reads no further, oldest first",
        ),
        (
            "their heads, each byte counted as what it may become",
            f"{host.HEAD_BYTES // HEAD_COST:,} bytes, shared likewise",
            "the same",
        ),
        (
            "a frame that is on its way while others wait for its room",
            f"{room.ARRIVAL_S:g} s, and 1 s more for each {room.ARRIVAL_RATE / 1e6:g} MB of its tensors",
            "the worker: `Refused`, code `limit`",
        ),
        (
            "answers of one session that were not acknowledged",
            "`Welcome.frame_bytes`, and one answer more",
            "the worker: `Refused`, code `limit`",
        ),
        (
            "frames sent and not answered",
            f"{stream.WINDOW_FRAMES}, or {bytes_text(stream.WINDOW_BYTES)}",
            "the client: it sends no further",
        ),
        ("sessions of a worker", f"{defaults['seats']:,}", "the worker: `Refused`, code `limit`"),
        (
            "sessions of one principal",
            f"{defaults['seats_each']} unless the owner says otherwise (`sessions`)",
            "the worker: `Refused`, code `limit`",
        ),
        (
            "streams at a time, and so sessions that are not away",
            f"{inspect.signature(grpc.Listener).parameters['streams'].default}",
            "the worker: gRPC's `RESOURCE_EXHAUSTED`; a client may try again",
        ),
        ("lease", f"`Welcome.lease_s`; {defaults['lease_s']:g} s unless the owner says otherwise", "the worker"),
        (
            "silence of the network",
            f"{options['grpc.keepalive_time_ms'] // 1000} s until a ping, "
            f"{options['grpc.keepalive_timeout_ms'] // 1000} s for its answer",
            "gRPC, on both sides: the stream is broken",
        ),
    ]
    return table("what; at most; who holds to it, and when", rows)


def dump(packet: bytes) -> str:
    """Hexadecimal, 16 bytes a line, and the letters among them."""
    lines = []
    for at in range(0, min(len(packet), SHOWN), 16):
        part = packet[at : at + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:04x}  {part.hex(' '):<47}  {letters}")
    if len(packet) > SHOWN:
        lines.append(f"      ... and {len(packet) - SHOWN:,} bytes more")
    return "\n".join(lines)


def examples() -> str:
    """Packets as they travel, and what the MessagePack in them says."""
    parts = []
    for title, sent in EXAMPLES:
        for packet in sent:
            parts.append(f"{title}:\n\n```text\n{dump(packet)}\n\n{reading(packet)}\n```")
    return "\n\n".join(parts)


def reading(packet: bytes) -> str:
    """What a packet says, in a line or two."""
    if packet[0] == packets.CONTROL:
        return f"control  {values(msgspec.msgpack.decode(packet[1:]))}"
    begun = packets.read_begin(packet)
    head, blobs = begun.payload[: begun.head_bytes], begun.payload[begun.head_bytes :]
    text = f"begin    number {begun.number}, acknowledged {begun.acknowledged}, head of {begun.head_bytes} bytes\n"
    text += f"head     {values(msgspec.msgpack.decode(head))}"
    return text + (f"\nblobs    {len(blobs):,} bytes" if len(blobs) else "")


def values(tree: Any) -> str:
    """MessagePack as JSON, with byte strings in hexadecimal."""
    match tree:
        case list():
            return f"[{', '.join(map(values, tree))}]"
        case dict():
            return f"{{{', '.join(f'{values(key)}: {values(value)}' for key, value in tree.items())}}}"
        case bytes():
            return f"<{tree.hex()}>"
        case _:
            return msgspec.json.encode(tree).decode()


BLOCKS: dict[str, Callable[[], str]] = {
    "frames": frames,
    "results": lambda: plain_table(kinds(Result)),
    "bodies": lambda: plain_table((Frame, Reply)),
    "parts": lambda: plain_table(PARTS),
    "controls": controls,
    "refusals": refusals,
    "dtypes": dtypes,
    "limits": limits,
    "examples": examples,
}


def page(text: str) -> str:
    """The page with its blocks written anew. Raises `ValueError` if one is missing."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.S)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"docs/wire.md needs one block <!-- {name} --> ... <!-- end -->")
        made = f"<!-- {name} -->\n\n{block()}\n\n<!-- end -->"
        text = pattern.sub(made.replace("\\", r"\\"), text)
    return text


def main() -> None:
    """Write the page; with `--check` only say whether it is up to date."""
    old = PAGE.read_text()
    new = page(old)
    if "--check" in sys.argv:
        sys.exit(new != old)
    PAGE.write_text(new)
    print(f"docs/{PAGE.name} written")


if __name__ == "__main__":
    main()
