"""The surface (repetitions, alpha) -> metric, by a Gaussian process, and the best alpha on it.

As in the paper: an anisotropic Matérn kernel with nu = 3/2 and white noise, from scikit-learn, with
several restarts of the search for its hyperparameters. What the axes are is said here, since the
paper does not:

* repetitions: log2 R, so that doublings are equally far apart;
* alpha: log2((alpha + e) / (1 - alpha + e)), so that halvings of the smaller share are equally far
  apart at both ends. e is half the smallest share sampled, at either end, which puts the pure
  objective of that end log2 3 = 1.6 halvings beyond its outermost mixture;
* the metric: losses enter as their logarithm (a run that diverges would otherwise outweigh all
  others), scores and differences as they are; then standardised;
* the noise: its variance may differ between R, as runs that overfit differ more from seed to seed.
  How much is estimated from runs that differ in the seed alone; the level of all is fitted.

The distribution of the best alpha at an R is that of the maximum of posterior samples of the
surface, without the noise of single runs, over a fine grid of alpha from the least to the greatest
one sampled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from dualtrain.common.errors import UserError

Floats = NDArray[np.float64]

FEWEST_ALPHAS = 4
RESTARTS = 8
SAMPLES = 4_000
GRID = 201
"""Values of alpha between which the best one is looked for."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PRIOR_FREEDOM = 2.0
"""Degrees of freedom with which the noise at an R is believed to be that of all."""
SWAMPED = 2.0
"""The noise of a run swamps an effect of alpha below this many standard deviations of it."""


@dataclass(frozen=True)
class Best:
    """The best alpha at a number of repetitions.

    Attributes:
        quantiles: Of the distribution of the best alpha, by :data:`QUANTILES`.
        value: Metric there (at the median), by the mean of the surface.
        at_border: Where the optimum is at the border: ``lowest`` or ``highest`` alpha sampled; None
            when it lies inside.
        noise: Standard deviation of a run's noise at this R, of the metric as it enters the fit: of
            its logarithm, if that is a loss.
        effect: Largest difference that alpha makes at this R, in standard deviations of a run's
            noise.
        samples: Of the best alpha, (SAMPLES,).
        ends: Lowest and highest alpha sampled at any R; samples lie between.
    """

    repetitions: float
    quantiles: tuple[float, ...]
    value: float
    at_border: Literal["lowest", "highest"] | None
    noise: float
    effect: float
    samples: Floats
    ends: tuple[float, float]

    @property
    def median(self) -> float:
        """Of the distribution."""
        return self.quantiles[QUANTILES.index(0.5)]


