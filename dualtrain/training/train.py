"""The loop, top to bottom.

``train`` assembles a run from its recipe (``assemble``), then ``fit`` goes through its steps; at
each of the twelve moments of :class:`~dualtrain.algorithms.events.Event` the algorithms are asked
what to do.
Nothing here waits for the device to finish a step: when the host learns whether the losses were
finite, which decides whether there is an update, the device is still at the last backward pass.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from dualtrain.algorithms.events import Event, State
from dualtrain.checkpoint import store as checkpoint
from dualtrain.common.errors import (
    EXIT_DONE,
    EXIT_NON_FINITE_LOSS,
    EXIT_SAVED_AFTER_SIGNAL,
    UserError,
)
from dualtrain.data.dataset import DATASET_FILE, TOKENIZER_FILE
from dualtrain.data.plan import DATA_ORDER
from dualtrain.engine.build import set_learning_rate
from dualtrain.engine.process import leave_distributed
from dualtrain.engine.skip import (
    discard_step,
    was_skipped,
)
from dualtrain.launch.vote import Verdict
from dualtrain.method.schedules import learning_rate_factor
from dualtrain.model.build import CONFIG
from dualtrain.progress.meter import train_record
from dualtrain.progress.metrics import Position
from dualtrain.progress.progress import ViewChoice
from dualtrain.recipe.schema import Recipe
from dualtrain.training.assemble import assemble
from dualtrain.training.evaluation import evaluate
from dualtrain.training.losses import (
    Cause,
    NonFiniteLoss,
)
from dualtrain.training.non_finite import (
    describe,
    write_report,
)
from dualtrain.training.run import Run
from dualtrain.training.slot import slot_loss
from dualtrain.training.summary import report_groups, run_facts, sample_rows, summarise


def train(recipe: Recipe, *, view: ViewChoice = "auto") -> int:
    """Run a recipe as one rank, from its newest checkpoint if there is one."""
    # A caller that trains several recipes keeps its process group from one to the next.
    joins_group = not dist.is_initialized()
    run = assemble(recipe, view=view)
    try:
        sample_rows(run)
        with run.vote.signals:
            code = fit(run)
    finally:
        run.close()
    run.engine.destroy()
    del run
    if joins_group:
        leave_distributed()
    return code


def fit(run: Run) -> int:
    """Train from the run's first step to its last, a signal, or an early stop; returns the code."""
    state = run.state
    run.progress.start(run_facts(run))
    report_groups(run)
    for warning in [*run.derived.warnings, *(run.tasks.warnings if run.tasks else ())]:
        run.progress.message(f"warning: {warning}")
    for note in run.origin.resume.notes:
        run.progress.event("resume", note, step=state.step)
    run.dispatch(Event.FIT_START)
    run.meter.start()
    stop = False
    try:
        while state.step < state.steps and not stop and not run.best.is_enough:
            verdict = train_step(run)
            stop = verdict.stop
            finish_step(run, stop=stop)
    except NonFiniteLoss as error:
        run.progress.event("non_finite_loss", str(error), step=state.step)
        return EXIT_NON_FINITE_LOSS
    run.dispatch(Event.FIT_END)
    stopped = state.step < state.steps and not run.best.is_enough
    run.progress.finish(summarise(run, stopped=stopped))
    return EXIT_SAVED_AFTER_SIGNAL if stopped else EXIT_DONE


def train_step(run: Run) -> Verdict:
    """One optimizer update: every slot of this rank, one after another.

    Returns:
        What the ranks agreed on before the update.

    Raises:
        NonFiniteLoss: before the update, when a loss is not finite on any rank.
    """
    state = run.state
    run.losses.start_step()
    run.meter.mark()
    begin_step(state)
    run.dispatch(Event.STEP_START)
    set_learning_rate(run.engine, state.learning_rate)
    for slots_left in reversed(range(run.slots_per_rank)):
        train_slot(run)
        acknowledge_signal(run)
        if slots_left:
            # Only counts; the update comes with the last slot of the step.
            run.engine.step()
    verdict = run.vote.take(non_finite=run.losses.non_finite())
    if verdict.non_finite:
        leave_out(run, "loss")
        run.gradients.discard()
        discard_step(run.engine)
    else:
        run.gradients.prepare()
        run.engine.step()
        run.meter.add_update(run.gradients.norm)
        if was_skipped(run.engine):
            leave_out(run, "gradient")
    run.dispatch(Event.STEP_END)
    state.step += 1
    return verdict


def begin_step(state: State) -> None:
    """Give the state the alpha and the learning rate of its step."""
    # The mixture decides: data is prepared ahead, so which slots a step has must be known before.
    state.alpha = float(state.mixture.alpha_at(state.step))
    optim = state.recipe.optim
    state.learning_rate = optim.lr * learning_rate_factor(optim.schedule, state.step, state.steps)


def train_slot(run: Run) -> None:
    """One micro-batch: forward with its objective's input and attention, then backward."""
    state = run.state
    state.slot, state.batch = slot, batch = next(run.batches)
    slot_loss(state, run.dispatcher, run.handle)
    run.losses.add(slot, batch, state.loss)
    run.engine.backward(state.loss)
    run.dispatch(Event.AFTER_BACKWARD)
    output = state.output
    assert output.cross_entropy is not None  # there are targets
    run.meter.add(
        slot.objective,
        output.cross_entropy,
        output.z_loss,
        tokens=batch.document_ids.numel(),
        loss=state.loss,
    )


def acknowledge_signal(run: Run) -> None:
    """Tell the user once that a stop signal has arrived, which takes effect after the step."""
    if run.vote.signals.count and not run.vote.is_acknowledged:
        run.vote.is_acknowledged = True
        run.progress.message("stopping after this step, to save; a second signal stops at once")


