"""Make housecall/datasets/writers.npz from QMNIST's two label files: who wrote each digit of MNIST.

    python tools/writers.py QMNIST_FOLDER

QMNIST's rows are checked to be MNIST's records in MNIST's order: its labels, written as MNIST's label file, must
have that file's MD5.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import sys
from pathlib import Path

import numpy as np

from housecall.datasets.fetch import FILES

TARGET = Path(__file__).parent.parent / "housecall" / "datasets" / "writers.npz"
SPLITS = {"train": ("train-labels-idx1-ubyte", 60_000), "test": ("t10k-labels-idx1-ubyte", 10_000)}


def rows(path: Path) -> np.ndarray:
    """QMNIST's table, int32 (N, 8): label, series, writer, and five columns more."""
    content = gzip.decompress(path.read_bytes())
    kind, dimensions = content[2], content[3]
    count, width = struct.unpack(">2I", content[4:12])
    if (kind, dimensions, width) != (12, 2, 8):
        sys.exit(
            f"{path} is not QMNIST's: idx type {kind}, {dimensions} dimensions, {width} columns; expected 12, 2, 8"
        )
    return np.frombuffer(content, ">i4", offset=12).reshape(count, width)


def check(labels: np.ndarray, name: str) -> None:
    """End the run unless the labels are those of MNIST's file `name`, in its order."""
    content = struct.pack(">2I", 0x801, len(labels)) + labels.tobytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != FILES[name][1]:
        sys.exit(f"QMNIST's labels are not those of {name}: MD5 {found}, expected {FILES[name][1]}")


def main(folder: Path) -> None:
    """Check both splits and write the table."""
    columns: dict[str, np.ndarray] = {}
    for split, (name, count) in SPLITS.items():
        table = rows(folder / f"qmnist-{split}-labels-idx2-int.gz")[:count]
        labels = table[:, 0].astype(np.uint8)
        check(labels, name)
        columns[f"{split}_label"] = labels
        columns[f"{split}_series"] = table[:, 1].astype(np.uint8)
        columns[f"{split}_writer"] = table[:, 2].astype(np.uint16)
    np.savez_compressed(TARGET, **columns)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes, {', '.join(columns)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
