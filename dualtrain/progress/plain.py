"""The view where the output is not a terminal: one aligned line per interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from dualtrain.common.formatting import (
    NOTABLE_WAIT_S,
    count,
    difference,
    duration,
    loss,
    number,
    percent,
    printable,
    score,
    size,
)
from dualtrain.progress.metrics import (
    EvalRecord,
    EventRecord,
    Record,
    TasksRecord,
    TrainRecord,
    prefix_difference,
)
from dualtrain.progress.remaining import RemainingTime
from dualtrain.progress.report import RunFacts, RunView, Summary, summary_lines

SUMMARY_WIDTH = 100


class PlainView(RunView):
    """Write lines to a log file, a pipe, or a terminal that cannot redraw.

    Args:
        stream: Where to write. Characters its encoding lacks become ``?``.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._remaining = RemainingTime()

    def start(self, facts: RunFacts, history: Sequence[Record]) -> None:
        self._write(facts.sentence())

    def record(self, record: Record) -> None:
        if record["kind"] == "train":
            self._remaining.add(record)
            self._write(train_line(record, self._remaining.seconds()))
        elif record["kind"] == "eval":
            self._write(eval_line(record))
        elif record["kind"] == "tasks":
            self._write(tasks_line(record))
        elif record["kind"] == "sample":
            text = printable(record["text"]).replace("\n", " ")
            self._write(f"{record['title']} at step {record['step']}: {text}")
        else:
            self._write(event_line(record))

    def message(self, text: str) -> None:
        self._write(text)

    def finish(self, summary: Summary) -> None:
        self._write("\n".join(line.plain for line in summary_lines(summary, SUMMARY_WIDTH)))

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def train_line(record: TrainRecord, remaining_s: float | None) -> str:
    """Return the line of a train record; columns keep their places as numbers grow."""
    steps = str(record["steps"])
    fields = [
        f"step {record['step']:>{len(steps)}}/{steps}",
        f"ar {loss(record['ar_loss']):>7}",
        f"diffusion {loss(record['diffusion_loss']):>7}",
        f"lr {record['lr']:.2e}",
        f"alpha {record['alpha']:.3f}",
        f"{count(record['tokens_per_second']):>5} tokens/s",
        f"epoch {record['epoch']:6.2f}",
        f"ar passes {record['ar_passes']:6.2f}",
        f"gradient norm {number(record['grad_norm']):>6}",
        size(record["memory_bytes"]),
        f"{duration(record['elapsed_s'])} elapsed",
        f"{duration(remaining_s)} left",
    ]
    if record["mfu"] is not None:
        fields.insert(6, f"mfu {percent(record['mfu']):>5}")
    if record["data_wait_s"] >= NOTABLE_WAIT_S:
        fields.append(f"waited {record['data_wait_s']:.1f} s for data")
    fields += [f"{name} {number(value)}" for name, value in record["logged"].items()]
    return " | ".join(fields)


def eval_line(record: EvalRecord) -> str:
    """Return the line of an evaluation."""
    fields = [
        f"held-out at step {record['step']}",
        f"ar {loss(record['ar_nll'])} nats/token, {loss(record['ar_bits_per_byte'])} bits/byte",
        f"diffusion {loss(record['diffusion_nll'])} nats/token, "
        f"{loss(record['diffusion_bits_per_byte'])} bits/byte",
    ]
    change = prefix_difference(record)
    if change is not None:
        fields.append(
            f"prefix {loss(record.get('prefix_nll'))} nats/token, "
            f"{difference(change, record.get('prefix_minus_ar_error'))} to ar on the same tokens"
        )
    return " | ".join([*fields, f"{record['tokens']:,} tokens"])


def tasks_line(record: TasksRecord) -> str:
    """Return the line of the scores on all tasks in one mode."""
    scores = [f"{name} {score(task['score'])}" for name, task in record["tasks"].items()]
    mean = score(record["average"], record["average_low"], record["average_high"])
    average = [f"average {mean}"]
    items = sum(task["items"] for task in record["tasks"].values())
    head = f"tasks at step {record['step']}, {record['mode']} scores"
    return " | ".join([head, *scores, *average, f"{items:,} items"])


def event_line(record: EventRecord) -> str:
    """Return the line of an event."""
    return f"{record['event']} at step {record['step']}: {record['message']}"
