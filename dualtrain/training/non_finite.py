"""Losses that are not finite: found before they reach the weights, and written down.

``train`` gives every slot's loss to a :class:`LossWatch`. Before the update of a step the ranks
vote on whether one was NaN or infinite (``vote.StepVote``); then the step is either left out
(``skip.discard_step``) or ends the run with a report (:func:`write_report`) of the step's slots,
their losses, and the documents of the bad ones. Nothing else need be kept: a run is a pure function
of its step, so the same command meets the step again, bit for bit, from the newest checkpoint.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

from dualtrain.common.errors import UserError
from dualtrain.common.files import write_json
from dualtrain.training.losses import Cause, SlotLoss

if TYPE_CHECKING:
    from dualtrain.training.run import Run

DIRECTORY = "non-finite"
FORMAT = 3


def describe(ranks: list[list[SlotLoss]], *, cause: Cause) -> str:
    """Say what was not finite, in a sentence; ``ranks`` holds the slots of each rank."""
    if cause == "gradient":
        return "every loss was finite, but the gradient was not"
    bad = [(slot, rank) for rank, slots in enumerate(ranks) for slot in slots if not slot.is_finite]
    first, rank = min(bad, key=lambda found: found[0].slot.index)
    others = f", and {len(bad) - 1} more of its losses not finite" if len(bad) > 1 else ""
    where = f"slot {first.slot.index} (rank {rank})"
    return f"the {first.slot.objective} loss of {where} was {first.loss}{others}"


def write_report(run: Run, ranks: list[list[SlotLoss]], *, cause: Cause) -> str:
    """Write down the step that is not finite."""
    path = run.run_dir / DIRECTORY / f"step-{run.state.step:08d}.json"
    if run.world.rank == 0:
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, _facts(run, ranks, cause))
        except (OSError, UserError) as error:
            return f"The report could not be written: {error}"
    return f"The step's slots, losses and documents are in {path}"


def _facts(run: Run, ranks: list[list[SlotLoss]], cause: Cause) -> dict[str, object]:
    """What ``report.json`` holds."""
    slots = [_slot_facts(slot, rank) for rank, slots in enumerate(ranks) for slot in slots]
    device = run.state.device
    return {
        "format": FORMAT,
        "step": run.state.step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cause": cause,
        "ranks": run.world.world_size,
        "zero_stage": run.derived.zero_stage,
        "precision": run.recipe.engine.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dataset": run.origin.fingerprint,
        "checkpoint": None if run.last_saved is None else str(run.last_saved),
        "slots": sorted(slots, key=lambda slot: slot["slot"]),
    }


def _slot_facts(found: SlotLoss, rank: int) -> dict[str, Any]:
    slot = found.slot
    facts: dict[str, Any] = {
        "slot": slot.index,
        "rank": rank,
        "objective": slot.objective,
        "stream": slot.stream,
        "first_sequence": slot.first_sequence,
        # JSON has no NaN and no infinity.
        "loss": found.loss if found.is_finite else str(found.loss),
    }
    if not found.is_finite:
        facts["documents"] = found.documents
    return facts
