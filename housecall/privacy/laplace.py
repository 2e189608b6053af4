"""Noise that hides one record, or one person: drawn exactly, in whole numbers.

What must live here: sampling, which imports neither torch nor numpy. What must not: what is measured, how much it may
cost, floating point.

NOTE [Whole numbers]
Laplace noise made of floats does not keep its promise: the low bits of a sum tell which sum it was (Mironov 2012, "On
significance of the least significant bits for differential privacy"). So what is to be noised is a whole number of
steps of a public grid, and so is its noise: the discrete Laplace distribution, sampled without rounding (Canonne,
Kamath and Steinke 2020, "The discrete Gaussian for differential privacy", algorithms 1 and 2). How long that takes
depends on what is drawn, never on what it is added to.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from fractions import Fraction

__all__ = ["Below", "laplace", "noised"]

Below = Callable[[int], int]  # a whole number from 0 on below this one, each as likely: `secrets.randbelow`


def noised(total: int, scale: Fraction, below: Below = secrets.randbelow) -> int:
    """A whole number that may leave: with Laplace noise of this scale; 0 is none."""
    return total + laplace(scale, below) if scale else total


def laplace(scale: Fraction, below: Below = secrets.randbelow) -> int:
    """z with probability (e^(1/scale) - 1) / (e^(1/scale) + 1) * e^(-|z| / scale). Added to a whole number that one
    record, or person, changes by d at most, it is (d / scale)-differentially private."""
    top, bottom = scale.numerator, scale.denominator
    while True:
        part = below(top)
        if not _is_exp(part, top, below):
            continue
        whole = 0
        while _is_exp(1, 1, below):
            whole += 1
        size = (part + top * whole) // bottom
        negative = below(2)
        if size or not negative:  # or zero would come twice as often
            return -size if negative else size


def _is_exp(top: int, bottom: int, below: Below) -> bool:
    """True with probability e^(-top / bottom), which is at most 1 and at least 1 / e."""
    count = 1
    while below(bottom * count) < top:
        count += 1
    return count % 2 == 1