class RelativeNoise(WhiteKernel):
    """White noise with a variance of its own at each R: multiples of one number that is fitted.

    Args:
        noise_level_bounds: Between which it is looked for.
        places: (M,) log2 R, rising.
        factors: (M,) multiples there; between places their logarithm is interpolated.
    """

    def __init__(
        self,
        noise_level: float = 1.0,
        noise_level_bounds: tuple[float, float] = (1e-5, 1e5),
        places: tuple[float, ...] = (0.0,),
        factors: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__(noise_level, noise_level_bounds)
        self.places, self.factors = places, factors

    def diag(self, X: Floats) -> Floats:
        """(N,) variances at (N, 2) inputs, of which the first column is log2 R."""
        logarithms = np.interp(X[:, 0], self.places, np.log(self.factors))
        return self.noise_level * np.exp(logarithms)

    def __call__(self, X: Floats, Y: Floats | None = None, eval_gradient: bool = False) -> Any:
        """(N, N) covariance, which is none with other runs; and its gradient by log noise_level."""
        covariance = np.diag(self.diag(X)) if Y is None else np.zeros((len(X), len(Y)))
        if not eval_gradient:
            return covariance
        free = not self.hyperparameter_noise_level.fixed
        return covariance, covariance[:, :, None][:, :, : int(free)]


class Surface:
    """A Gaussian process fitted to runs.

    Args:
        repetitions: (N,) R of each run.
        alphas: (N,) AR share of each run.
        values: (N,) metric of each run.

    Raises:
        UserError: Values that are not finite, fewer than four distinct alphas, or nothing but the
            same value.

    Attributes:
        is_log: Whether the metric enters as its logarithm: a loss, and none is 0 or below.
    """

    def __init__(
        self,
        repetitions: Sequence[float],
        alphas: Sequence[float],
        values: Sequence[float],
        *,
        is_loss: bool,
        seed: int = 0,
        restarts: int = RESTARTS,
    ) -> None:
        self.repetitions = np.asarray(repetitions, dtype=np.float64)
        self.alphas = np.asarray(alphas, dtype=np.float64)
        self.values = np.asarray(values, dtype=np.float64)
        self.is_loss, self.seed = is_loss, seed
        self._check()
        inner = np.minimum(self.alphas, 1 - self.alphas)
        self.epsilon = float(inner[inner > 0].min() / 2)
        self.is_log = is_loss and bool((self.values > 0).all())
        target = np.log(self.values) if self.is_log else self.values
        self._mean, self._scale = float(target.mean()), float(target.std())
        self._target = (target - self._mean) / self._scale
        self._inputs = self._place(self.repetitions, self.alphas)
        # Untyped: what checkers infer of scikit-learn's attributes is not so.
        self._process: Any = self._fit(restarts)
        self.kernel: Any = self._process.kernel_

    def _check(self) -> None:
        if not np.isfinite(self.values).all():
            raise UserError("metric", "some values are not finite", "finite numbers")
        distinct = np.unique(self.alphas)
        if len(distinct) < FEWEST_ALPHAS:
            raise UserError(
                "alpha",
                f"{len(distinct)} distinct: {', '.join(f'{a:g}' for a in distinct)}",
                f"at least {FEWEST_ALPHAS}, between which a surface can be told",
                "add values of alpha to the sweep, or choose other points with --where",
            )
        if np.ptp(self.values) == 0:
            what = f"all runs have the same value, {self.values[0]:g}"
            raise UserError("metric", what, "a metric that alpha or repetitions change")

    def transform(self, alpha: Floats) -> Floats:
        """Where alphas stand on the axis."""
        return np.log2((alpha + self.epsilon) / (1 - alpha + self.epsilon))

    def inverse(self, place: Floats) -> Floats:
        """The alphas at places on the axis."""
        ratio = np.exp2(place)
        return np.clip((ratio * (1 + self.epsilon) - self.epsilon) / (1 + ratio), 0.0, 1.0)

    def mean(self, repetitions: Floats, alphas: Floats) -> Floats:
        """The surface, in units of the metric."""
        return self._to_metric(self._process.predict(self._place(repetitions, alphas)))

    def noise(self, repetitions: float) -> float:
        """Standard deviation of a run's noise at R, in units of the standardised target."""
        place = self._place(np.array([repetitions]), np.array([0.5]))
        return float(np.sqrt(self.kernel.k2.diag(place)[0]))

    @cached_property
    def r_squared(self) -> float:
        """Share of the runs' variance that the surface explains (of the transformed metric)."""
        return _r_squared(self._target, self._process.predict(self._inputs))

    @cached_property
    def left_out(self) -> Floats:
        """(N,) the metric of each run as predicted without any run of its (R, alpha)."""
        inverse = np.linalg.inv(self.kernel(self._inputs))
        weighted = inverse @ self._target
        predicted = np.empty_like(self._target)
        cells = np.unique(self._inputs, axis=0, return_inverse=True)[1].ravel()
        for cell in range(cells.max() + 1):
            rows = np.flatnonzero(cells == cell)
            block = inverse[np.ix_(rows, rows)]
            predicted[rows] = self._target[rows] - np.linalg.solve(block, weighted[rows])
        return predicted

    @property
    def left_out_r_squared(self) -> float:
        """R² of those predictions."""
        return _r_squared(self._target, self.left_out)

    @property
    def left_out_error(self) -> float:
        """Root mean square of their errors, in units of the metric."""
        errors = self._to_metric(self.left_out) - self.values
        return float(np.sqrt(np.mean(errors**2)))

    def best(self, repetitions: float, *, samples: int = SAMPLES) -> Best:
        """The distribution of the best alpha at R repetitions."""
        low, high = self.transform(np.array([self.alphas.min(), self.alphas.max()]))
        places = np.linspace(low, high, GRID)
        alphas = self.inverse(places)
        alphas[[0, -1]] = self.alphas.min(), self.alphas.max()
        drawn, mean = self._sample(repetitions, places, samples)
        sign = -1.0 if self.is_loss else 1.0
        found = alphas[np.argmax(sign * drawn, axis=1)]
        quantiles = tuple(float(q) for q in np.quantile(found, QUANTILES, method="nearest"))
        median = quantiles[QUANTILES.index(0.5)]
        at = int(np.argmin(np.abs(alphas - median)))
        return Best(
            repetitions=float(repetitions),
            quantiles=quantiles,
            value=float(self._to_metric(mean[at : at + 1])[0]),
            at_border=self._border(repetitions, median),
            noise=self.noise(repetitions) * self._scale,
            effect=float(np.ptp(mean) / self.noise(repetitions)),
            samples=found,
            ends=(float(alphas[0]), float(alphas[-1])),
        )

    def _border(self, repetitions: float, best: float) -> Literal["lowest", "highest"] | None:
        """Whether the best alpha is beyond those sampled near this R, or the last of them."""
        distance = np.abs(np.log2(self.repetitions) - np.log2(repetitions))
        near = self.alphas[distance <= distance.min() + 1e-9]
        place, low, high = self.transform(np.array([best, near.min(), near.max()]))
        step = (high - low) / GRID
        if place <= low + step:
            return "lowest"
        return "highest" if place >= high - step else None

    def _sample(self, repetitions: float, places: Floats, samples: int) -> tuple[Floats, Floats]:
        """Posterior samples of the surface without noise at one R, and its mean."""
        inputs = np.stack([np.full_like(places, np.log2(repetitions)), places], axis=1)
        mean, covariance = self._process.predict(inputs, return_cov=True)
        # scikit-learn adds the noise of a run to the diagonal, for it is part of the kernel.
        covariance = covariance - self.noise(repetitions) ** 2 * np.eye(len(places))
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.clip(values, 0.0, None))
        # Of its own at each R, whichever others are asked about.
        random = np.random.default_rng([self.seed, int(np.float64(repetitions).view(np.uint64))])
        return mean + random.standard_normal((samples, len(places))) @ root.T, mean

    def _place(self, repetitions: Floats, alphas: Floats) -> Floats:
        return np.stack([np.log2(repetitions), self.transform(alphas)], axis=1)

    def _to_metric(self, target: Floats) -> Floats:
        plain = target * self._scale + self._mean
        return np.exp(plain) if self.is_log else plain

    def _fit(self, restarts: int) -> GaussianProcessRegressor:
        spread = np.maximum(np.ptp(self._inputs, axis=0), 1.0)
        bounds = [(0.05 * width, 10 * width) for width in spread]
        kernel = ConstantKernel(1.0, (0.05, 50.0)) * Matern(spread / 3, bounds, nu=1.5)
        kernel = kernel + RelativeNoise(0.01, (1e-6, 2.0), *self._relative_noise())
        process = GaussianProcessRegressor(
            kernel, n_restarts_optimizer=restarts, random_state=self.seed
        )
        with warnings.catch_warnings():
            # A hyperparameter at its bound: no dependence on R, for one, which is an answer.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return process.fit(self._inputs, self._target)

    def _relative_noise(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The log2 R, and the variance of a run's noise at each as a multiple of that of all."""
        squares: dict[float, float] = dict.fromkeys(np.unique(self._inputs[:, 0]).tolist(), 0.0)
        freedom = dict.fromkeys(squares, 0)
        for cell in np.unique(self._inputs, axis=0):
            same = self._target[(self._inputs == cell).all(axis=1)]
            squares[cell[0]] += float(((same - same.mean()) ** 2).sum())
            freedom[cell[0]] += len(same) - 1
        total = sum(squares.values()) / max(1, sum(freedom.values()))
        if total == 0:  # one seed, or no noise at all
            return tuple(squares), (1.0,) * len(squares)
        factors = (
            (squares[place] / total + PRIOR_FREEDOM) / (freedom[place] + PRIOR_FREEDOM)
            for place in squares
        )
        return tuple(squares), tuple(factors)


def _r_squared(values: Floats, predicted: Floats) -> float:
    return float(1 - np.mean((values - predicted) ** 2) / np.var(values))
