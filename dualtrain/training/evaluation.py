"""Evaluation during a run: held-out losses and scores on tasks, on all ranks at once.

``assemble`` reads the tasks of a recipe, and makes a :class:`TaskScoring` of them once there is a
model; ``train`` calls :func:`evaluate` when it is due. Nothing here draws from a global generator
or leaves anything behind in the model: a run trains the same with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from dualtrain.algorithms.events import Event
from dualtrain.common.errors import UserError
from dualtrain.evaluate.heldout import held_out_losses
from dualtrain.evaluate.request import check_scorable, fit_requests
from dualtrain.evaluate.scoring import Mode, Request, Score, Scorer, encode_pair
from dualtrain.evaluate.statistics import average
from dualtrain.evaluate.tasks import Task, load_tasks, score_task
from dualtrain.progress.metrics import TaskScore, TasksRecord
from dualtrain.training.summary import make_samples

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dualtrain.evaluate.task_result import TaskResult
    from dualtrain.evaluate.templates import Item
    from dualtrain.recipe.schema import EvalSection
    from dualtrain.training.run import Run

TaskItems = list[tuple[Task, "list[Item]"]]

# What messages about tasks call the options of `dualtrain eval`, and what a recipe calls them.
_KEYS = {"--tasks-dir": "eval.tasks_dir", "--tasks": "eval.tasks"}


def read_tasks(section: EvalSection) -> TaskItems:
    """Find the tasks of a recipe and read their items."""
    if not section.tasks:
        return []
    try:
        tasks = load_tasks(section.tasks, section.tasks_dir)
        return [(task, task.items(section.limit)) for task in tasks]
    except UserError as error:
        parts = [error.where, error.what, error.expected, error.hint]
        for option, key in _KEYS.items():
            parts = [part.replace(option, key) for part in parts]
        raise UserError(*parts) from None


class TaskScoring:
    """The tasks of a run, encoded once, and how they are scored.

    Making one goes through every item without the model, so that what cannot be scored is found
    before the first step.

    Raises:
        UserError: No item of a task fits the model's context.
    """

    def __init__(
        self,
        tasks: TaskItems,
        modes: Sequence[Mode],
        *,
        scorer: Scorer,
        tokenizer: Tokenizer,
    ) -> None:
        self._tasks, self.modes, self._scorer = tasks, modes, scorer
        bos_id = scorer.model.vocabulary.bos_id

        @cache
        def encode(prompt: str, answer: str) -> Request:
            return encode_pair(tokenizer, prompt, answer, bos_id=bos_id)

        self._encode = encode
        self.warnings = list(dict.fromkeys(self._rehearse()))

    def score(
        self,
        mode: Mode,
        *,
        on_status: Callable[[str], None],
        is_stopping: Callable[[], bool],
    ) -> list[TaskResult] | None:
        """Score all tasks in a mode. Called by all ranks at once, and the same on all.

        Args:
            is_stopping: Asked before each batch whether to leave out the rest; all ranks ask
                together, and must get the same answer.
        """
        results, name = [], ""

        def report(done: int, count: int) -> None:
            if is_stopping():
                raise _Stopped
            on_status(f"scoring {name}, {mode}: {done}/{count}")

        try:
            for task, items in self._tasks:
                name = task.name
                report(0, len(items))
                results.append(
                    score_task(task, items, self._scorer, self._encode, mode, on_progress=report)
                )
        except _Stopped:
            return None
        return results

    def _rehearse(self) -> list[str]:
        stand_in, warnings = _NoModel(self._scorer), []
        for mode in self.modes:
            for task, items in self._tasks:
                found = score_task(task, items, stand_in, self._encode, mode)
                for count, what in (
                    (found.cut, "prompt is longer than the context, and loses its beginning"),
                    (found.left_out, "answer is longer than the context: left out"),
                ):
                    if count:
                        warnings.append(f"{task.name}: of {len(items)} items {count} whose {what}")
        return warnings


class _Stopped(Exception):
    """Ends the scoring of a task."""


class _NoModel:
    """Takes the place of the scorer before there is anything to score."""

    def __init__(self, scorer: Scorer) -> None:
        self.longest, self._vocabulary = scorer.longest, scorer.model.vocabulary

    def score(
        self,
        requests: Sequence[Request],
        mode: Mode,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]:
        check_scorable(mode, requests, self._vocabulary)
        fitted = fit_requests(requests, self.longest(mode))
        return [Score(0.0, None, dropped) for _, dropped in fitted]


def evaluate(run: Run, *, with_tasks: bool) -> None:
    """Held-out losses, and scores on the run's tasks and samples if asked for, on all ranks."""
    with run.progress.busy("evaluating"), run.meter.paused():
        losses = held_out_losses(run.handle, run.held_out, micro_batch=run.recipe.micro_batch)
    run.last_eval = losses.record(run.state.step, run.elapsed_s())
    run.progress.record(run.last_eval)
    run.state.metrics = losses.metrics()
    if run.best.objective is not None:
        # Whether to stop is decided from rank 0's number, should the last bit of another's differ.
        loss = run.vote.gather(run.state.metrics[f"{run.best.objective}_nll"])[0]
        run.best.add(loss, run.state.step)
    if with_tasks:
        _score_tasks(run)
    if run.recipe.sample.at_evaluations:
        with run.meter.paused():
            samples = make_samples(run)
        for sample in samples:
            run.progress.record(sample.record(run.state.step))
    run.dispatch(Event.EVAL_END)


def _score_tasks(run: Run) -> None:
    assert run.tasks is not None  # or they would not be due
    step = run.state.step
    for mode in run.tasks.modes:
        with run.progress.busy("scoring tasks"), run.meter.paused():
            results = run.tasks.score(
                mode,
                on_status=run.progress.status,
                is_stopping=lambda: run.vote.take(non_finite=False).stop,
            )
        if results is None:
            # Whoever sent the signal waits for the checkpoint, and perhaps not for long.
            message = "to stop sooner, not all tasks were scored"
            run.progress.event("tasks_left_out", message, step=step)
            return
        record = tasks_record(results, step=step, mode=mode, elapsed_s=run.elapsed_s())
        run.last_scores = [*(r for r in run.last_scores if r["mode"] != mode), record]
        run.progress.record(record)
        scores = {f"{mode}/{name}": score["score"] for name, score in record["tasks"].items()}
        run.state.metrics |= {f"{mode}/average": record["average"], **scores}


def tasks_record(
    results: Sequence[TaskResult], *, step: int, mode: str, elapsed_s: float
) -> TasksRecord:
    """Make the record of ``metrics.jsonl``."""
    mean = average([r.score.value for r in results], [r.resampled_scores for r in results])
    return TasksRecord(
        kind="tasks",
        step=step,
        mode=mode,
        average=mean.value,
        average_low=mean.low,
        average_high=mean.high,
        tasks={
            result.task: TaskScore(
                accuracy=result.accuracy.value,
                accuracy_norm=result.accuracy_norm.value,
                score=result.score.value,
                score_low=result.score.low,
                score_high=result.score.high,
                items=len(result.items),
            )
            for result in results
        },
        elapsed_s=elapsed_s,
    )
