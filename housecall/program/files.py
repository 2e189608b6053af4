"""Programs on disk: one line that says what the file is, then the program's canonical encoding. Never code.

What must live here: the file's form, both halves. What must not: torch, values.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import ProgramError
from .call import Program
from .check import check

__all__ = ["MOST_BYTES", "load_program", "save_program"]

MOST_BYTES = 64 << 20
_HEAD = b"housecall program, version 1\n"
_DECODER = msgspec.msgpack.Decoder(Program)


def save_program(program: Program, path: str | Path) -> None:
    """Write a program to a file. Raises `ProgramError` for one that may not run, which nobody could load."""
    check(program)
    Path(path).write_bytes(_HEAD + program.encoded())


def load_program(path: str | Path) -> Program:
    """Read and check a program from a file; its digest is what it was when saved. Raises `ProgramError` for a file that
    holds none, or one that breaks a rule."""
    with Path(path).open("rb") as file:
        data = file.read(MOST_BYTES + len(_HEAD) + 1)
    if not data.startswith(_HEAD):
        raise ProgramError(f"{path} is no file of a program; one begins with the line '{_HEAD.decode().strip()}'")
    if len(data) > MOST_BYTES + len(_HEAD):
        raise ProgramError(f"{path} is longer than the {MOST_BYTES:,} bytes that a program may have")
    try:
        program = _DECODER.decode(data[len(_HEAD) :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ProgramError(f"{path} is damaged: {str(error)[:300]}") from None
    check(program)
    return program
