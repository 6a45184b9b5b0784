"""Zero-shot tasks: the shipped ones and a user's own, their items, and scoring them.

``command`` and in-training evaluation use :func:`load_tasks`, :meth:`Task.read` and
:func:`score_task`. A task is a YAML file (``task_file``) and a file of JSON lines (``task_data``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dualtrain.common.errors import UserError, UserErrors, nearest
from dualtrain.common.files import user_path
from dualtrain.evaluate.task_data import find_data, read_file, read_hub
from dualtrain.evaluate.task_file import (
    BrokenTaskFile,
    ReadTaskFile,
    TaskFile,
    read_task_file,
)
from dualtrain.evaluate.task_result import ItemResult, TaskResult
from dualtrain.evaluate.templates import Item

if TYPE_CHECKING:
    from dualtrain.evaluate.scoring import Mode, Request, Score

SHIPPED = Path(__file__).with_name("tasks")


class TaskScorer(Protocol):
    """What is asked of ``scoring.Scorer``."""

    def longest(self, mode: Mode) -> int: ...

    def score(
        self,
        requests: Sequence[Request],
        mode: Mode,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Score]: ...


@dataclass(frozen=True)
class TaskItems:
    """Items of a task, and where they come from.

    Attributes:
        items: In the order of the data.
        total: Items of the data, of which `items` may be some.
        origin: The data file, or the dataset's name on the hub.
    """

    items: list[Item]
    total: int
    origin: str
    sha256: str


@dataclass(frozen=True)
class Task:
    """A task that is known.

    Attributes:
        directory: Where its data file is looked for; None: nowhere, so that only the hub is left.
    """

    file: ReadTaskFile
    directory: Path | None

    @property
    def spec(self) -> TaskFile:
        """What its file says."""
        return self.file.spec

    @property
    def name(self) -> str:
        """What ``--tasks`` calls it."""
        return self.spec.name

    def data_file(self) -> Path | None:
        """The data file; None where there is none.

        Raises:
            UserError: It is there in a compression that is not known.
        """
        return find_data(self.spec.data, self.directory)

    def items(self, limit: int | None = None) -> list[Item]:
        """The questions, as :meth:`read` has them."""
        return self.read(limit).items

    def read(self, limit: int | None = None) -> TaskItems:
        """Read the data, from its file or else from the hub, and make the questions.

        Args:
            limit: At most that many, evenly spread over the data.

        Raises:
            UserError: There is no data, it cannot be read, or a line is not as the task expects it.
        """
        path, spec = self.data_file(), self.spec
        if path is not None:
            data = read_file(path)
        elif spec.hub is not None:
            data = read_hub(
                spec.hub, self.file.hub_fields, data=spec.data, where=str(self.file.path)
            )
        else:
            raise self._no_data()
        items = []
        for index in _spread(len(data), limit):
            record, line, where = data.record(index)
            items.append(self.file.templates.item(record, where=where, line=line))
        return TaskItems(items, len(data), data.origin, data.sha256)

    def _no_data(self) -> UserError:
        if self.directory is None:
            place, hint = "", "name the directory that holds it with --tasks-dir"
        else:
            place, hint = f" in {self.directory}", ""
        what = f"its data file {self.spec.data} is not there{place}"
        return UserError(
            str(self.file.path), what, f"{self.spec.data}, .gz, .xz, .zst or .bz2", hint
        )


def load_tasks(
    names: Sequence[str] | None = None,
    tasks_dir: Path | str | None = None,
    *,
    on_note: Callable[[str], None] | None = None,
) -> list[Task]:
    """Find tasks by name.

    Args:
        names: What to find, in this order; None takes all there are.
        tasks_dir: A directory with data files, and with task files of the user's own, which add to
            the shipped ones or, where they have the same name, replace them.
        on_note: Told of YAML files that are passed over, where all tasks are taken.

    Raises:
        UserError: There is no task of a name, no such directory, or something is wrong with a file
            that is asked for.
    """
    directory = None if tasks_dir is None else user_path(tasks_dir)
    files, broken = _read_files(SHIPPED)
    if directory is not None:
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise UserError(str(directory), what, "a directory with the data of tasks")
        own, broken = _read_files(directory)
        files |= own
    wanted = [*files] if names is None else [*dict.fromkeys(names)]
    meant: list[UserError] = [error for error in broken if error.is_task]
    if names is not None:
        meant = [error for error in broken if error.is_task and error.name in wanted]
    if meant:
        raise UserErrors(meant)
    for error in broken:
        if names is None and on_note is not None:
            on_note(f"passed over: {error}")
    for name in wanted:
        if name not in files:
            expected = f"one of {', '.join(files)}"
            unknown = UserError(
                "--tasks", f"{name!r} is no task", expected, nearest(name, [*files])
            )
            raise UserErrors([unknown, *broken])
    return [Task(files[name], directory) for name in wanted]


def score_task(
    task: Task,
    items: Sequence[Item],
    scorer: TaskScorer,
    encode: Callable[[str, str], Request],
    mode: Mode,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> TaskResult:
    """Score the answers of a task's items.

    Args:
        items: From :meth:`Task.read`.
        scorer: A ``Scorer``. On several ranks all call with all items, and get the same.
        encode: From a prompt and an answer to a request: ``encode_pair`` of the model's tokenizer.
        on_progress: Told from time to time how many requests of how many are done.

    Raises:
        UserError: No item's answers fit the model's context; a log-likelihood is not a number.
    """
    begin = time.monotonic()
    room = scorer.longest(mode) - 1  # the context keeps <s> at least
    fitting: list[tuple[Item, list[Request]]] = []
    for item in items:
        requests = _encode(task, item, encode)
        if all(len(request.continuation) <= room for request in requests):
            fitting.append((item, requests))
    if not fitting:
        what = f"every item of {len(items)} has an answer longer than the model's context"
        raise UserError(task.name, what, f"answers of at most {room} tokens")
    requests = list(dict.fromkeys(request for _, group in fitting for request in group))
    report = None if on_progress is None else lambda done: on_progress(done, len(requests))
    scores = dict(zip(requests, scorer.score(requests, mode, on_progress=report), strict=True))
    results = [_item_result(task, item, [scores[r] for r in group]) for item, group in fitting]
    return TaskResult(
        task.name,
        mode,
        results,
        task.spec.metric,
        left_out=len(items) - len(fitting),
        seconds=time.monotonic() - begin,
        seed=seed,
    )


def _encode(task: Task, item: Item, encode: Callable[[str, str], Request]) -> list[Request]:
    try:
        return [encode(item.prompt, choice) for choice in item.choices]
    except UserError as error:
        where = f"{task.name}, line {item.line}"
        raise UserError(f"{where}: {error.where}", error.what, error.expected) from None


def _item_result(task: Task, item: Item, scores: Sequence[Score]) -> ItemResult:
    values = tuple(score.log_likelihood for score in scores)
    if not all(math.isfinite(value) for value in values):
        what = f"the model gives line {item.line} the log-likelihoods {', '.join(map(str, values))}"
        raise UserError(task.name, what, "numbers", "its weights may be broken")
    return ItemResult(
        item=item,
        log_likelihoods=values,
        greedy=tuple(score.is_greedy for score in scores),
        dropped=max(score.dropped for score in scores),
    )


def _spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` things, evenly spread, the first among them."""
    kept = count if limit is None else min(count, limit)
    return [index * count // kept for index in range(kept)]


def _read_files(directory: Path) -> tuple[dict[str, ReadTaskFile], list[BrokenTaskFile]]:
    """Read all task files of a directory, in the order of their names.

    Returns:
        Those that are as they should be, by the task's name; and what is wrong with the others.
    """
    found: dict[str, ReadTaskFile] = {}
    broken: list[BrokenTaskFile] = []
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            file = read_task_file(path)
        except BrokenTaskFile as error:
            broken.append(error)
            continue
        name = file.spec.name
        if name in found:
            what = f"the name {name!r} is that of {found[name].path}, too"
            twice = UserError(f"{path}: name", what, "another name")
            broken.append(BrokenTaskFile([twice], name, is_task=True))
        else:
            found[name] = file
    return found, broken
