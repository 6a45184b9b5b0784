"""Small tasks, and scorers that know nothing, for the tests of tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from dualtrain.evaluate.scoring import Mode, Request, Score
from dualtrain.evaluate.task_result import TaskResult
from dualtrain.evaluate.tasks import Task, load_tasks, score_task

SPEC = {
    "name": "quiz",
    "description": "Questions for tests",
    "data": "quiz.jsonl",
    "prompt": "{{ question }}",
    "choices": "choices",
    "gold": "gold",
    "group": "topic",
    "metric": "accuracy",
}


def write_task(folder: Path, lines: Sequence[object] = (), **changes: object) -> Path:
    """Write a task file and its data into a directory; returns that."""
    folder.mkdir(exist_ok=True)
    spec = {key: value for key, value in (SPEC | changes).items() if value is not None}
    (folder / f"{spec['name']}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    if lines:
        write_lines(folder / str(spec["data"]), lines)
    return folder


def write_lines(path: Path, lines: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def question(choices: int, gold: int, topic: str = "all", text: str = "Why?") -> dict:
    words = [f"answer {'abcdefgh'[number]}" for number in range(choices)]
    return {"question": text, "choices": words, "gold": gold, "topic": topic}


def encode(prompt: str, choice: str) -> Request:
    """One token a character."""
    return Request((1, *map(ord, prompt)), tuple(map(ord, choice)))


class FakeScorer:
    """Scores a request by a function of its text.

    Args:
        log_likelihood: From prompt and answer to nats.
        room: Tokens of context and continuation together, at most.
    """

    def __init__(self, log_likelihood: Callable[[str, str], float], *, room: int = 10**6) -> None:
        self._log_likelihood = log_likelihood
        self._room = room

    def longest(self, mode: Mode) -> int:
        return self._room

    def score(
        self,
        requests: Sequence[Request],
        mode: Mode,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        assert len(set(requests)) == len(requests)
        scores = []
        for request in requests:
            prompt = "".join(map(chr, request.context[1:]))
            answer = "".join(map(chr, request.continuation))
            length = len(request.context) + len(request.continuation)
            value = self._log_likelihood(prompt, answer)
            scores.append(Score(value, value > -1, max(0, length - self._room)))
            if on_progress:
                on_progress(len(scores))
        return scores


def score_with(
    function: Callable[[str, str], float], task: Task, *, room: int = 10**6, **options: object
) -> TaskResult:
    scorer = FakeScorer(function, room=room)
    return score_task(task, task.items(), scorer, encode, "ar", **options)


def load_one(folder: Path, name: str = "quiz") -> Task:
    (task,) = load_tasks([name], folder)
    return task


def binomial_error(share: float, count: int) -> float:
    """Standard error of a share."""
    return math.sqrt(share * (1 - share) / count)
