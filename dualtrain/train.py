"""The loop, top to bottom.

``train`` assembles a run from its recipe (``assemble``), then ``fit`` goes through its steps; at
each of the twelve moments of :class:`~dualtrain.events.Event` the algorithms are asked what to do.
Nothing here waits for the device within a step: losses stay where they are until an interval ends.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from dualtrain import checkpoint
from dualtrain.assemble import Run, assemble
from dualtrain.engine import leave_distributed, set_learning_rate
from dualtrain.errors import EXIT_DONE, EXIT_NON_FINITE_LOSS, EXIT_SAVED_AFTER_SIGNAL
from dualtrain.evaluate import held_out_losses
from dualtrain.events import Event
from dualtrain.model import DualOutput, plan_attention, select_positions, to_device
from dualtrain.progress import ViewChoice, train_record
from dualtrain.recipe.schema import Recipe
from dualtrain.signals import watch_signals
from dualtrain.summary import run_facts, sample_rows, summarise

Thing = TypeVar("Thing")


class NonFiniteLoss(Exception):
    """A loss became NaN or infinite; the run stops and keeps its last checkpoint."""


def train(recipe: Recipe, *, view: ViewChoice = "auto") -> int:
    """Run a recipe as one rank, from its newest checkpoint if there is one.

    Args:
        recipe: The resolved recipe; the same on every rank.
        view: What the terminal shows.

    Returns:
        The exit code: done, saved after a signal, or stopped by a non-finite loss.

    Raises:
        UserError: for what the user can mend, before the first step.
    """
    # A caller that trains several recipes keeps its process group from one to the next.
    joins_group = not dist.is_initialized()
    run = assemble(recipe, view=view)
    try:
        sample_rows(run)
        with watch_signals(run.stop):
            code = fit(run)
        run.stop.close()
    finally:
        run.close()
    run.engine.destroy()
    del run
    if joins_group:
        leave_distributed()
    return code


def fit(run: Run) -> int:
    """Train from the run's first step to its last, or to a signal; returns the exit code."""
    state = run.state
    run.progress.start(run_facts(run))
    for warning in run.derived.warnings:
        run.progress.message(f"warning: {warning}")
    run.dispatch(Event.FIT_START)
    run.meter.start()
    stop = False
    try:
        while state.step < state.steps and not stop:
            train_step(run)
            stop = finish_step(run)
    except NonFiniteLoss as error:
        run.progress.event("non_finite_loss", str(error), step=state.step)
        return EXIT_NON_FINITE_LOSS
    run.dispatch(Event.FIT_END)
    stopped = state.step < state.steps
    run.progress.finish(summarise(run, stopped=stopped))
    return EXIT_SAVED_AFTER_SIGNAL if stopped else EXIT_DONE


def train_step(run: Run) -> None:
    """One optimizer update: every slot of this rank, one after another."""
    state = run.state
    run.dispatch(Event.STEP_START)
    set_learning_rate(run.engine, state.optimizer_groups, state.learning_rate)
    for _ in range(run.slots_per_rank):
        train_slot(run)
    run.dispatch(Event.STEP_END)
    state.step += 1


def train_slot(run: Run) -> None:
    """One micro-batch: forward with its objective's input and attention, then backward."""
    state = run.state
    state.slot, state.batch = slot, batch = next(run.batches)
    run.dispatch(Event.BATCH_START)
    run.dispatch(Event.BEFORE_FORWARD)
    state.output = forward(run)
    run.dispatch(Event.AFTER_FORWARD)
    output = there(state.output)
    state.loss = there(output.loss) * slot.loss_scale
    run.dispatch(Event.AFTER_LOSS)
    run.engine.backward(there(state.loss))
    run.dispatch(Event.AFTER_BACKWARD)
    # Updates the weights after the last slot of the step, and only then.
    run.engine.step()
    run.meter.add(
        slot.objective,
        there(output.cross_entropy),
        output.z_loss,
        tokens=batch.document_ids.numel(),
        loss=state.loss,
    )


def forward(run: Run) -> DualOutput:
    """Give the state's example to the engine, under the attention of its objective."""
    state = run.state
    example = there(state.example)
    attention = plan_attention(
        example.attention,
        example.document_ids,
        backend=run.backend,
        device=state.device,
        dtype=run.compute_dtype,
    )
    # Chosen before the weights leave the CPU, so that the head runs only where there is a loss.
    selection = select_positions(example.weights)
    moved = example.to(state.device)
    return run.engine(
        moved.input_ids,
        attention=attention,
        targets=moved.targets,
        weights=moved.weights,
        z_loss=run.recipe.objective.z_loss,
        selection=None if selection is None else to_device(selection, state.device),
    )


