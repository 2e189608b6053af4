"""What several releases cost together.

NOTE [Two currencies]
Statistics and metrics are epsilon-differentially private, and their epsilons add up (Dwork and Roth 2014, theorem
3.16). Updates are rho-zero-concentrated differentially private, and their rhos add up (Bun and Steinke 2016, lemma
1.7), which is worth having: k of them cost some sqrt(k) of what one does, not k. Both stay true where each is chosen by
the answers so far, as long as the sum is held below a limit (Rogers and others 2016; Feldman and Zrnic 2021,
"Individual privacy accounting via a Renyi filter"). What is spent of a budget of (epsilon, delta) is the sum of the
epsilons, and the epsilon that all rhos together are at that delta. Sums are exact, of the decimal numbers as they are
written.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Cost", "epsilon_of", "exact"]


class Cost(NamedTuple):
    """Pure differential privacy, and zero-concentrated."""

    epsilon: Fraction = Fraction()
    rho: Fraction = Fraction()

    def also(self, other: Cost) -> Cost:
        """Of both together."""
        return Cost(self.epsilon + other.epsilon, self.rho + other.rho)

    def at(self, delta: float) -> Fraction | float:
        """The epsilon that this is at this delta; infinite if there is none."""
        if not self.rho:
            return self.epsilon
        return self.epsilon + Fraction(epsilon_of(float(self.rho), delta)) if delta else math.inf


def epsilon_of(rho: float, delta: float) -> float:
    """The epsilon for which what is rho-zero-concentrated is (epsilon, delta)-differentially private: the least over
    all orders a > 1 of a rho + log(1 - 1 / a) + log(1 / (a delta)) / (a - 1), each of which holds (Canonne, Kamath and
    Steinke 2020, corollary 13). `rho` and `delta` are greater than 0."""

    def at(power: float) -> float:
        beyond = math.exp(power)  # the order less one
        return (1 + beyond) * rho - math.log1p(1 / beyond) - (math.log(delta) + math.log1p(beyond)) / beyond

    # The order is near 1 + sqrt(log(1 / delta) / rho); by thirds around that, as a power of e.
    middle = 0.5 * math.log(max(-math.log(delta), 1e-3) / rho)
    low, high = middle - 10, middle + 10
    for _ in range(200):
        third = (high - low) / 3
        if at(low + third) < at(high - third):
            high -= third
        else:
            low += third
    return max(0.0, at((low + high) / 2)) * (1 + 1e-12)


def exact(value: float) -> Fraction:
    """The decimal number that a float prints as: what somebody wrote."""
    return Fraction(repr(float(value)))
