"""Where the caller's own code stands: the line that an error names.

What must live here: lines, and how they are found among the frames of torch and of this package. What must not: what
is done there.
"""

from __future__ import annotations

import linecache
import os
import sys
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .trace import Step

__all__ = ["Site", "Spot", "caller", "caller_again", "is_callers"]


class Site(NamedTuple):
    """A line of the caller's own code. Kept as code and instruction: the line is looked up if it is wanted."""

    code: CodeType
    instruction: int

    def __str__(self) -> str:
        line = next((n for start, end, n in self.code.co_lines() if start <= self.instruction < end and n), 0)
        name = self.code.co_filename
        source = linecache.getline(name, line).strip()
        return f"{name}:{line} in {self.code.co_name}" + (f": {source}" if source else "")


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_inside: dict[str, bool] = {}


def is_callers(filename: str) -> bool:
    """Whether a file belongs neither to torch nor to this package."""
    return not filename.startswith((_HERE, _TORCH))


def caller(depth: int = 1) -> Site | None:
    """The innermost line that belongs neither to torch nor to this package, from `depth` frames up."""
    frame: Any = sys._getframe(depth)
    while frame is not None:
        if not _is_inside(frame.f_code.co_filename):
            return Site(frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return None


def _is_inside(filename: str) -> bool:
    try:
        return _inside[filename]
    except KeyError:
        inside = _inside[filename] = not is_callers(filename)
        return inside


class Spot:
    """A place in this package that callers come to, and where the last of them was found."""

    __slots__ = ("site",)

    def __init__(self) -> None:
        self.site: tuple[int, Site] | None = None


def caller_again(spot: Step | Spot) -> Site | None:
    """`caller`, for a step or another spot that may have been reached from the same line before: that many frames up,
    it is looked for first. Walking up through torch's own frames costs as much as all else of a step."""
    known: tuple[int, Site] | None = spot.site
    if known is not None:
        depth, site = known
        try:
            frame: Any = sys._getframe(depth)
        except ValueError:
            frame = None
        if frame is not None and frame.f_code is site.code and frame.f_lasti == site.instruction:
            return site
    depth, frame = 1, sys._getframe(1)
    while frame is not None and _is_inside(frame.f_code.co_filename):
        depth, frame = depth + 1, frame.f_back
    if frame is None:
        return None
    found = Site(frame.f_code, frame.f_lasti)
    spot.site = depth, found
    return found