def there(value: Thing | None) -> Thing:
    """A part of the state that exists at this moment, unless an algorithm has taken it away."""
    if value is None:
        raise ValueError("an algorithm set a part of the state to None that the loop needs")
    return value


def finish_step(run: Run) -> bool:
    """Record, evaluate and save what is due; returns whether the ranks agreed to stop."""
    recipe, step = run.recipe, run.state.step
    is_last = step == run.state.steps
    run.progress.tick(step)
    if is_last or is_due(step, recipe.progress.interval_steps):
        record(run)
    if is_last or is_due(step, recipe.eval.interval_steps):
        evaluate(run)
    stop = run.stop.agreed()
    if is_last or stop or is_due(step, recipe.checkpoint.interval_steps):
        save(run)
    return stop


def is_due(step: int, interval: int) -> bool:
    """Whether something done every ``interval`` steps (0: never) is due after ``step`` of them."""
    return interval > 0 and step % interval == 0


def record(run: Run) -> None:
    """Close the interval: one synchronisation, one line of metrics.

    Raises:
        NonFiniteLoss: when a slot's loss was not finite.
    """
    state, mixture = run.state, run.state.mixture
    interval = run.meter.interval(data_wait_s=run.data_wait_s())
    step = state.step
    derived = run.derived
    tokens = step * derived.tokens_per_step
    slot_tokens = run.recipe.micro_batch * run.recipe.sequence_length
    ar_slots = mixture.ar_slots_before(step)
    run.progress.record(
        train_record(
            interval,
            step=step,
            steps=state.steps,
            tokens=tokens,
            epoch=tokens / derived.unique_tokens,
            lr=state.learning_rate,
            alpha=state.alpha,
            ar_slots=ar_slots,
            diffusion_slots=mixture.diffusion_slots_before(step),
            ar_passes=ar_slots * slot_tokens / derived.unique_tokens,
            elapsed_s=run.elapsed_s(),
        )
    )
    if interval.non_finite:
        raise NonFiniteLoss(
            f"the {' and '.join(interval.non_finite)} loss was not finite in the steps up to {step}"
        )


def evaluate(run: Run) -> None:
    """Held-out losses of both objectives, on all ranks."""
    with run.progress.busy("evaluating"), run.meter.paused():
        losses = held_out_losses(
            run.engine,
            run.validation,
            micro_batch=run.recipe.micro_batch,
            mask_id=run.state.vocabulary.mask_id,
            special_ids=run.state.vocabulary.special_ids,
            target=run.recipe.objective.target,
            rank=run.world.rank,
            world_size=run.world.world_size,
            backend=run.backend,
            device=run.state.device,
            dtype=run.compute_dtype,
        )
    run.last_eval = losses.record(run.state.step, run.elapsed_s())
    run.progress.record(run.last_eval)
    run.state.metrics = losses.metrics()
    run.dispatch(Event.EVAL_END)


def save(run: Run) -> None:
    """Write a checkpoint and remove those that are not kept.

    Raises:
        NonFiniteLoss: when a loss since the last record was not finite on any rank.
    """
    finite = run.meter.finite().float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite.item():
        raise NonFiniteLoss(f"a loss was not finite in the steps up to {run.state.step}")
    with run.progress.busy("saving"), run.meter.paused():
        path = checkpoint.save(
            run.run_dir,
            engine=run.engine,
            world=run.world,
            step=run.state.step,
            recipe_text=run.text,
            facts={
                "zero_stage": run.zero_stage,
                "precision": run.recipe.engine.precision,
                "fingerprint": run.fingerprint,
                "elapsed_s": run.elapsed_s(),
                "last_eval": run.last_eval,
            },
            rank_state={
                "algorithms": run.dispatcher.state_dict(),
                "meter": run.meter.state_dict(),
            },
        )
        if run.world.rank == 0:
            checkpoint.retain(run.run_dir, run.recipe.checkpoint.keep)
    run.last_saved = path
    run.progress.event("checkpoint", str(path), step=run.state.step)
    run.dispatch(Event.CHECKPOINT_SAVED)
