"""A grid of probabilities that moves, spreads and is multiplied."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xview_loc.estimation.belief import BeliefGrid, HeadingBelief
from xview_loc.estimation.heat_map import HeatMap
from xview_loc.geodesy import LocalProjection
from xview_loc.maps.base import AerialTile
from xview_loc.models.base import HeatMapGrid

MEAN = np.array([13.2, -7.9])
COVARIANCE = np.array([[9.0, 2.0], [2.0, 4.0]])


def test_it_starts_as_the_normal_distribution_it_was_given() -> None:
    belief = BeliefGrid.normal(MEAN, COVARIANCE)
    np.testing.assert_allclose(belief.mean, MEAN, atol=0.01)
    # A cell's width is added: nothing is known to less.
    np.testing.assert_allclose(belief.covariance, COVARIANCE + 0.25 * np.eye(2), atol=0.1)
    sharp = BeliefGrid.normal(MEAN, 1e-6 * np.eye(2))
    np.testing.assert_allclose(sharp.mean, MEAN, atol=0.05)


@given(
    steps=st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.floats(0, 3)), min_size=1, max_size=12)
)
def test_driving_moves_the_mean_and_adds_the_variance(steps: list[tuple[float, float, float]]) -> None:
    belief = BeliefGrid.normal(MEAN, COVARIANCE)
    before = belief.covariance
    for x, y, variance in steps:
        belief.move(np.array([x, y]), variance)
    moved = np.sum([step[:2] for step in steps], axis=0)
    added = sum(step[2] for step in steps)
    np.testing.assert_allclose(belief.mean, MEAN + moved, atol=0.05)
    np.testing.assert_allclose(belief.covariance, before + added * np.eye(2), rtol=0.03, atol=0.05)


def test_a_long_way_leaves_the_grid_around_the_belief() -> None:
    belief = BeliefGrid.normal(MEAN, COVARIANCE)
    # Pulled to one side again and again, as by measurements, it must not reach the edge.
    for _ in range(60):
        place = belief.mean + np.array([2.0, -1.0])
        belief.multiply(belief.normal_likelihood(place, 4.0 * np.eye(2)))
        belief.move(np.array([1.0, 0.0]), 1.0)
    centre = belief.corner + (len(belief.probability) - 1) / 2 * belief.cell_m
    assert np.abs(belief.mean - centre).max() <= len(belief.probability) / 16 * belief.cell_m + 2.0


def test_multiplying_normal_distributions_is_the_kalman_update() -> None:
    belief = BeliefGrid.normal(MEAN, COVARIANCE)
    prior = belief.covariance
    measured, noise = np.array([15.0, -10.0]), np.array([[2.0, -0.5], [-0.5, 3.0]])
    evidence = belief.multiply(belief.normal_likelihood(measured, noise))
    gain = prior @ np.linalg.inv(prior + noise)
    np.testing.assert_allclose(belief.mean, MEAN + gain @ (measured - MEAN), atol=0.03)
    np.testing.assert_allclose(belief.covariance, (np.eye(2) - gain) @ prior, atol=0.08)
    assert 0.0 < evidence < 1.0
    # To the power of a half twice is once.
    halves = BeliefGrid.normal(MEAN, COVARIANCE)
    for _ in range(2):
        halves.multiply(halves.normal_likelihood(measured, noise), 0.5)
    np.testing.assert_allclose(halves.probability, belief.probability, atol=1e-6)


@pytest.mark.parametrize("rotation", [0.0, 0.6])
@pytest.mark.parametrize(("gsd", "grid"), [(0.14, HeatMapGrid()), (0.48, HeatMapGrid(2.0, (20.0, 10.0)))])
def test_a_heat_maps_summit_is_found_where_it_is_on_earth(
    rotation: float, gsd: float, grid: HeatMapGrid
) -> None:
    # The plane's centre is 30 km away, where its axes are turned against true north.
    plane = LocalProjection(48.4, 16.0)
    tile = AerialTile(np.zeros((400, 400, 3), np.uint8), 48.2, 16.37, gsd, rotation=rotation)
    rows, cols = np.mgrid[:150, :150]
    sigma = 1.5 / (gsd * grid.scale)
    logits = -((rows - 80.3) ** 2 + (cols - 60.6) ** 2) / (2 * sigma**2)
    heat_map = HeatMap.from_logits(logits, grid, tile)
    truth = np.array(plane.forward(*heat_map.to_latlon(80.3, 60.6)))

    belief = BeliefGrid.normal(truth + np.array([3.0, -2.0]), 400.0 * np.eye(2))
    offset = (0.7, -1.1)
    likelihood = belief.heat_map_likelihood(heat_map, plane, offset)
    assert likelihood[0, 0] == 1.0  # off the map, where nothing is known
    belief.multiply(np.where(likelihood > 1.0, likelihood, np.float32(0.0)))
    np.testing.assert_allclose(belief.mean, truth - offset, atol=0.05)
    assert math.sqrt(belief.covariance[0, 0]) == pytest.approx(1.5, abs=0.1)


def test_a_flat_map_says_nothing() -> None:
    plane = LocalProjection(48.2, 16.37)
    tile = AerialTile(np.zeros((400, 400, 3), np.uint8), 48.2, 16.37, 0.5)
    flat = HeatMap.from_logits(np.zeros((400, 400)), HeatMapGrid(), tile)
    belief = BeliefGrid.normal(np.zeros(2), COVARIANCE)
    likelihood = belief.heat_map_likelihood(flat, plane)
    np.testing.assert_allclose(likelihood, 1.0, rtol=1e-4)
    assert belief.multiply(likelihood) == pytest.approx(1.0, rel=1e-4)


def test_a_heading_belief_is_the_kalman_filter_where_it_is_sure() -> None:
    belief = HeadingBelief()
    assert belief.variance > math.pi**2 / 3.0
    belief.multiply(3.0, 0.04, 0.0, 1.0)
    assert belief.mean == pytest.approx(3.0, abs=0.01) and belief.variance == pytest.approx(0.04, rel=0.03)
    belief.turn(1.0, 0.02)  # over the seam
    assert math.remainder(belief.mean - 4.0, 2 * math.pi) == pytest.approx(0.0, abs=0.01)
    assert belief.variance == pytest.approx(0.06, rel=0.03)
    belief.multiply(4.3, 0.03, 0.0, 1.0)
    assert math.remainder(belief.mean - 4.2, 2 * math.pi) == pytest.approx(0.0, abs=0.01)
    assert belief.variance == pytest.approx(0.02, rel=0.05)


def test_wrong_headings_do_not_carry_a_heading_belief_away() -> None:
    rng = np.random.default_rng(0)
    belief = HeadingBelief()
    for _ in range(40):
        wrong = rng.random() < 0.4
        belief.multiply(rng.uniform(-3, 3) if wrong else 0.5 + 0.1 * rng.normal(), 0.03, 0.5, 1.0)
    assert belief.mean == pytest.approx(0.5, abs=0.05)
