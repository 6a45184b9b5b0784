"""What a model got on a task in a mode: items, accuracies, scores, groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dualtrain.evaluate.statistics import (
    Estimate,
    Floats,
    Resampled,
    chances,
    credit,
    normalised,
    resample,
)

if TYPE_CHECKING:
    from dualtrain.evaluate.scoring import Mode
    from dualtrain.evaluate.task_file import Metric
    from dualtrain.evaluate.templates import Item


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One item, scored."""

    item: Item
    log_likelihoods: tuple[float, ...]  # of each answer, in nats
    greedy: tuple[bool | None, ...]  # whether all tokens are the likeliest; None in modes that mask
    dropped: int  # tokens of the prompt that the context had no room for before the longest answer

    @property
    def per_character(self) -> tuple[float, ...]:
        pairs = zip(self.log_likelihoods, self.item.characters, strict=True)
        return tuple(value / count for value, count in pairs)

    def credit(self, metric: Metric) -> float:
        """1 where the right answer is the best, a share of it where others are as good."""
        scores = self.log_likelihoods if metric == "accuracy" else self.per_character
        return credit(scores, self.item.gold)

    def json(self) -> dict[str, Any]:
        return {
            "line": self.item.line,
            "group": self.item.group,
            "prompt": self.item.prompt,
            "choices": self.item.choices,
            "gold": self.item.gold,
            "log_likelihoods": self.log_likelihoods,
            "characters": self.item.characters,
            "credit": self.credit("accuracy"),
            "credit_norm": self.credit("accuracy_norm"),
            "greedy": None if None in self.greedy else self.greedy,
            "dropped_tokens": self.dropped,
        }


class Scores:
    """Figures of some items of a task."""

    def __init__(
        self, items: Sequence[ItemResult], metric: Metric, *, seed: int, purpose: str
    ) -> None:
        self.items = items
        self.metric: Metric = metric
        self._seed, self._purpose = seed, purpose

    @cached_property
    def chances(self) -> Floats:
        return chances([len(result.item.choices) for result in self.items])

    @property
    def chance(self) -> float:
        """What guessing gets on average."""
        return float(self.chances.mean())

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of items whose right answer has the highest log-likelihood."""
        return self._accuracy("accuracy")

    @cached_property
    def accuracy_norm(self) -> Estimate:
        """The same by log-likelihood per character."""
        return self._accuracy("accuracy_norm")

    @cached_property
    def score(self) -> Estimate:
        """Normalised score of the task's metric."""
        mean = self._credits[self.metric].mean()
        value = normalised(np.asarray(mean), np.asarray(self.chance))
        return Estimate.of(float(value), self.resampled_scores)

    @property
    def resampled_scores(self) -> Floats:
        """(R,) float64, normalised scores of items drawn anew."""
        return self._resampled[self.metric].score

    @property
    def ties(self) -> int:
        """Items whose right answer shares the best place by the task's metric."""
        return int(sum(0 < value < 1 for value in self._credits[self.metric]))

    def json(self) -> dict[str, Any]:
        return {
            "items": len(self.items),
            "chance": self.chance,
            "accuracy": asdict(self.accuracy),
            "accuracy_norm": asdict(self.accuracy_norm),
            "score": asdict(self.score),
            "ties": self.ties,
        }

    def _accuracy(self, metric: Metric) -> Estimate:
        value = float(self._credits[metric].mean())
        return Estimate.of(value, self._resampled[metric].accuracy)

    @cached_property
    def _credits(self) -> dict[Metric, Floats]:
        metrics: tuple[Metric, ...] = ("accuracy", "accuracy_norm")
        return {m: np.array([result.credit(m) for result in self.items]) for m in metrics}

    @cached_property
    def _resampled(self) -> dict[Metric, Resampled]:
        return {
            metric: resample(
                values, self.chances, seed=self._seed, purpose=f"{self._purpose}, {metric}"
            )
            for metric, values in self._credits.items()
        }


class TaskResult(Scores):
    """What a model got on a task in a mode: at least one item."""

    def __init__(
        self,
        task: str,
        mode: Mode,
        items: Sequence[ItemResult],
        metric: Metric,
        *,
        left_out: int = 0,
        seconds: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(items, metric, seed=seed, purpose=f"{task}, {mode}")
        self.task = task
        self.mode: Mode = mode
        # Items with an answer longer than the model's context cannot be scored.
        self.left_out, self.seconds = left_out, seconds

    @property
    def cut(self) -> int:
        """Items whose prompt was longer than the context had room for."""
        return sum(result.dropped > 0 for result in self.items)

    @cached_property
    def groups(self) -> dict[str, Scores]:
        """The same by group, in alphabetical order; empty where the task has none."""
        found: dict[str, list[ItemResult]] = {}
        for result in self.items:
            if result.item.group is not None:
                found.setdefault(result.item.group, []).append(result)
        return {
            name: Scores(
                found[name], self.metric, seed=self._seed, purpose=f"{self._purpose}, {name}"
            )
            for name in sorted(found)
        }

    def sentence(self) -> str:
        """In a line, for those who wait."""
        return (
            f"{self.task}, {self.mode}: {len(self.items):,} items, score {self.score.value:.1f}, "
            f"{self.seconds:.1f} s"
        )

    def json(self) -> dict[str, Any]:
        return {
            **super().json(),
            "prompts_cut": self.cut,
            "dropped_tokens": sum(result.dropped for result in self.items),
            "left_out": self.left_out,
            "seconds": round(self.seconds, 3),
            "groups": {name: scores.json() for name, scores in self.groups.items()},
        }
