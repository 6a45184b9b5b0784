"""Tests of: dualtrain.sweep.surface: it finds what is there, and says where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.gaussian_process.kernels import Matern

from dualtrain.common.errors import UserError
from dualtrain.sweep.surface import QUANTILES, SWAMPED, RelativeNoise, Surface

REPETITIONS = np.array([1.0, 4.0, 16.0, 64.0])
ALPHAS = np.array([0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16, 1])
EPSILON = 1 / 32
UNEVEN = np.array([0.3, 0.5, 1.0, 2.5])
SEEDS = 3
GRID = 201


def place(alpha):
    return np.log2((alpha + EPSILON) / (1 - alpha + EPSILON))


FINE = np.linspace(place(0.0), place(1.0), GRID)


def smooth(rng, column, places):
    """A rounded top that moves towards smaller alphas with more repetitions."""
    middle = rng.uniform(-1, 3) - rng.uniform(0, 0.8) * np.log2(column)
    away = places - middle
    return -rng.uniform(0.05, 0.3) * away**2 / (1 + 0.3 * np.abs(away))


def pointed(rng, column, places):
    """A top with a kink, as where overfitting sets in."""
    middle = rng.uniform(-1, 3) - rng.uniform(0, 0.8) * np.log2(column)
    left, right = rng.uniform(0.1, 0.6, 2)
    return -np.where(places < middle, left, right) * np.abs(places - middle)


def rough(rng, column, places):
    """Anything of the roughness that the model assumes."""
    inputs = np.stack([np.log2(column), places], axis=1)
    covariance = Matern(rng.uniform(2, 6, 2), nu=1.5)(inputs) + 1e-9 * np.eye(len(inputs))
    return np.linalg.cholesky(covariance) @ rng.standard_normal(len(inputs))


def draw(kind, number):
    """Noisy runs of a surface, and where its optimum is at a random one of their R."""
    rng = np.random.default_rng([number, 77])
    row = number % len(REPETITIONS)
    column = np.concatenate([np.repeat(REPETITIONS, len(ALPHAS)), np.full(GRID, REPETITIONS[row])])
    places = np.concatenate([np.tile(place(ALPHAS), len(REPETITIONS)), FINE])
    values = kind(rng, column, places)
    runs = slice(0, len(REPETITIONS) * len(ALPHAS))
    # On every other surface as much at each R, else more of it at more repetitions.
    noise = rng.uniform(0.03, 0.15) * (UNEVEN if number // 3 % 2 else np.ones(len(UNEVEN)))
    repeated = np.repeat(values[runs], SEEDS)
    noises = np.repeat(noise, len(ALPHAS) * SEEDS)
    return (
        np.repeat(column[runs], SEEDS),
        np.repeat(np.tile(ALPHAS, len(REPETITIONS)), SEEDS),
        repeated + noises * rng.standard_normal(len(repeated)),
        REPETITIONS[row],
        FINE[np.argmax(values[-GRID:])],
    )


def test_the_interval_of_the_best_alpha_covers_the_true_one_as_often_as_it_says():
    kinds = (smooth, pointed, rough)
    covered, widths = [], []
    for number in range(200):
        repetitions, alphas, values, at, true = draw(kinds[number % 3], number)
        surface = Surface(repetitions, alphas, values, is_loss=False, seed=number, restarts=0)
        best = surface.best(at, samples=500)
        low, high = surface.transform(np.array(best.quantiles)[[0, -1]])
        step = FINE[1] - FINE[0]
        covered.append(low - step / 2 <= true <= high + step / 2)
        widths.append(high - low)
    assert 0.80 <= np.mean(covered) <= 0.97
    # An interval that always holds everything would not tell anything.
    assert np.median(widths) < (FINE[-1] - FINE[0]) / 4


@pytest.fixture(scope="module")
def losses():
    """Runs of a loss whose best alpha is 16 / R, with a run's noise of 0.01."""
    rng = np.random.default_rng(5)
    repetitions, alphas = (x.ravel() for x in np.meshgrid([16, 32, 64, 128], ALPHAS))
    repetitions, alphas = np.repeat(repetitions, SEEDS), np.repeat(alphas, SEEDS)
    away = place(alphas) - place(np.minimum(1, 16 / repetitions))
    values = 4 * np.exp(0.02 * away**2) + 0.01 * rng.standard_normal(len(alphas))
    return repetitions.astype(float), alphas, values


def test_a_known_optimum_is_recovered(losses):
    surface = Surface(*losses, is_loss=True)
    assert surface.r_squared > 0.99 and surface.left_out_r_squared > 0.98
    assert surface.left_out_error < 1  # of losses up to 12.6, the outermost from outside
    for repetitions in (32, 64, 128):
        best = surface.best(repetitions)
        assert best.quantiles == tuple(sorted(best.quantiles))
        assert abs(np.log2(best.median * repetitions / 16)) < 0.5
        assert best.value == pytest.approx(4, abs=0.05)
        assert best.at_border is None and best.effect >= SWAMPED
        assert len(best.samples) == 4000


def test_for_scores_more_is_better_and_for_losses_less(losses):
    repetitions, alphas, values = losses
    of_losses = Surface(repetitions, alphas, values, is_loss=True).best(64)
    of_scores = Surface(repetitions, alphas, -np.log(values), is_loss=False).best(64)
    # On another machine rounding may move a quantile to the next alpha of the grid.
    surface = Surface(repetitions, alphas, values, is_loss=True)
    places = [surface.transform(np.array(best.quantiles)) for best in (of_losses, of_scores)]
    assert places[0] == pytest.approx(places[1], abs=1.01 * (FINE[1] - FINE[0]))


