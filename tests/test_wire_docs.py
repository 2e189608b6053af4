"""The specification of the wire is what the code does: its page is written from it, and its examples can be read by
somebody who has only the page."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from tool import tool

from housecall.transport.parcel import Assembler
from housecall.transport.stream import PROTOCOL
from housecall.wire import messages
from housecall.wire.messages import Frame, Put
from housecall.wire.packets import packets

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "wire.md").read_text()


@pytest.fixture(scope="module")
def wire() -> Any:
    return tool("tools/wire.py")


def test_the_page_is_what_the_code_says(wire: Any) -> None:
    assert wire.page(PAGE) == PAGE, "docs/wire.md is out of date: python tools/wire.py"


def test_a_page_without_a_block_is_an_error(wire: Any) -> None:
    with pytest.raises(ValueError, match="<!-- limits -->"):
        wire.page(PAGE.replace("<!-- limits -->", ""))


def test_every_struct_is_on_the_page() -> None:
    for name in set(messages.__all__) - {"Control", "Message", "Result"}:
        assert re.search(rf"^\| {name} \| `\[", PAGE, re.M), f"{name} is missing"


def test_the_page_names_the_version() -> None:
    assert f"This is version {PROTOCOL}." in PAGE


# -- a reader that knows the page and nothing else ---------------------------------------------------------


class Example(NamedTuple):
    title: str
    packet: bytes
    reading: str


def examples() -> list[Example]:
    found = []
    for title, text in re.findall(r"^(\S[^\n]*):\n\n```text\n(0000 .*?)\n```", PAGE, re.M | re.S):
        dump, _, reading = text.partition("\n\n")
        data = b"".join(bytes.fromhex(line[6:53]) for line in dump.splitlines() if line[:4].strip())
        more = re.search(r"and ([\d,]+) bytes more", dump)
        data += bytes(int(more[1].replace(",", ""))) if more else b""  # what is left out are zeros
        found.append(Example(title, data, reading))
    return found


def test_the_examples_are_found() -> None:
    assert len(examples()) == 8
    assert {example.packet[0] for example in examples()} == {0, 1}


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.title[:20])
def test_an_example_says_what_stands_below_it(example: Example) -> None:
    kind, rest = example.packet[0], example.packet[1:]
    if kind == 0:
        assert example.reading.startswith("control  ")
        assert same(example.reading.removeprefix("control"), msgspec.msgpack.decode(rest))
        return
    number, acknowledged, size = struct.unpack_from("<QQQ", rest)
    head = msgspec.msgpack.decode(rest[24 : 24 + size])
    assert f"number {number}, acknowledged {acknowledged}, head of {size} bytes" in example.reading
    assert head[0] == number
    line = re.search(r"^head +(.*)$", example.reading, re.M)
    assert line is not None
    assert same(line[1], head)
    assert sum(blobs(head)) == len(rest) - 24 - size


def same(text: str, tree: Any) -> bool:
    """Whether the page's text of a tree is that tree: JSON, with byte strings as <hexadecimal>."""

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node]
        return f"<{node.hex()}>" if isinstance(node, bytes) else node

    return bool(msgspec.json.decode(re.sub(r"(<[0-9a-f]*>)", r'"\1"', text)) == plain(tree))


def blobs(tree: Any) -> list[int]:
    """The sizes of the blobs that a head names, in order."""
    if not isinstance(tree, list):
        return []
    if tree[:1] == ["blob"]:
        return [tree[1]]
    return [size for item in tree for size in blobs(item)]


def test_a_frame_made_by_the_page_is_read() -> None:
    """Written with a MessagePack library and the page: a transposed tensor with a repeated dimension, as a blob."""
    elements = torch.arange(6.0)
    type_ = ["type", "float32", [4, 3, 2], [0, 1, 3], 0, "cpu"]  # fields with defaults are left out
    head = msgspec.msgpack.encode([1, [["put", 7, ["array", type_, ["blob", 24]]], ["drop", [7]]]])
    whole = b"\x01" + struct.pack("<QQQ", 1, 0, len(head)) + head + elements.numpy().tobytes()
    sent = [whole[:40], *(b"\x02" + whole[at : at + 10] for at in range(40, len(whole), 10))]
    assembler = Assembler(Frame)
    *early, last = [assembler.feed(packet) for packet in sent]
    assert early == [None] * len(early)
    assert last is not None
    put = last[1].messages[0]
    assert isinstance(put, Put)
    assert torch.equal(put.value.data, elements.view(2, 3).t().expand(4, 3, 2))


def test_the_diagram_of_a_begin_packet_is_true() -> None:
    (packet,) = packets(2, 3, (b"head", b"blob"))
    assert packet == b"\x01" + struct.pack("<QQQ", 2, 3, 4) + b"headblob"
