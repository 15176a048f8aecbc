"""Tests figures of the literature: slopes (E1), the crossover with Lagrange coding (E6), noisy workers; all seeded.

`python -m tests.benchmarks.experiments` prints the same with more trials.
"""

import jax
import numpy as np
import pytest

from .experiments import crossover, noisy_workers, range_of_means, slopes

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_error_falls_with_the_number_of_workers_at_the_recorded_slopes():
    results = slopes(trials=200, seed=0, counts=(120, 240, 480))
    assert results["LeTCC"][0] == pytest.approx(-6.95, abs=0.7)
    assert results["BACC"][0] == pytest.approx(-2.19, abs=0.3)


def test_lagrange_coding_is_exact_up_to_seven_stragglers_and_lost_beyond():
    lagrange = {8: 5e-3, 10: 3e-1, 12: 6e3}
    spline = {0: 9e-7, 7: 1e-4, 8: 2e-3, 10: 2e-3, 12: 2e-2}
    results = crossover(10_000, 1, tuple(spline))
    # Thirteen answers determine the degree-12 polynomial that a cubic of the degree-4 encoder is.
    assert np.max(results[0][0]) < 1e-28
    assert np.median(results[7][0]) < 1e-22
    assert np.median(results[8][0]) > 1e-12
    assert results[12][0].mean() > 100 * results[12][1].mean()
    for index, figures in enumerate((lagrange, spline)):
        for count, figure in figures.items():
            low, high = range_of_means(results[count][index])
            assert low / 3 <= figure <= high * 3, (count, figure, low, high)


def test_noise_of_workers_is_averaged_out():
    results = noisy_workers(trials=40, seed=0, counts=(30, 480))
    for count, spline_figure, berrut_figure in ((30, 9.0e-3, 1.8e-2), (480, 8.7e-4, 9.7e-3)):
        (spline, _), _, (berrut, _) = results[count]
        assert spline_figure / 3 <= spline <= spline_figure * 3
        assert berrut_figure / 3 <= berrut <= berrut_figure * 3
