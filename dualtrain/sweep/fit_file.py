"""``fit.json``: what ``dualtrain fit`` writes, and advice is read from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dualtrain.common.errors import UserError

ADVISED = ("0.05", "0.5", "0.95")
"""Quantiles of a fit that advice is made of."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class Axes(_Part):
    """What the surface is a function of, and of what its values are."""

    repetitions: str = "log2(R)"
    alpha: str = "log2((alpha + epsilon) / (1 - alpha + epsilon))"
    epsilon: float
    metric: str


class LeftOut(_Part):
    """How well runs are predicted without any run of the same repetitions and alpha."""

    r_squared: float
    rmse: float


class FittedRun(_Part):
    """A run as the fit sees it."""

    point: str
    repetitions: float
    alpha: float
    seed: int
    value: float


def _rising(quantiles: dict[str, float]) -> dict[str, float]:
    levels = [quantiles.get(level, -1.0) for level in ADVISED]
    if levels != sorted(levels) or levels[0] < 0:
        raise ValueError("quantiles are missing, or fall")
    return quantiles


class BestAlpha(_Part):
    """The best alpha at a number of repetitions; `noise` and `value` as ``surface.Best`` says."""

    repetitions: float = Field(gt=0, allow_inf_nan=False)
    quantiles: Annotated[
        dict[str, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]],
        AfterValidator(_rising),
    ]
    ar_passes: float
    value: float
    at_border: Literal["lowest", "highest"] | None
    noise: float
    effect_in_noise: float
    notes: list[str]


def _in_order(curve: list[BestAlpha]) -> list[BestAlpha]:
    if any(low.repetitions >= high.repetitions for low, high in pairwise(curve)):
        raise ValueError("repetitions are not in order")
    return curve


class BestAlphas(_Part):
    """At the repetitions that were sampled, and on a finer grid."""

    sampled: list[BestAlpha]
    curve: Annotated[list[BestAlpha], Field(min_length=1), AfterValidator(_in_order)]


class SeedMean(_Part):
    """A mean over seeds with its 95 % interval, which a single seed does not give."""

    alpha: float | None = None
    value: float
    seeds: int
    interval: list[float] | None


class SingleObjectives(_Part):
    """Single objectives against the sampled mixture that the surface finds best, at one R."""

    repetitions: float
    ar: SeedMean | None = None
    diffusion: SeedMean | None = None
    mixture: SeedMean | None = None
    mixture_minus_ar: SeedMean | None = None
    mixture_minus_diffusion: SeedMean | None = None


class Fit(_Part):
    """A fitted sweep."""

    format: Literal[1] = 1
    metric: str
    is_loss: bool
    sweep: str
    where: list[str]
    axes: Axes
    kernel: str
    r_squared: float
    left_out: LeftOut
    runs: list[FittedRun]
    best_alpha: BestAlphas
    single_objectives: list[SingleObjectives]
    notes: list[str]


def read_fit(file: Path) -> Fit:
    """Read a fit.

    Raises:
        UserError: The file is none.
    """
    expected = "fit.json, as `dualtrain fit` writes it"
    try:
        return Fit.model_validate_json(file.read_bytes())
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise UserError(f"--fit {file}", what, expected) from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise UserError(f"--fit {file}", f"is not JSON: {first['msg']}", expected) from None
        place = ".".join(map(str, first["loc"]))
        what = f"is no fit, or damaged: {f'{place}: ' * bool(place)}{first['msg']}"
        raise UserError(f"--fit {file}", what, expected, "fit the sweep again") from None
