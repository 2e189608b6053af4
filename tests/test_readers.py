"""Readers: what is written comes back equal, and what is damaged, lies, or is unclear is refused by name."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import math
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.torch import save_file

from housecall.errors import DataError, HousecallError, UsageError
from housecall.owned.readers.files import converted, read
from housecall.owned.readers.records import Request

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = ("bool", "u1", "i1", "<u2", ">i2", "<u4", "<i4", ">u8", "<i8", "<f2", "<f4", ">f4", "<f8", "<c8", "<c16")
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
)


def same(tensor: torch.Tensor, array: np.ndarray[Any, Any]) -> None:
    found = tensor.numpy()
    assert found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, array)


def npz(path: Path, **columns: np.ndarray[Any, Any]) -> Path:
    np.savez_compressed(path, **columns)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def idx(array: np.ndarray[Any, Any]) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[array.dtype.str[1:]]
    head = bytes((0, 0, code, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


# -- what is written comes back equal -------------------------------------------------------------------------


@quick
@given(arrays)
def test_npz_comes_back(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=array, y=np.asfortranarray(array))
        records = read([tmp_path / "a.npz"])
        assert list(records.columns) == ["x", "y"]
        same(records.columns["x"], array)
        same(records.columns["y"], array)


@quick
@given(arrays)
def test_safetensors_come_back(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    if array.dtype == np.complex128:  # which the format has not
        array = array.real
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    same(read([tmp_path / "a.safetensors"]).columns["x"], array)


@quick
@given(
    st.sampled_from(("u1", "i1", "<i2", "<i4", "<f4", "<f8")).flatmap(
        lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    )
)
def test_idx_comes_back(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    for name, content in {
        "x.idx": idx(array),
        "x.idx.gz": gzip.compress(idx(array)),
        "x-idx3-ubyte": idx(array),
        "x.idx3-ubyte.gz": gzip.compress(idx(array)),
    }.items():
        (tmp_path / name).write_bytes(content)
        records = read([tmp_path / name])
        assert list(records.columns) == ["x"]
        same(records.columns["x"], array)


@quick
@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text("ab ,\"'é", min_size=1))),
)
def test_csv_comes_back(tmp_path: Path, rows: list[tuple[int, float, str]]) -> None:
    rows = [(a, b, "v" + c.strip()) for a, b, c in rows]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("i", "f", "t"), *((a, repr(b), c) for a, b, c in rows)])
    records = read([tmp_path / "a.csv"], Request(labels=("t",)))
    assert records.columns["i"].tolist() == [row[0] for row in rows]
    assert records.columns["f"].tolist() == [row[1] for row in rows]
    assert [records.classes["t"][code] for code in records.columns["t"]] == [row[2] for row in rows]
    if rows:
        assert records.columns["i"].dtype == torch.int64
        assert records.columns["f"].dtype == torch.float64


@quick
@given(arrays)
def test_parquet_comes_back(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    if array.dtype.kind == "c":
        array = array.real
    array = array.astype(array.dtype.newbyteorder("="))
    column = pyarrow.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    parquet.write_table(pyarrow.table({"x": column, "n": np.arange(len(array))}), tmp_path / "a.parquet")
    records = read([tmp_path / "a.parquet"])
    same(records.columns["x"], array)
    assert records.columns["n"].tolist() == list(range(len(array)))


def images(folder: Path, sizes: dict[str, tuple[int, int]], mode: str = "RGB") -> dict[str, np.ndarray[Any, Any]]:
    """PNG files of noise: `sizes` is 'class/name' -> (width, height)."""
    generator = np.random.default_rng(0)
    made = {}
    for name, (width, height) in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (height, width, 3) if mode == "RGB" else (height, width)
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        if mode == "I;16":
            pixels = pixels.astype(np.uint16) * 257
        Image.fromarray(pixels).save(path)
        made[name] = pixels
    return made


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_a_folder_of_images_comes_back(tmp_path: Path, mode: str) -> None:
    made = images(tmp_path / "pets", {"dog/b.png": (4, 3), "cat/z.png": (4, 3), "dog/a.png": (4, 3)}, mode)
    (tmp_path / "pets" / ".DS_Store").touch()
    (tmp_path / "pets" / "dog" / "Thumbs.db").touch()
    seen: list[tuple[str, int]] = []

    def progress(items: Any, what: str, count: int) -> Any:
        seen.append((what, count))
        return items

    records = read([tmp_path / "pets"], Request(progress=progress))
    assert records.classes == {"label": ("cat", "dog")}
    assert records.columns["label"].tolist() == [0, 1, 1]
    for image, name in zip(records.columns["image"], ("cat/z.png", "dog/a.png", "dog/b.png"), strict=True):
        assert image.shape == (3 if mode == "RGB" else 1, 3, 4)
        expected = made[name] if mode == "RGB" else made[name][..., None]
        np.testing.assert_array_equal(image.numpy(), np.moveaxis(expected, -1, 0))
    assert [count for _, count in seen] == [3, 3]


def test_images_are_scaled_only_if_asked(tmp_path: Path) -> None:
    images(tmp_path, {"cat/a.png": (4, 3), "cat/b.png": (5, 3)})
    with pytest.raises(DataError, match=r"height x width 3x4 \(1\), 3x5 \(1\): choose one with --size"):
        read([tmp_path])
    assert read([tmp_path], Request(size=(6, 2))).columns["image"].shape == (2, 3, 6, 2)
    with pytest.raises(UsageError, match="at least 1x1"):
        read([tmp_path], Request(size=(0, 2)))


def _mixed(folder: Path) -> None:
    images(folder, {"cat/a.png": (4, 3)})
    images(folder, {"cat/b.png": (4, 3)}, "L")


def _truncated(folder: Path) -> None:
    images(folder, {"cat/a.png": (40, 30)})
    path = folder / "cat" / "a.png"
    path.write_bytes(path.read_bytes()[:200])


def _bomb(folder: Path) -> None:
    images(folder, {"cat/a.png": (4, 3)})
    path = folder / "cat" / "a.png"
    head = b"IHDR" + struct.pack(">II", 10_000, 10_000) + b"\x08\x02\0\0\0"
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (head, b"IDAT")
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: None, "holds no images"),
        (lambda folder: (folder / "cat").mkdir(), "holds no images"),
        (
            lambda folder: images(folder, {"a.png": (4, 3)}),
            r"a\.png lies beside the classes: .* as in .*CLASS/a\.png; move it there",
        ),
        (lambda folder: images(folder, {"cat/deep/a.png": (4, 3)}), "deep is no image"),
        (lambda folder: (images(folder, {"cat/a.png": (4, 3)}), text(folder / "cat" / "a.txt", "x")), r"a\.txt is no"),
        (lambda folder: ((folder / "cat").mkdir(), text(folder / "cat" / "a.png", "x")), r"a\.png is no PNG image"),
        (lambda folder: ((folder / "cat").mkdir(), _gif(folder / "cat" / "a.png")), r"a\.png is no PNG image"),
        (_mixed, r"mode RGB \(1\), L \(1\)"),
        (_truncated, r"a\.png cannot be decoded"),
        (_bomb, r"a\.png is no PNG image: .*decompression bomb"),
    ],
)
def test_unfit_folders_of_images(tmp_path: Path, make: Callable[[Path], Any], reason: str) -> None:
    (tmp_path / "pets").mkdir()
    make(tmp_path / "pets")
    with pytest.raises(DataError, match=reason):
        read([tmp_path / "pets"])


def _gif(path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 3)).save(buffer, "GIF")
    path.write_bytes(buffer.getvalue())


# -- npz: nothing is unpickled, nothing is allocated that the file cannot fill --------------------------------


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("unpickled",)


def member(shape: str, dtype: str = "<f4", content: bytes = b"", version: int = 1) -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(head)) + head + content


def archive(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def lie(path: Path, promised: int) -> Path:
    """Let the archive's index say that its member has so many bytes, as does the local header."""
    content = path.read_bytes()
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    size = struct.pack("<I", promised)
    content = content[: local + 22] + size + content[local + 26 : central + 24] + size + content[central + 28 :]
    path.write_bytes(content)
    return path


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    array = np.empty(1, object)
    array[0] = Trap()
    with pytest.raises(DataError, match=r"'x' holds Python objects, which are never unpickled"):
        read([npz(tmp_path / "a.npz", x=array)])
    archive(tmp_path / "b.npz", ("x.npy", pickle.dumps(Trap())))
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("b.npz", "c.npz"):
        with pytest.raises(DataError, match=r"cannot be read as a \.npz file"):
            read([tmp_path / name])


