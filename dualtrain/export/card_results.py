"""What a model card says of how well a model does: held-out losses, and scores on tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dualtrain.common.formatting import loss

_LOSSES = {
    "ar": "autoregressive",
    "diffusion": "diffusion, upper bound",
    "prefix": "prefix: second halves of documents, first halves read in both directions",
}


def held_out(facts: Mapping[str, Any]) -> str:
    """A table of the last held-out losses.

    Args:
        facts: The checkpoint's ``state.json``.
    """
    last = facts.get("last_eval")
    if not last:
        return "The run had none by then."
    lines = ["| | nats per token | standard error | bits per byte |", "|---|---|---|---|"]
    for key, name in _LOSSES.items():
        if last.get(f"{key}_nll") is None:
            continue  # of an older version, or no document is long enough
        values = (last.get(f"{key}_{what}") for what in ("nll", "error", "bits_per_byte"))
        lines.append(f"| {name} | {' | '.join(map(loss, values))} |")
    note = f"At step {last['step']:,}, on {last['tokens']:,} held-out tokens"
    same = last.get("ar_nll_same_tokens")
    if same is not None and last.get("prefix_nll") is not None:
        note += (
            f"; the prefix loss is of {last['prefix_tokens']:,} of them, whose autoregressive loss"
            f" is {loss(same)}"
        )
    return "\n".join([*lines, "", note + "."])


def task_scores(facts: Mapping[str, Any]) -> Iterator[str]:
    """A section of the scores on tasks; nothing where the run had none.

    Args:
        facts: The checkpoint's ``state.json``.
    """
    records = facts.get("last_scores")
    if not records:
        return
    names = list(dict.fromkeys(name for record in records for name in record["tasks"]))
    modes = [record["mode"] for record in records]
    yield "## Tasks"
    lines = [f"| | {' | '.join(modes)} |", "|---" * (1 + len(modes)) + "|"]
    for name in names:
        scores = (_score(record["tasks"].get(name)) for record in records)
        lines.append(f"| {name} | {' | '.join(scores)} |")
    averages = (f"**{record['average']:.1f}**" for record in records)
    lines.append(f"| **average** | {' | '.join(averages)} |")
    steps = " and ".join(f"{step:,}" for step in sorted({record["step"] for record in records}))
    note = (
        "Zero-shot, by mode of scoring: 0 is chance and 100 perfect; in brackets 95 % over items."
        f" At step {steps}."
    )
    yield "\n".join([*lines, "", note])


def _score(task: Mapping[str, Any] | None) -> str:
    if task is None:
        return "-"
    return f"{task['score']:.1f} ({task['score_low']:.1f} to {task['score_high']:.1f})"