def leave_out(run: Run, cause: Cause) -> None:
    """Go on without this step's update, if ``engine.skip_non_finite`` allows one more such step.

    Args:
        cause: What is not finite. After a bad gradient DeepSpeed has made no update already.
    """
    allowed, losses = run.recipe.engine.skip_non_finite, run.losses
    ranks = run.vote.gather(losses.slots())
    what = f"in update {run.state.step + 1}, {describe(ranks, cause=cause)}"
    if losses.skipped >= allowed:
        report = write_report(run, ranks, cause=cause)
        raise NonFiniteLoss(
            f"{what}. {report}. The same command meets it again, bit for bit, from the newest "
            f"checkpoint; engine.skip_non_finite={allowed + 1} goes on without this step's update"
        )
    losses.skipped += 1
    run.meter.rewind()
    message = f"{what}; no update from it (engine.skip_non_finite: {losses.skipped} of {allowed})"
    run.progress.event("step_left_out", message, step=run.state.step)


def finish_step(run: Run, *, stop: bool) -> None:
    """Record, evaluate and save what is due; save in any case when the run is to ``stop``."""
    recipe, step = run.recipe, run.state.step
    is_last = step == run.state.steps
    run.progress.tick(step)
    if is_last or is_due(step, recipe.progress.interval_steps):
        record(run)
    with_tasks = run.tasks is not None and (
        is_last or is_due(step, recipe.eval.task_interval_steps)
    )
    if with_tasks or is_last or is_due(step, recipe.eval.interval_steps):
        evaluate(run, with_tasks=with_tasks)
    if run.best.is_enough and not is_last:
        run.progress.event("early_stop", f"stopping early: {run.best.sentence()}", step=step)
    is_final = is_last or stop or run.best.is_enough
    is_asked_for = run.best.step == step or step in run.derived.words
    if is_final or is_asked_for or is_due(step, recipe.checkpoint.interval_steps):
        save(run, is_final=is_final)


def is_due(step: int, interval: int) -> bool:
    """Whether something done every ``interval`` steps (0: never) is due after ``step`` of them."""
    return interval > 0 and step % interval == 0


def record(run: Run) -> None:
    """Close the interval: one synchronisation, one line of metrics.

    Raises:
        NonFiniteLoss: when a number of the record is not finite although every loss was.
    """
    state, mixture = run.state, run.state.mixture
    interval = run.meter.interval(data_wait_s=run.data_wait_s())
    step = state.step
    derived = run.derived
    tokens = step * derived.tokens_per_step
    slot_tokens = run.recipe.micro_batch * run.recipe.sequence_length
    ar_slots = mixture.ar_slots_before(step)
    position = Position(
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
    run.progress.record(train_record(interval, position))
    if interval.non_finite:
        raise NonFiniteLoss(unseen(run, f"numbers of {' and '.join(interval.non_finite)}"))


def unseen(run: Run, what: str) -> str:
    """Say that something became bad beside losses and gradients that were finite."""
    saved = "nothing was saved" if run.last_saved is None else f"the newest is {run.last_saved}"
    return (
        f"{what} were not finite by step {run.state.step}, though every loss was. No checkpoint is "
        f"made of these weights: {saved}"
    )


def save(run: Run, *, is_final: bool) -> None:
    """Write a checkpoint and remove those that are not kept.

    Args:
        is_final: Whether the run ends here; otherwise it survives a full disk without the
            checkpoint.
    """
    finite = run.meter.finite().float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite.item():
        raise NonFiniteLoss(unseen(run, "numbers of the record"))
    try:
        with run.progress.busy("saving"), run.meter.paused():
            path = write_checkpoint(run)
    except checkpoint.SaveFailed as error:
        if is_final:
            raise UserError(
                str(run.run_dir),
                f"the checkpoint of step {run.state.step} could not be written: {error}",
                "room for it",
                "make room and give the same command; it goes on from the newest checkpoint",
            ) from None
        # The run is worth more than this one checkpoint; the next interval tries again.
        message = f"not saved, the run goes on: {error}"
        run.progress.event("checkpoint_failed", message, step=run.state.step)
        return
    run.last_saved = path
    run.progress.event("checkpoint", str(path), step=run.state.step)
    run.dispatch(Event.CHECKPOINT_SAVED)


def write_checkpoint(run: Run) -> Path:
    """Save everything that the run needs to go on, on all ranks; returns the checkpoint."""
    path = checkpoint.save(
        run.run_dir,
        engine=run.engine,
        world=run.world,
        step=run.state.step,
        texts={
            checkpoint.RECIPE: run.origin.text,
            CONFIG: run.state.model.config.to_json_string(),
            DATASET_FILE: run.dataset.info.model_dump_json(),
            TOKENIZER_FILE: run.dataset.tokenizer_path.read_text(),
        },
        facts={
            "zero_stage": run.derived.zero_stage,
            "precision": run.recipe.engine.precision,
            "fingerprint": run.origin.fingerprint,
            "data_order": DATA_ORDER,
            "elapsed_s": run.elapsed_s(),
            "best": run.best.facts(),
            "last_eval": run.last_eval,
            "last_scores": run.last_scores,
            "skipped_steps": run.losses.skipped,
            "words": run.derived.words.get(run.state.step, ()),
        },
        rank_state={
            "algorithms": run.dispatcher.state_dict(),
            "meter": run.meter.state_dict(),
        },
    )
    if run.world.rank == 0:
        keep, besides = run.recipe.checkpoint.keep, {run.best.step, *run.derived.words}
        for left in checkpoint.retain(run.run_dir, keep, besides=besides):
            run.progress.message(f"warning: {left} could not be removed")
    return path
