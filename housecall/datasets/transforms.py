"""Transforms of images. Their law: torchvision's results to the last bit, one image or many at once.

A transform is called with one image. One that has `.batch` as well takes many in a tensor and returns exactly what
the calls would have returned, stacked; `batch_of` finds it. Both paths do the same elementwise operations in the
same order, which is why they agree in every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

__all__ = ["Compose", "Normalize", "ToTensor", "batch_of"]

MODES = {"I": np.int32, "I;16": np.int16, "F": np.float32}  # Pillow's wide modes, as torchvision reads them


class Compose:
    """Transforms one after the other. Has `.batch` if there is a part and all parts have it."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        """The image, transformed by each in turn."""
        for transform in self.transforms:
            image = transform(image)
        return image

    @property
    def batch(self) -> Callable[[Tensor], Tensor]:
        """Many images at once, uint8 (N, H, W), bit-equal to one by one. AttributeError where a part has no `batch`."""
        parts = [batch_of(transform) for transform in self.transforms]
        found = [part for part in parts if part is not None]
        if not parts or len(found) < len(parts):
            raise AttributeError("this Compose has no batch: not all of its transforms have one")

        def chain(images: Tensor) -> Tensor:
            for part in found:
                images = part(images)
            return images

        return chain

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.transforms))}])"


class ToTensor:
    """An image as a tensor (C, H, W): uint8 becomes floats in [0, 1] of torch's default dtype, float32 as a rule.

    Takes a Pillow image, or a numpy array (H, W) or (H, W, C). As in torchvision, values that are not uint8 keep
    their dtype and scale. UsageError for anything else.
    """

    def __call__(self, image: Any) -> Tensor:
        """One image as a tensor (C, H, W)."""
        pixels = _pixels(image)
        planes = torch.from_numpy(pixels[:, :, None] if pixels.ndim == 2 else pixels).permute(2, 0, 1).contiguous()
        return _unit(planes) if planes.dtype == torch.uint8 else planes

    def batch(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W) to floats (N, 1, H, W) in [0, 1]."""
        if images.dtype != torch.uint8 or images.ndim != 3:
            raise UsageError(f"ToTensor.batch takes uint8 images (N, H, W), found {_shown(images)}")
        return _unit(images.unsqueeze(1))

    def __repr__(self) -> str:
        return "ToTensor()"


class Normalize:
    """(image - mean) / std for each channel of a float image (..., C, H, W); `inplace` writes into the image."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self.mean = mean
        self.std = std
        self.inplace = inplace

    def __call__(self, image: Tensor) -> Tensor:
        """One float image (..., C, H, W), normalised. UsageError for other tensors and for a std of zero."""
        if not isinstance(image, Tensor):
            raise UsageError(f"Normalize takes a tensor, found a {type(image).__name__}; put ToTensor() before it")
        if not image.is_floating_point() or image.ndim < 3:
            raise UsageError(
                f"Normalize takes a float image (..., C, H, W), found {_shown(image)}; put ToTensor() first"
            )
        mean, std = (self._plane(image, name) for name in ("mean", "std"))
        if (std == 0).any():
            raise UsageError(f"Normalize would divide by zero: std {self.std!r} as {image.dtype} has a zero")
        return (image if self.inplace else image.clone()).sub_(mean).div_(std)

    def batch(self, images: Tensor) -> Tensor:
        """Float images (N, C, H, W), normalised."""
        return self(images)

    def _plane(self, image: Tensor, name: str) -> Tensor:
        values = torch.as_tensor(getattr(self, name), dtype=image.dtype, device=image.device)
        plane = values.view(-1, 1, 1) if values.ndim == 1 else values
        channels = image.shape[-3]
        if plane.ndim and plane.shape[0] not in (1, channels):
            raise UsageError(f"Normalize has {plane.shape[0]} values for {name}, but the image has {channels} channels")
        return plane

    def __repr__(self) -> str:
        return f"Normalize(mean={self.mean}, std={self.std})"


def batch_of(transform: Any) -> Callable[[Tensor], Tensor] | None:
    """`transform.batch` if it has one; not of a subclass that overrides `__call__` alone, which it would bypass."""
    for kind in type(transform).__mro__:
        if "batch" in vars(kind):
            break
        if "__call__" in vars(kind):
            return None
    batch = getattr(transform, "batch", None)
    return batch if callable(batch) else None


def _unit(planes: Tensor) -> Tensor:
    return planes.to(torch.get_default_dtype()).div(255)


def _pixels(image: Any) -> np.ndarray[Any, Any]:
    """The pixels in memory of their own: what comes out must not change with the image it came from."""
    mode = getattr(image, "mode", None)
    if isinstance(image, np.ndarray):
        pixels = image.copy()
    elif isinstance(mode, str):  # Pillow's images have a mode; asking for the class would import Pillow
        pixels = np.array(image, dtype=MODES.get(mode), copy=True)
        pixels = pixels.astype(np.uint8) * 255 if mode == "1" else pixels
    else:
        raise UsageError(f"ToTensor takes a Pillow image or a numpy array, found a {type(image).__name__}")
    if pixels.ndim not in (2, 3):
        raise UsageError(f"ToTensor takes an image (H, W) or (H, W, C), found an array of shape {pixels.shape}")
    return pixels


def _shown(images: Any) -> str:
    return f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