def test_an_optimum_at_the_border_is_said(losses):
    repetitions, alphas, values = losses
    few = repetitions == 16
    surface = Surface(repetitions[few], alphas[few], values[few], is_loss=True)
    best = surface.best(16)
    assert best.at_border == "highest" and best.median == 1
    inner = (repetitions == 128) & (alphas >= 1 / 4)
    surface = Surface(repetitions[inner], alphas[inner], values[inner], is_loss=True)
    assert surface.best(128).at_border == "lowest"


def test_noise_that_swamps_the_effect_is_said(losses):
    repetitions, alphas, _ = losses
    values = 4 + 0.1 * np.random.default_rng(3).standard_normal(len(alphas))
    best = Surface(repetitions, alphas, values, is_loss=True).best(32)
    assert best.effect < SWAMPED
    low, high = np.array(best.quantiles)[[0, QUANTILES.index(0.95)]]
    assert low < 0.2 and high > 0.8


def test_noise_that_differs_between_repetitions_is_told_apart(losses):
    repetitions, alphas, _ = losses
    away = place(alphas) - place(np.minimum(1, 16 / repetitions))
    size = np.where(repetitions == 128, 0.03, 0.003)
    random = np.random.default_rng(8).standard_normal(len(alphas))
    surface = Surface(repetitions, alphas, 4 * np.exp(0.02 * away**2 + size * random), is_loss=True)
    quiet, loud = surface.best(32), surface.best(128)
    assert quiet.noise == pytest.approx(0.003, rel=0.5)
    assert loud.noise == pytest.approx(0.03, rel=0.5)
    # Between sampled R it is between, beyond them as at the last.
    assert quiet.noise < surface.best(90).noise < loud.noise
    assert surface.best(500).noise == pytest.approx(loud.noise)


def test_the_kernel_of_the_noise_has_its_variances_and_its_gradient():
    kernel = RelativeNoise(0.5, (1e-6, 2.0), (0.0, 2.0), (1.0, 4.0))
    inputs = np.array([[-1.0, 0], [0, 3], [1, 0], [2, 0], [5, 0]])
    variances = 0.5 * np.array([1, 1, 2, 4, 4])  # between places the logarithm is straight
    assert kernel.diag(inputs) == pytest.approx(variances)
    assert kernel(inputs) == pytest.approx(np.diag(variances))
    assert not kernel(inputs, inputs).any()  # other runs, if at the same place
    covariance, gradient = kernel(inputs, eval_gradient=True)
    more = clone(kernel)
    assert repr(more) == repr(kernel) and (more.places, more.factors) == ((0, 2), (1, 4))
    more.theta = kernel.theta + 1e-6
    assert gradient[..., 0] == pytest.approx((more(inputs) - covariance) / 1e-6, rel=1e-5)
    fixed = RelativeNoise(0.5, "fixed", (0.0,), (1.0,))
    assert fixed(inputs, eval_gradient=True)[1].shape == (5, 5, 0)


def test_one_seed_tells_of_one_noise_for_all(losses):
    first = slice(None, None, SEEDS)
    surface = Surface(*(column[first] for column in losses), is_loss=True)
    assert surface.noise(16) == surface.noise(128)


def test_repetitions_may_be_any_positive_number(losses):
    repetitions, alphas, values = losses
    surface = Surface(repetitions / 48, alphas, values, is_loss=True)
    assert surface.best(1 / 3).quantiles and surface.best(7).quantiles


def test_left_out_predictions_are_those_of_a_fit_without_the_point(losses):
    surface = Surface(*losses, is_loss=True)
    inputs, target = surface._inputs, surface._target
    rows = (losses[0] == 64) & (losses[1] == 1 / 4)
    assert rows.sum() == SEEDS
    kernel = surface.kernel
    rest = np.linalg.inv(kernel(inputs[~rows]))
    direct = kernel(inputs[rows], inputs[~rows]) @ rest @ target[~rows]
    assert surface.left_out[rows] == pytest.approx(direct, abs=1e-6)


def test_the_axis_of_alpha_goes_both_ways(losses):
    surface = Surface(*losses, is_loss=True)
    assert surface.epsilon == 1 / 32
    alphas = np.linspace(0, 1, 33)
    assert surface.inverse(surface.transform(alphas)) == pytest.approx(alphas, abs=1e-12)
    ends = surface.transform(np.array([0.0, 0.5, 1.0]))
    assert ends[1] == 0 and ends[0] == pytest.approx(-ends[2])


def test_differences_have_no_logarithm_and_are_fitted_as_they_are(losses):
    repetitions, alphas, values = losses
    surface = Surface(repetitions, alphas, np.log(values / 4), is_loss=True)
    assert surface.values.min() < 0 and not surface.is_log
    assert Surface(*losses, is_loss=True).is_log
    places = [
        fitted.transform(np.array(fitted.best(64).quantiles))
        for fitted in (surface, Surface(*losses, is_loss=True))
    ]
    assert places[0] == pytest.approx(places[1], abs=1.01 * (FINE[1] - FINE[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, a, v: (r, np.minimum(a, 1 / 8), v), "3 distinct: 0, 0.0625, 0.125"),
        (lambda r, a, v: (r, a, np.where(a == 1, np.nan, v)), "not finite"),
        (lambda r, a, v: (r, a, np.full(len(v), 4.0)), "all runs have the same value"),
    ],
)
def test_what_no_surface_can_be_told_from_is_refused(losses, change, message):
    with pytest.raises(UserError, match=message):
        Surface(*change(*losses), is_loss=True)