HUGE = f"({2**40}, {2**20})"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: archive(path, ("x.npy", member(HUGE))), "promises 4,611,686,018,427,387"),
        (lambda path: archive(path, ("x.npy", member(f"({2**200},)"))), "promises .* bytes, but the archive says"),
        (lambda path: lie(archive(path, ("x.npy", member("(1000000000,)", "|u1"))), 10**9 + 77), "more than its"),
        (
            lambda path: lie(
                archive(path, ("x.npy", member("(1000000000,)", "|u1")), method=zipfile.ZIP_DEFLATED), 10**9 + 77
            ),
            "more than its",
        ),
        (lambda path: archive(path, ("x.npy", member("(4,)"))), "promises"),
        (lambda path: archive(path, ("x.npy", member("(1,)", content=b"12345678"))), "promises"),
        (lambda path: archive(path, ("x.npy", member("(-4,)"))), "which no array has"),
        (lambda path: archive(path, ("x.npy", member("(1,)", content=b"1234", version=3))), r"version \(3, 0\)"),
        (lambda path: archive(path, ("x.npy", member("(1,)", "<U1", b"a\0\0\0"))), "holds <U1, expected"),
        (lambda path: archive(path, ("x.npy", member("(1,)", "<M8[s]", bytes(8)))), "holds datetime64"),
        (lambda path: archive(path, ("x.npy", member("()", content=b"1234"))), "'x' is a single value"),
        (lambda path: archive(path, ("x.txt", b"hello")), r"'x\.txt', which is no array"),
        (lambda path: archive(path, ("x.npy", member("(1,)", content=b"1234")), method=zipfile.ZIP_LZMA), "method 14"),
        (lambda path: archive(path, ("x.npy", b"")), "cannot be read"),
        (lambda path: text(path, "PK"), "cannot be read"),
    ],
)
def test_unfit_archives(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    path = make(tmp_path / "a.npz")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=reason) as error:
            read([path])
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # numpy tells tracemalloc what it allocates
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_stands_once_in_an_archive(tmp_path: Path) -> None:
    content = member("(1,)", content=b"1234")
    with pytest.raises(DataError, match=r"'x\.npy' twice"):
        read([archive(tmp_path / "a.npz", ("x.npy", content), ("x.npy", content))])


