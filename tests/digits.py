"""A stand-in for MNIST where the real files are not at hand: ten classes of noisy 28 x 28 patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Digits(Dataset[Any]):
    """MNIST's signature, a few hundred records, no files."""

    def __init__(
        self, root: str | Path, train: bool = True, transform: Callable[..., Any] | None = None, download: bool = False
    ) -> None:
        count = 320 if train else 100
        generator = np.random.default_rng(0 if train else 1)
        self.targets = torch.arange(count) % 10
        patterns = np.random.default_rng(2).integers(0, 256, (10, 28, 28))
        noise = generator.integers(-40, 40, (count, 28, 28))
        self.data = torch.from_numpy((patterns[self.targets.numpy()] + noise).clip(0, 255).astype(np.uint8))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        image = self.data[index].numpy()
        return (self.transform(image) if self.transform else image), int(self.targets[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def owners(self) -> dict[str, list[int]]:
        return {"students": list(range(0, len(self), 4)), "clerks": [n for n in range(len(self)) if n % 4]}
