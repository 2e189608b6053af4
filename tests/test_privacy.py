"""Stages: what passes is bounded, noise is as it is specified, and costs add up to what they are."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from housecall.errors import PolicyError
from housecall.privacy import noise, pipeline
from housecall.privacy.accounting import Cost, epsilon_of, exact
from housecall.privacy.clip import Clip
from housecall.privacy.gaussian import gaussian, gaussian_one
from housecall.privacy.noise import Noise

CLIP, NOISE = Clip(norm=1.5), Noise(multiplier=4.0)
VECTORS = st.lists(st.floats(width=64) | st.sampled_from([0.0, 5e-324, 1e300, -1e-200]), max_size=40).map(np.array)


def row(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).reshape(-1)


# -- noise ------------------------------------------------------------------------------------------------------


def chi_square(found: list[int], scale: int, count: int) -> float:
    """How far counts are from those of the discrete Gaussian, and how many cells there are, as a normal deviate."""
    reach = 5 * scale
    weights = {z: math.exp(-(z**2) / (2 * scale**2)) for z in range(-reach, reach + 1)}
    total = sum(weights.values())
    cells = [(sum(value == z for value in found), count * weight / total) for z, weight in weights.items()]
    cells = [(seen, expected) for seen, expected in cells if expected >= 5]
    chi = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    degrees = len(cells) - 1
    return ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))  # Wilson and Hilferty


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_noise_has_exactly_its_distribution(bits: int) -> None:
    """Many at a time, and the plain twin one by one; both from the same kind of seeded source."""
    source = random.Random(bits + 7)
    many = gaussian(40_000, bits, source.randbytes).tolist()
    assert abs(chi_square(many, 1 << bits, 40_000)) < 4
    plain = [gaussian_one(1 << bits, source.randrange) for _ in range(4_000)]
    assert abs(chi_square(plain, 1 << bits, 4_000)) < 4


def test_a_fine_grid_has_the_moments_of_its_distribution() -> None:
    found = gaussian(200_000, 20, random.Random(1).randbytes) / 2**20
    assert abs(found.mean()) < 4 / math.sqrt(200_000)
    assert abs(found.std() - 1) < 4 / math.sqrt(400_000)
    for bound, share in ((1.0, 0.158655), (2.0, 0.022750), (3.0, 0.001350)):
        for tail in (found > bound, found < -bound):
            assert abs(tail.mean() - share) < 4 * math.sqrt(share / 200_000)


def test_noise_is_drawn_anew_each_time_and_follows_its_source() -> None:
    assert not np.array_equal(gaussian(100, 20), gaussian(100, 20))
    one, same = (gaussian(70_000, 4, random.Random(3).randbytes) for _ in range(2))
    assert np.array_equal(one, same)
    assert len(gaussian(0, 4)) == 0
    with pytest.raises(ValueError, match="expected 2\\^0 to 2\\^24"):
        gaussian(1, 25)


@given(st.lists(st.integers(-(2**62), 2**62), max_size=30))
def test_sums_of_squares_are_exact(values: list[int]) -> None:
    assert noise.sum_of_squares(np.array(values, dtype=np.int64)) == sum(value**2 for value in values)


# -- every stage ------------------------------------------------------------------------------------------------


@given(VECTORS, st.sampled_from([1e-9, 0.3, 1.5, 1e9]))
def test_what_was_clipped_is_no_longer_than_its_norm(update: Any, norm: float) -> None:
    found = Clip(norm=norm).passed(row(update))
    assert found.shape == row(update).shape
    assert np.isfinite(found).all()
    assert math.dist(found, np.zeros_like(found)) <= norm * (1 + 1e-9)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_clipping_keeps_the_direction_and_what_is_short_enough(update: list[float]) -> None:
    length = math.hypot(*update)
    found = Clip(norm=1.5).passed(row(update))
    factor = min(1.0, 1.5 / length) if length else 1.0
    assert found == pytest.approx([factor * value for value in update], rel=1e-9, abs=1e-12)


@given(VECTORS, st.sampled_from([1e-3, 1.0, 1e6]), st.sampled_from([0.01, 0.7, 8.0, 1e6]))
def test_what_noise_is_added_to_is_bounded_in_whole_steps(update: Any, norm: float, multiplier: float) -> None:
    """The promise stands on this: no two updates are further apart than twice the bound, to the last bit."""
    clipped = Clip(norm=norm).passed(row(update))
    steps = Noise(multiplier=multiplier).steps(clipped, norm)
    bound = Fraction(2**20) / Fraction(multiplier)
    assert sum(int(step) ** 2 for step in steps) <= bound**2
    step = multiplier * norm / 2**20
    assert clipped == pytest.approx(steps * step, abs=1.01 * step, rel=2e-6)


def test_a_vector_on_the_bound_stays_within_it() -> None:
    """Where rounding would carry it over."""
    for size in (1, 3, 7, 1_000):
        for multiplier in (0.01, 1.0, 3.0):
            update = np.full(size, 1.0) * (1 + 1e-12) / math.sqrt(size)
            steps = Noise(multiplier=multiplier).steps(update, 1.0)
            assert sum(int(step) ** 2 for step in steps) <= (Fraction(2**20) / Fraction(multiplier)) ** 2


@pytest.mark.parametrize(
    "stages", [(CLIP,), (CLIP, NOISE), (CLIP, NOISE, CLIP), (CLIP, CLIP, NOISE)], ids=pipeline.words
)
def test_a_pipeline_gives_as_many_finite_values_and_says_what_it_is(stages: tuple[pipeline.Stage, ...]) -> None:
    pipeline.check(stages)
    for update in ([], [math.nan, math.inf, -math.inf, 1e308], range(1_000)):
        given_row = row(list(update))
        before = given_row.copy()
        found = pipeline.passed(stages, given_row, random.Random(2).randbytes)
        assert found.shape == given_row.shape
        assert np.isfinite(found).all()
        assert np.array_equal(found, pipeline.passed(stages, given_row, random.Random(2).randbytes))
        assert np.array_equal(given_row, before, equal_nan=True)  # it is the worker's
    assert pipeline.words(stages).count(">") == len(stages) - 1


def test_noise_is_as_great_as_it_says() -> None:
    update = np.full(50_000, 1.5 / math.sqrt(50_000))
    found = pipeline.passed((CLIP, NOISE), update, random.Random(4).randbytes) - update
    assert abs(found.std() / (4.0 * 1.5) - 1) < 0.02
    assert abs(found.mean()) < 4 * 6.0 / math.sqrt(50_000)


@pytest.mark.parametrize("stages", [(NOISE,), (CLIP, NOISE, NOISE), (NOISE, CLIP)])
def test_noise_without_a_bound_is_refused(stages: tuple[pipeline.Stage, ...]) -> None:
    with pytest.raises(PolicyError, match="has no clip before it"):
        pipeline.check(stages)


# -- what it costs ----------------------------------------------------------------------------------------------


def normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def delta_of_gaussian(epsilon: float, rho: float) -> float:
    """The exact delta of the continuous Gaussian mechanism of this rho (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(2 * rho)
    return normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 0.03125, 0.5, 2.0, 50.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-6, 1e-2, 0.5])