def test_a_damaged_archive_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(1000, np.uint8))
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        read([path])


@pytest.mark.parametrize("suffix", [".npz", ".idx", ".idx.gz", ".safetensors", ".parquet", ".csv"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_give_one_kind_of_error(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    content = bytearray(valid(tmp_path, suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(HousecallError):  # anything else is a failure; some changes do no harm
        read([path])


def valid(folder: Path, suffix: str) -> bytes:
    """The content of a small file of this kind."""
    path = folder / f"valid{suffix}"
    if path.exists():
        return path.read_bytes()
    array = np.arange(12, dtype="<f4").reshape(4, 3)
    if suffix == ".npz":
        np.savez(path, x=array)
    elif suffix.startswith(".idx"):
        path.write_bytes(gzip.compress(idx(array)) if suffix.endswith(".gz") else idx(array))
    elif suffix == ".safetensors":
        save_file({"x": torch.from_numpy(array)}, path)
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"x": array[:, 0]}), path)
    else:
        path.write_text("a,b\n1,2\n3,4\n")
    return path.read_bytes()


# -- idx ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "starts with nothing"),
        (b"\x1f\x8b\x08\0", "starts with 1f8b0800"),
        (b"\0\0\x07\x01\0\0\0\0", "starts with 00000701"),
        (b"\0\0\x08\x02\0\0\0\x01", "cut short within its header"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**20, 2**20, 2**20), r"promises 1048576 × 1048576 × 1048576 elements"),
        (b"\0\0\x0e\xff" + b"\xff" * 4 * 255, "which no array has"),
    ],
)
def test_unfit_idx_files(tmp_path: Path, content: bytes, reason: str, packed: bool) -> None:
    path = tmp_path / ("x.idx.gz" if packed else "x.idx")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=reason):
        read([path])


