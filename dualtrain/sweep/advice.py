"""Which alpha to train with, by the paper's two rules or by a fit of one's own.

Rules (Samuel & Charpentier, section on the best ratio): up to 16 repetitions the best alpha is
about 63/64; from 32 on, the one that gives about 16 autoregressive passes, alpha = 16 / R, where
below 8 passes AR is underfitted and above 32 overfitted. Between 16 and 32 the paper says nothing;
here the log-odds of alpha go straight from one to the other in log2 R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path

from dualtrain.common.errors import UserError
from dualtrain.sweep.fit_file import ADVISED, read_fit

FEW, MANY = 16, 32
"""Repetitions up to which the first rule holds, and from which on the second does."""
FEW_ALPHA = Fraction(63, 64)
BEST_PASSES, LEAST_PASSES, MOST_PASSES = 16, 8, 32
MOST_REPETITIONS = 1e6


@dataclass(frozen=True)
class Advice:
    """An alpha for a number of repetitions.

    Attributes:
        alpha: The best guess: a fraction where a rule gives it exactly, a float where estimated.
        window: Lowest and highest alpha of the window that comes with it; None without one.
        basis: Where that is from, in words.
    """

    repetitions: float
    alpha: Fraction | float
    window: tuple[float, float] | None
    basis: str
    warnings: tuple[str, ...] = ()

    @property
    def share(self) -> Fraction:
        """What to write in the recipe: alpha where it is exact, else a short share near it."""
        return self.alpha if isinstance(self.alpha, Fraction) else short_share(self.alpha)

    def lines(self, slots: int) -> Iterator[str]:
        """What to tell the user who has `slots` micro-batches in a step."""
        passes = float(self.share * _exact(self.repetitions))
        yield f"alpha {float(self.alpha):.4g} for {self.repetitions:g} repetitions: {self.basis}"
        yield (
            f"  {passes:.6g} AR passes over a document, "
            f"{self.repetitions - passes:.6g} diffusion passes"
        )
        if self.window is not None:
            low, high = self.window
            yield (
                f"  window: alpha {low:.4g} to {high:.4g}, which is {low * self.repetitions:.3g} "
                f"to {high * self.repetitions:.3g} AR passes"
            )
        yield from realisable(self.share, slots)
        for warning in self.warnings:
            yield f"warning: {warning}"


def by_rules(repetitions: float) -> Advice:
    """The paper's advice.

    Raises:
        UserError: `repetitions` is not a positive number, or beyond all reason.
    """
    _check(repetitions)
    if repetitions <= FEW:
        basis = f"the paper's first rule, up to {FEW} repetitions"
        return Advice(repetitions, FEW_ALPHA, None, basis, _extrapolated(repetitions))
    window = (LEAST_PASSES / repetitions, min(1.0, MOST_PASSES / repetitions))
    if repetitions >= MANY:
        basis = f"the paper's second rule, {BEST_PASSES} AR passes from {MANY} repetitions on"
        alpha = BEST_PASSES / _exact(repetitions)
        return Advice(repetitions, alpha, window, basis, _extrapolated(repetitions))
    share = math.log2(repetitions / FEW) / math.log2(MANY / FEW)
    ends = [math.log(a / (1 - a)) for a in (FEW_ALPHA, Fraction(BEST_PASSES, MANY))]
    odds = ends[0] + share * (ends[1] - ends[0])
    basis = (
        f"interpolated between the paper's rules, which say nothing from {FEW} to {MANY} "
        "repetitions (log-odds of alpha, linear in log2 R)"
    )
    return Advice(repetitions, 1 / (1 + math.exp(-odds)), window, basis)


def by_fit(file: Path, repetitions: float) -> Advice:
    """The advice of a fit by ``dualtrain fit``.

    Raises:
        UserError: The file is no such fit, or does not reach `repetitions`.
    """
    _check(repetitions)
    fit = read_fit(file)
    curve = fit.best_alpha.curve
    first, last = curve[0].repetitions, curve[-1].repetitions
    if not first <= repetitions <= last:
        raise UserError(
            "--repetitions",
            f"{repetitions:g}, but the fit has runs from {first:g} to {last:g} only",
            "a number between them",
            "add points to the sweep, or leave --fit out for the paper's rules",
        )
    place = math.log2(repetitions)
    below = [best for best in curve if math.log2(best.repetitions) <= place + 1e-9][-1]
    above = next(best for best in curve if math.log2(best.repetitions) >= place - 1e-9)
    width = math.log2(above.repetitions / below.repetitions)
    share = math.log2(repetitions / below.repetitions) / width if width else 0.0
    low, median, high = (
        below.quantiles[q] + share * (above.quantiles[q] - below.quantiles[q]) for q in ADVISED
    )
    warnings = sorted({*below.notes, *above.notes})
    basis = f"by {file}, the median of the best alpha for {fit.metric}, its 90 % interval"
    return Advice(repetitions, median, (low, high), basis, tuple(warnings))


def realisable(share: Fraction, slots: int) -> Iterator[str]:
    """What of a share is realised with some slots in a step, and what that costs."""
    ar = share * slots
    yield (
        f"  write alpha: {share}. With {slots} slots in a step {float(ar):.6g} are AR and "
        f"{float(slots - ar):.6g} diffusion on average: no slot more than with a single objective"
    )
    if ar.denominator == 1:
        return
    whole = Fraction(min(max(round(ar), 1), slots - 1), slots) if slots > 1 else None
    if whole is not None and _is_near(whole, share):
        yield (
            f"  steps differ then; the nearest alpha with all steps alike is {whole}: "
            f"{whole * slots} AR and {slots - whole * slots} diffusion slots"
        )
    else:
        yield f"  steps differ then; no alpha near it has all steps alike with {slots} slots"
    rare = min(ar, slots - ar)
    if rare < 1:
        yield f"  the rarer objective has a slot in every {float(1 / rare):.3g} steps"


def short_share(alpha: float) -> Fraction:
    """A share of few digits that is within 5 % of an estimate.

    Both of alpha and of 1 - alpha, whichever is the smaller.
    """
    for power in count():
        share = Fraction(alpha).limit_denominator(2**power)
        if abs(float(share) - alpha) <= 0.05 * min(alpha, 1 - alpha):
            return share
    raise AssertionError("unreachable: a float is a multiple of some power of two")


def _is_near(share: Fraction, other: Fraction) -> bool:
    """Whether the rarer objective's shares are within a factor of two of each other."""
    pairs = ((share, other), (1 - share, 1 - other))
    return all(max(pair) <= 2 * min(pair) for pair in pairs)


def _exact(repetitions: float) -> Fraction:
    """The number as it is written: 33.3 is 333/10, not the nearest binary number."""
    return Fraction(str(repetitions))


def _check(repetitions: float) -> None:
    if not 0 < repetitions <= MOST_REPETITIONS:
        expected = f"a number above 0, and {MOST_REPETITIONS:,.0f} at most"
        raise UserError("--repetitions", f"{repetitions:g}", expected)


def _extrapolated(repetitions: float) -> tuple[str, ...]:
    if 1 <= repetitions <= 256:
        return ()
    return (f"{repetitions:g} repetitions are outside the paper's 1 to 256",)
