"""A folder of images, one sub-folder a class, as torchvision's ImageFolder has them. Read with Pillow.

Pixels are as stored: an orientation note (EXIF) is not applied.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from .records import Records, Request

__all__ = ["read_images"]

# The closed table of formats: Pillow's own name by suffix. Others of its many decoders are never tried.
_FORMATS = {
    ".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".pgm": "PPM", ".png": "PNG", ".ppm": "PPM", ".tif": "TIFF",
    ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
_MODES: dict[str, tuple[int, Any]] = {
    "L": (1, np.uint8),
    "RGB": (3, np.uint8),
    "RGBA": (4, np.uint8),
    "I;16": (1, np.uint16),
}
_CLUTTER = {"Thumbs.db", "desktop.ini"}


def read_images(folder: Path, request: Request) -> Records:
    """`image`: uint8 (uint16 for 16-bit grey) of (channels, height, width); `label`: the sub-folder's place among
    the sorted names. All images are of one size, or scaled to `request.size` (bilinear, the aspect not kept), and of
    one mode. `DataError` names what stands in the way; hidden files are passed by."""
    files, classes = _files(folder)
    shape, dtype = _shape(files, folder, request)
    # One allocation; every header has been read, so it is what the images fill.
    images = np.empty((len(files), *shape), dtype)
    steps = request.progress(enumerate(files), "decoding images", len(files))
    for index, (path, _) in steps:
        pixels = _pixels(path, request.size)
        if pixels.shape != shape:
            raise DataError(f"{path} has pixels {pixels.shape}, its header said {shape}")
        images[index] = pixels
    columns = {
        "image": torch.from_numpy(images),
        "label": torch.tensor([label for _, label in files], dtype=torch.int64),
    }
    return Records(
        {name: column for name, column in columns.items() if request.wants(name)},
        {"label": classes} if request.wants("label") else {},
        left_out=tuple(name for name in columns if not request.wants(name)),
    )


def _files(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Every image with its class number, in order of class and name, and the classes' names."""
    inner = _visible(folder)
    for path in inner:
        if not path.is_dir():
            raise DataError(
                f"{path} lies beside the classes: a folder of images holds one sub-folder a class, as in "
                f"{folder / 'CLASS' / path.name}; move it there, or out of the folder"
            )
    files = [(path, label) for label, place in enumerate(inner) for path in _visible(place)]
    for path, _ in files:
        if path.is_dir() or path.suffix.lower() not in _FORMATS:
            raise DataError(
                f"{path} is no image of a known kind ({' '.join(sorted(_FORMATS))}): convert it, or move it out of the "
                "folder"
            )
    if not files:
        raise DataError(f"{folder} holds no images: expected one sub-folder a class, with images in it")
    return files, tuple(path.name for path in inner)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _CLUTTER)


def _shape(files: list[tuple[Path, int]], folder: Path, request: Request) -> tuple[tuple[int, int, int], Any]:
    """The one shape and dtype of all images, from their headers. `DataError` counts what differs."""
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    for path, _ in request.progress(files, "reading headers", len(files)):
        with _opened(path) as image:
            sizes[(image.height, image.width)] += 1
            modes[image.mode] += 1
    if len(modes) > 1 or not set(modes) <= set(_MODES):
        raise DataError(
            f"{folder} has images of mode {_counted(modes)}, expected one of {', '.join(_MODES)} throughout: convert "
            "them first"
        )
    if len(sizes) > 1 and request.size is None:
        shown = Counter({f"{height}x{width}": count for (height, width), count in sizes.items()})
        raise DataError(f"{folder} has images of height x width {_counted(shown)}: choose one with --size HxW")
    channels, dtype = _MODES[next(iter(modes))]
    return (channels, *(request.size or next(iter(sizes)))), dtype


def _counted(counts: Counter[str]) -> str:
    shown = ", ".join(f"{what} ({count:,})" for what, count in counts.most_common(5))
    return shown + (f" and {len(counts) - 5:,} more" if len(counts) > 5 else "")


def _pillow(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:  # comes with matplotlib; reading npz must not need it
        raise DataError(f"{path}: reading images needs Pillow: pip install pillow") from None
    return Image


def _opened(path: Path) -> Any:
    """The image, its header read and its pixels not. `DataError` for another format than the suffix says."""
    pillow = _pillow(path)
    kind = _FORMATS[path.suffix.lower()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            return pillow.open(path, formats=(kind,))
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise DataError(f"{path} is no {kind} image: {error}; replace it, or take it out of the folder") from None


def _pixels(path: Path, size: tuple[int, int] | None) -> np.ndarray[Any, Any]:
    """(channels, height, width)."""
    with _opened(path) as image:
        try:
            if size is not None and size != (image.height, image.width):
                image = image.resize((size[1], size[0]), _pillow(path).Resampling.BILINEAR)  # Pillow: (width, height)
            pixels = np.asarray(image)
        except Exception as error:  # as above
            raise DataError(f"{path} cannot be decoded: {error}; replace it, or take it out of the folder") from None
    return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[np.newaxis]