def test_idx_files_end_where_their_header_says(tmp_path: Path) -> None:
    content = idx(np.arange(100, dtype=np.uint8))
    for change in (content[:-1], content + b"\0"):
        for name, packed in {"x.idx": change, "x.idx.gz": gzip.compress(change)}.items():
            (tmp_path / name).write_bytes(packed)
            with pytest.raises(DataError, match=r"promise|cut short"):
                read([tmp_path / name])


# -- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ("a;b\n1;2\n", "separated by something else than commas"),
        ("1,2\n3,4\n", "first row must be a header"),
        ("a,\n1,2\n", "column 2 has no name"),
        ("a,a\n1,2\n", "two columns are called 'a'"),
        ("a,b\n1,2\n3\n", r"row 3 has 1 cell\(s\), but its header has 2"),
        ("a,b\n1,2,3\n", r"row 2 has 3 cell\(s\)"),
        ("a,b\n1,2\n\n3,4\n", "row 3 is blank"),
        ("a,b\n1,x\n", r"column 'b' holds text \('x' in row 2\): number its values with --label 'b'"),
        ("a\n1_000\n", "holds text"),
        ("a\n1.0.0\n", "holds text"),
        ("a\n٣\n", "holds text"),
        ("a\n12\n007\n", "column 'a' holds '007' in row 3, whose leading zeros a number does not keep: .*--label 'a'"),
        ("a\n00.5\n", "leading zeros"),
        ("a,b\n1,2\n,3\n?,4\n", "column 'a' misses a value in rows 3, 4"),
        ("a,b\n" + "NA,1\n" * 9, "misses a value in rows 2, 3, 4, 5, 6 and 4 more"),
        ("a\nnan\n", "misses a value in row 2"),
        (f"a\n{2**63}\n", "row 2 that int64 does not hold"),
        (f"a\n{2**53 + 1}\n0.5\n", r"beyond 2\^53"),
        (f"a\n0.5\n{2**53 + 1}\n", r"beyond 2\^53"),
        ('a,b\n"1,2\n', "cannot be read"),
    ],
)
def test_unfit_csv_files(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read([text(tmp_path / "a.csv", content)])


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.raises(DataError, match="utf-8"):
        read([tmp_path / "a.csv"])


def test_what_a_csv_may_say(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "\ufeffage , bmi,sex\n+07, 1e3 ,f\n-8,-.5,m\n9,inf,f\n\n")
    records = read([path], Request(labels=("sex",)))
    assert records.columns["age"].tolist() == [7, -8, 9]
    assert records.columns["bmi"].tolist() == [1000.0, -0.5, math.inf]
    assert records.columns["sex"].tolist() == [0, 1, 0]
    assert records.classes == {"sex": ("f", "m")}


def test_codes_keep_their_leading_zeros_as_labels(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "postcode,zero,small\n01067,0,0.5\n1067,-0,0e05\n01067,+07,0.\n")
    records = read([path], Request(labels=("postcode",)))
    assert records.classes == {"postcode": ("01067", "1067")}
    assert records.columns["postcode"].tolist() == [0, 1, 0]
    assert records.columns["zero"].tolist() == [0, 0, 7]
    assert records.columns["small"].tolist() == [0.5, 0.0, 0.0]


def test_missing_values_become_nan_only_if_asked(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "a,b\n1,2\n?,3\n")
    records = read([path], Request(missing="nan"))
    assert records.columns["a"].dtype == torch.float64
    assert torch.equal(records.columns["a"].isnan(), torch.tensor([False, True]))
    assert records.columns["b"].dtype == torch.int64
    with pytest.raises(DataError, match="misses a label in row 3"):
        read([path], Request(missing="nan", labels=("a",)))


def test_integer_labels_are_sorted_as_integers(tmp_path: Path) -> None:
    records = read([text(tmp_path / "a.csv", "y\n10\n9\n10\n")], Request(labels=("y",)))
    assert records.classes == {"y": ("9", "10")}
    assert records.columns["y"].tolist() == [1, 0, 1]


def test_parquet_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def made(**columns: Any) -> Path:
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    names = pyarrow.array(["m", "f", "m"])
    for column in (names, names.dictionary_encode()):
        records = read([made(sex=column)], Request(labels=("sex",)))
        assert records.columns["sex"].tolist() == [1, 0, 1]
        with pytest.raises(DataError, match="'sex' holds text: number its values with --label 'sex'"):
            read([made(sex=column)])
    with pytest.raises(DataError, match="misses a value in row 2"):
        read([made(a=[1, None, 3])])
    records = read([made(a=[1, None, 3], b=[None, 0.5, 1.5])], Request(missing="nan"))
    assert records.columns["a"].isnan().tolist() == [False, True, False]
    assert records.columns["b"].isnan().tolist() == [True, False, False]
    with pytest.raises(DataError, match="cannot be read"):
        read([made(a=[2**53 + 1, None])], Request(missing="nan"))
    with pytest.raises(DataError, match=r"holds list<.* make its lists of one size .* or leave it out with --columns"):
        read([made(a=[[1], [2, 3]])])
    with pytest.raises(DataError, match="misses 1 whole list"):
        read([made(a=pyarrow.array([[1, 2], None], pyarrow.list_(pyarrow.int64(), 2)))])
    with pytest.raises(DataError, match="holds timestamp"):
        read([made(a=pyarrow.array([0], pyarrow.timestamp("s")))])
    with pytest.raises(DataError, match="holds double, expected text, integers or booleans"):
        read([made(a=[0.5])], Request(labels=("a",)))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'housecall\[parquet\]'"):
        read([text(tmp_path / "a.parquet", "PAR1")])


# -- how columns join -----------------------------------------------------------------------------------------


def test_files_join(tmp_path: Path) -> None:
    x, y = np.zeros((4, 2, 2), np.uint8), np.arange(4)
    (tmp_path / "t-images-idx3-ubyte").write_bytes(idx(x))
    files = [tmp_path / "t-images-idx3-ubyte", npz(tmp_path / "y.npz", y=y)]
    records = read(files, Request(columns={"image": ("t-images",), "label": ("y",)}))
    assert list(records.columns) == ["image", "label"]
    with pytest.raises(DataError, match=r"b\.npz: column 'z' has 3 records, but column 't-images' of .*ubyte has 4"):
        read([*files, npz(tmp_path / "b.npz", z=np.arange(3))])
    with pytest.raises(DataError, match=r"both .*y\.npz and .*c\.npz have a column 'y'"):
        read([*files, npz(tmp_path / "c.npz", y=y)])


def test_columns_are_grouped_as_asked(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "id,age,bmi,sex,name\n1,30,20.5,f,Ann\n2,40,21.5,m,Bob\n")
    records = read([path], Request(columns={"x": ("bmi", "age", "sex"), "y": ("sex",)}, labels=("sex",)))
    assert records.columns["x"].tolist() == [[20.5, 30.0, 0.0], [21.5, 40.0, 1.0]]
    assert records.sources == {"x": ("bmi", "age", "sex")}
    assert records.classes == {"x.sex": ("f", "m"), "y": ("f", "m")}
    assert records.left_out == ("id", "name")
    short = read([path], Request(columns={"x": ("bmi", "age")}, dtypes={"x": "float32"})).columns["x"]
    assert short.dtype == torch.float32


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(columns={"x": ("a", "z")}), "--columns x= z: no file has such a column; there are: a, "),
        (Request(labels=("z",)), "--label z: no file has such a column"),
        (Request(columns={"x": ("a",)}, labels=("b",)), "--label b: the column is left out"),
        (Request(dtypes={"z": "float32"}), "--dtype z: no file has such a column"),
        (Request(dtypes={"a": "object"}), "--dtype a=object: expected one of bool"),
        (Request(dtypes={"a": "int8"}), "--dtype a=int8: some of its int64 values do not fit"),
        (Request(size=(2, 2)), "--size is for folders of images"),
    ],
)
def test_unfit_requests(tmp_path: Path, request_: Request, reason: str) -> None:
    with pytest.raises(HousecallError, match=reason):
        read([text(tmp_path / "a.csv", "a,b\n1000,2\n")], request_)


