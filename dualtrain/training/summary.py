"""What a run tells its user at the start and at the end, samples included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dualtrain.checkpoint.store import RECIPE, checkpoint_path
from dualtrain.common import randomness
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import parse_tokenizer
from dualtrain.engine.groups import list_groups, summarise_groups
from dualtrain.generate.autoregressive import continue_prompts
from dualtrain.generate.decode import label_pieces
from dualtrain.generate.diffusion import fill_masks
from dualtrain.generate.prompts import encode_prompt, parse_gaps
from dualtrain.generate.settings import Settings
from dualtrain.progress.metrics import FILE_NAME
from dualtrain.progress.report import RunFacts, Sample, Summary

if TYPE_CHECKING:
    from dualtrain.training.run import Run


def run_facts(run: Run) -> RunFacts:
    """What does not change during the run, for the view."""
    state, derived = run.state, run.derived
    device = "CPU"
    if state.device.type == "cuda":
        device = f"{run.world.world_size} x {torch.cuda.get_device_name(state.device)}"
    return RunFacts(
        name=run.recipe.name,
        run_dir=str(run.run_dir),
        devices=device,
        ranks=run.world.world_size,
        parameters=run.parameters,
        steps=state.steps,
        tokens_per_step=derived.tokens_per_step,
        unique_tokens=derived.unique_tokens,
        epochs=derived.repetitions,
        ar_passes=derived.ar_passes,
        first_step=run.origin.first_step,
        elapsed_s=run.origin.elapsed_s,
    )


def report_groups(run: Run) -> None:
    """Show the optimizer's groups in a line, and write all their names to the run's logs."""
    groups = run.state.optimizer_groups
    path = run.run_dir / "logs" / "parameters.txt"
    if run.world.rank == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(list_groups(groups, run.recipe.optim)) + "\n")
    run.progress.message(f"parameter groups: {summarise_groups(groups)}; names in {path}")


def summarise(run: Run, *, stopped: bool) -> Summary:
    """The end of a run. All ranks call: a sample's forward pass is a collective under ZeRO 3."""
    written = {
        "run": str(run.run_dir),
        "metrics": str(run.run_dir / FILE_NAME),
        "tokenizer": str(run.dataset.tokenizer_path),
    }
    if run.last_saved is not None:
        written["checkpoint"] = str(run.last_saved)
    if run.best.step is not None:
        path = checkpoint_path(run.run_dir, run.best.step)
        if path.exists():  # a branch may have it from the run that it left
            written[f"lowest {run.best.objective}"] = str(path)
    if "tensorboard" in run.recipe.progress.trackers:
        written["tensorboard"] = str(run.run_dir / "tensorboard")
    return Summary(
        step=run.state.step,
        tokens=run.state.step * run.derived.tokens_per_step,
        elapsed_s=run.elapsed_s(),
        held_out=run.last_eval,
        scores=run.last_scores,
        samples=[] if stopped else make_samples(run),
        written=written,
        next_commands=_next_commands(run, stopped=stopped),
        outcome=_outcome(run, stopped=stopped),
    )


def _outcome(run: Run, *, stopped: bool) -> str:
    if stopped:
        return "stopped by a signal, saved"
    is_early = run.state.step < run.state.steps
    return f"stopped early ({run.best.sentence()})" if is_early else "done"


def sample_rows(run: Run) -> tuple[list[int], list[int]]:
    """The ids of the recipe's prompt and of its text with gaps; empty where none is wanted.

    Called before training, so that a mistake in them does not come to light after it.
    """
    wanted, info = run.recipe.sample, run.dataset.info
    tokenizer = parse_tokenizer(run.dataset.tokenizer_path)
    prompt, gaps = [], []
    if wanted.tokens:
        prompt = encode_prompt(wanted.prompt, tokenizer, bos_id=info.bos_id)
    if wanted.infill:
        gaps = parse_gaps(wanted.infill, tokenizer, bos_id=info.bos_id, mask_id=info.mask_id)
    context = run.recipe.sequence_length
    for key, row in (("prompt", prompt), ("infill", gaps)):
        if len(row) > context:
            raise UserError(
                f"sample.{key}", f"{len(row)} tokens", f"at most {context}, the sequence_length"
            )
    return prompt, gaps


def make_samples(run: Run) -> list[Sample]:
    """An AR sample and an infilled one, as the recipe's ``sample`` section asks."""
    wanted, info = run.recipe.sample, run.dataset.info
    tokenizer = parse_tokenizer(run.dataset.tokenizer_path)

    def generators() -> list[np.random.Generator]:
        return [randomness.generator(run.recipe.seed, "generate", 0, 0)]

    samples = []
    prompt, gaps = sample_rows(run)
    settings = Settings(tokens=max(1, wanted.tokens), temperature=wanted.temperature)
    with run.progress.busy("sampling"):
        if prompt:
            (new,) = continue_prompts(run.handle, [prompt], settings, generators=generators())
            is_new = [False] * len(prompt) + [True] * len(new.ids)
            pieces = label_pieces([*prompt, *new.ids], is_new, tokenizer)
            samples.append(Sample("AR sample", tuple((p.text, p.label) for p in pieces)))
        if gaps:
            (filled,) = fill_masks(run.handle, [gaps], settings, generators=generators())
            is_new = [token == info.mask_id for token in gaps]
            pieces = label_pieces(filled, is_new, tokenizer)
            samples.append(Sample("infilled", tuple((p.text, p.label) for p in pieces)))
    return samples


def _next_commands(run: Run, *, stopped: bool) -> list[tuple[str, str]]:
    recipe = str(run.run_dir / RECIPE)
    if stopped:
        resume = run.recipe.checkpoint.resume
        again = "" if resume == "auto" else " checkpoint.resume=auto"
        world = run.world
        here = world.world_size > 1 and world.local_world_size == world.world_size
        ranks = f" --ranks {world.world_size}" if here else ""
        return [(f"dualtrain run {recipe}{again}{ranks}", "continue where it stopped")]
    if run.state.step < run.state.steps:
        return [(f"dualtrain run {recipe} eval.patience=null", "go on from where it stopped early")]
    return [
        (
            f"dualtrain run {recipe} alpha=1 name={run.recipe.name}-ar run_dir=null",
            "the same without diffusion, to compare the held-out losses",
        ),
        ("dualtrain run --dry-run paper/470m", "what the paper's model takes"),
    ]