def test_the_epsilon_of_a_rho_is_sound_and_near_to_the_least(rho: float, delta: float) -> None:
    found = epsilon_of(rho, delta)
    if found < 600:  # beyond, e^epsilon is no float
        assert delta_of_gaussian(found, rho) <= delta * (1 + 1e-9)
    orders = [1 + math.exp(power / 50) for power in range(-1_000, 1_000)]
    plain = min(
        order * rho + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1) for order in orders
    )
    assert max(0.0, plain) * (1 - 1e-3) - 1e-12 <= found <= max(0.0, plain) + 1e-9
    assert found <= rho + 2 * math.sqrt(rho * math.log(1 / delta)) + 1e-12  # Bun and Steinke 2016, proposition 1.3


@given(st.floats(1e-6, 100), st.floats(1e-6, 100), st.sampled_from([1e-9, 1e-5, 0.1]))
def test_more_costs_more(one: float, other: float, delta: float) -> None:
    both = Cost(rho=exact(one)).also(Cost(rho=exact(other)))
    assert both.rho == exact(one) + exact(other)
    assert both.at(delta) >= Cost(rho=exact(one)).at(delta)


def test_many_updates_cost_some_root_of_their_number() -> None:
    one, hundred = (float(Cost(rho=exact(count * 0.001)).at(1e-6)) for count in (1, 100))
    assert 9 * one < hundred < 12 * one


def test_what_is_pure_needs_no_delta_and_the_rest_does() -> None:
    pure = Cost(exact(0.1)).also(Cost(exact(0.2)))
    assert pure.at(0) == exact(0.3)
    assert Cost(rho=exact(0.1)).at(0) == math.inf
    assert pure.also(Cost(rho=exact(0.5))).at(1e-5) == exact(0.3) + Fraction(epsilon_of(0.5, 1e-5))


def test_a_pipeline_costs_what_its_first_noise_does() -> None:
    assert pipeline.rho((CLIP,)) == 0
    assert pipeline.rho((CLIP, NOISE)) == pipeline.rho((CLIP, NOISE, CLIP, NOISE)) == pytest.approx(2 / 16)
    assert Fraction(Noise(multiplier=3.7).rho) >= 2 / Fraction(3.7) ** 2  # rounded up
