"""MNIST with torchvision's signature and results, and, beyond it, who wrote each digit.

The law: a record is the same whichever way it is asked for, alone or in a batch, and so is its writer: record i of
this set is row i of QMNIST's table, which `writers.npz` holds (tools/writers.py made it and checked every label).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .fetch import fetch, load
from .transforms import batch_of

__all__ = ["MNIST"]

SERIES = {"students": 4, "clerks": 0}  # NIST's series of forms: high-school students, census clerks
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class MNIST(Dataset[tuple[Any, Any]]):
    """Handwritten digits: 60,000 records to train with, or 10,000 to test with (`train=False`).

    `.data`: uint8 (N, 28, 28). `.targets`: int64 (N,). A record is `(image, label)`: a Pillow image of 28 × 28 in
    grey (a numpy array where Pillow is not installed) and an int, each after its transform if there is one.

    Files lie in root/MNIST/raw, as torchvision has them, or packed there or in root. `download=True` brings what is
    missing; see `fetch` for the sources. DataError if a file is missing or is not MNIST's.
    """

    classes = [f"{digit} - {word}" for digit, word in enumerate(DIGITS)]  # noqa: RUF012  # a list, as in torchvision

    def __init__(
        self,
        root: str | PathLike[str],
        train: bool = True,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.root = Path(root).expanduser()
        self.train = train
        self.transform = transform
        self.target_transform = target_transform
        if download:
            fetch(self.root)
        self.data, self.targets = _read("train" if train else "t10k", self.root)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """The label of each class, as in torchvision."""
        return {name: label for label, name in enumerate(self.classes)}

    @property
    def raw_folder(self) -> str:
        """Where its files lie unpacked, or would, as in torchvision."""
        return str(self.root / "MNIST" / "raw")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Record `index`: (image, label). IndexError past the end."""
        image: Any = _image(self.data[index])
        if self.transform is not None:
            image = self.transform(image)
        return image, self._label(int(self.targets[index]))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """The records at `indices`, all images transformed at once where that is the same: a loader's fast path."""
        batch = batch_of(self.transform)
        # A subclass with its own records is asked for them one by one: the fast path would pass it by.
        if batch is None or type(self).__getitem__ is not MNIST.__getitem__ or len(indices) == 0:
            return [self[index] for index in indices]
        chosen = torch.as_tensor(indices)
        labels = self.targets[chosen].tolist()
        return [(image, self._label(label)) for image, label in zip(batch(self.data[chosen]), labels, strict=True)]

    def writers(self) -> Tensor:
        """Who wrote each record: writer numbers of QMNIST's, int64 (N,). No writer is in both train and test."""
        return self._column("writer")

    def owners(self) -> dict[str, list[int]]:
        """The records of 'students' and of 'clerks': two populations who write differently. Indices, ascending."""
        series = self._column("series")
        return {owner: torch.nonzero(series == number).flatten().tolist() for owner, number in SERIES.items()}

    def clients(self) -> dict[int, list[int]]:
        """The records of each writer, by writer number: 539 writers in train, 297 in test. Indices, ascending."""
        writers: dict[int, list[int]] = {}
        for index, writer in enumerate(self.writers().tolist()):
            writers.setdefault(writer, []).append(index)
        return dict(sorted(writers.items()))

    def _label(self, label: int) -> Any:
        return label if self.target_transform is None else self.target_transform(label)

    def _column(self, name: str) -> Tensor:
        column = torch.from_numpy(_table()[f"{'train' if self.train else 'test'}_{name}"].astype(np.int64))
        if len(column) != len(self):
            raise DataError(
                f"the set has {len(self):,} records, the table of writers {len(column):,}: `.data` was changed, so "
                "rows no longer match; ask a whole MNIST for its writers, and select by index"
            )
        return column

    def __repr__(self) -> str:
        split = "train" if self.train else "test"
        return f"MNIST({split}, {len(self):,} records, root={str(self.root)!r}, transform={self.transform!r})"


@cache
def _table() -> dict[str, np.ndarray[Any, Any]]:
    """Columns `train_` and `test_` of `label`, `series` and `writer`: one row for each record."""
    with resources.files(__package__).joinpath("writers.npz").open("rb") as file, np.load(file) as table:
        return dict(table)


def _read(split: str, root: Path) -> tuple[Tensor, Tensor]:
    images, labels = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    data, targets = parse_idx(load(images, root), images, 3), parse_idx(load(labels, root), labels, 1)
    if len(data) != len(targets):
        raise DataError(f"{images} has {len(data):,} images, but {labels} has {len(targets):,} labels")
    return data, targets.long()


def parse_idx(content: bytes, name: str, dimensions: int) -> Tensor:
    """An idx file of unsigned bytes as a uint8 tensor of so many dimensions. DataError if it is anything else."""
    header = 4 + 4 * dimensions
    expected = bytes((0, 0, 8, dimensions))
    if content[:4] != expected:
        raise DataError(
            f"{name} starts with {content[:4].hex() or 'nothing'}, expected {expected.hex()}: not such an idx file"
        )
    if len(content) < header:
        raise DataError(f"{name} has {len(content)} bytes, but its header alone has {header}: it is cut short")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    promised = int(np.prod(shape, dtype=object))
    if len(content) - header != promised:
        sizes = " × ".join(map(str, shape))
        raise DataError(
            f"{name} has {len(content) - header:,} bytes after its header, which promises {sizes} = {promised:,}: "
            "it is cut short or damaged; remove it and pass download=True"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def _image(pixels: Tensor) -> Any:
    array = pixels.numpy()
    try:
        from PIL import Image
    except ImportError:  # Pillow comes with matplotlib; where it does not, ToTensor takes the array as well
        return array
    return Image.fromarray(array)