def test_groups_need_one_number_a_record_and_one_dtype(tmp_path: Path) -> None:
    big = np.array([2**60 + 1])
    path = npz(tmp_path / "a.npz", x=np.zeros((1, 2)), a=big, b=np.zeros(1), u=big.astype(np.uint64))
    with pytest.raises(UsageError, match=r"'x' has \(2,\) a record, expected one number"):
        read([path], Request(columns={"g": ("a", "x")}))
    for other in ("b", "u"):
        with pytest.raises(DataError, match=rf"groups a int64, {other} .*choose --dtype g="):
            read([path], Request(columns={"g": ("a", other)}))


@pytest.mark.parametrize(
    ("values", "dtype", "fits"),
    [
        (torch.tensor([0.1], dtype=torch.float64), "float32", True),
        (torch.tensor([0.1, math.nan, math.inf], dtype=torch.float64), "bfloat16", True),
        (torch.tensor([1e300], dtype=torch.float64), "float32", False),
        (torch.tensor([1e30]), "float64", True),
        (torch.tensor([1.0, 2.0]), "int64", True),
        (torch.tensor([1.5]), "int64", False),
        (torch.tensor([math.nan]), "int64", False),
        (torch.tensor([255]), "uint8", True),
        (torch.tensor([-1]), "uint8", False),
        (torch.tensor([2**24 + 1]), "float32", False),
        (torch.tensor([2]), "bool", False),
        (torch.tensor([1.0]), "complex64", True),
    ],
)
def test_conversions_keep_the_values(values: torch.Tensor, dtype: str, fits: bool) -> None:
    if fits:
        assert str(converted(values, dtype, "x").dtype) == f"torch.{dtype}"
    else:
        with pytest.raises(DataError, match="do not fit"):
            converted(values, dtype, "x")


def test_imaginary_parts_are_not_dropped() -> None:
    with pytest.raises(UsageError, match="would lose its imaginary part"):
        converted(torch.tensor([1j]), "float32", "x")


def test_options_that_no_file_can_follow(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", y=np.arange(3))
    table = text(tmp_path / "b.csv", "z\n1\n2\n3\n")
    with pytest.raises(UsageError, match="--label and --missing are for csv and parquet"):
        read([path], Request(missing="nan"))
    with pytest.raises(UsageError, match=r"--label y: .*a\.npz gives numbers"):
        read([path, table], Request(labels=("y",)))
    with pytest.raises(UsageError, match="no file was named"):
        read([])


@pytest.mark.parametrize("name", ["a.pt", "a.pkl", "a.npy", "a.zip", "a", "idx"])
def test_other_kinds_of_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        read([tmp_path / name])
    with pytest.raises(DataError, match=r"of no known kind: expected \.csv"):
        read([text(tmp_path / name, "x")])
