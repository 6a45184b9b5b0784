"""Tests of: dualtrain.training.losses, non_finite, engine.skip, launch.vote.

Losses that are not finite: never in the weights, written down, met again, left out if asked.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from helpers.ranks import on_ranks
from helpers.runs import records, tiny_loader
from safetensors.torch import load_file

from dualtrain.algorithms.events import Algorithm, Event, Logger, State
from dualtrain.data.batches import Batch
from dualtrain.engine.process import init_distributed, leave_distributed, prepare_process
from dualtrain.launch.vote import StepVote
from dualtrain.method.mixing import Slot
from dualtrain.recipe.load import LoadedRecipe, load_recipe
from dualtrain.recipe.schema import Recipe
from dualtrain.training.assemble import assemble
from dualtrain.training.losses import LossWatch
from dualtrain.training.train import finish_step, train, train_step

SETTINGS = (
    "steps=6",
    "eval.sequences=4",
    "progress.interval_steps=2",
    "sample={tokens: 0, infill: ''}",
)
# In bf16, stage 1 has an optimizer of its own, stages 0 and 2 keep fp32 weights under autocast.
ENGINES = [*((f"zero{stage}", "fp32") for stage in range(4)), ("zero1", "bf16"), ("zero2", "bf16")]
SKIPPED_BY_DEEPSPEED = [("zero0", "fp32"), ("zero3", "fp32"), ("zero1", "bf16")]


class AtSlot(Algorithm):
    """Acts at one event of the given steps, on one slot."""

    event = Event.AFTER_LOSS

    def __init__(self, *, step: int, slot: int) -> None:
        self.step, self.slot = step, slot

    def match(self, event: Event, state: State) -> bool:
        if event is not self.event or state.step != self.step:
            return False
        return state.slot is not None and state.slot.index == self.slot


class SpoilLoss(AtSlot):
    """Make a loss NaN after the model, and log a NaN beside it."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.loss = state.loss * torch.nan
        logger.log("spoilt", float("nan"))


class SpoilInput(AtSlot):
    """Give the model a token id whose embedding overflows."""

    event = Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        weights = state.example.weights.clone()
        weights.view(-1)[weights.view(-1).nonzero()[0]] = torch.inf
        state.example.weights = weights


class SpoilGradient(AtSlot):
    """Leave the loss as it is, but give it a slope that is infinite."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.loss = state.loss + (state.loss - state.loss.detach()).sqrt()


class Drift(Algorithm):
    """Has a state, which every slot changes, and draws from torch's global generator."""

    def __init__(self) -> None:
        self.mean = 0.0

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.mean = 0.9 * self.mean + 0.1 * state.slot.index + float(torch.rand(()))
        state.loss = state.loss * (1 + 0.01 * self.mean)

    def state_dict(self) -> dict[str, object]:
        return {"mean": self.mean}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        self.mean = state_dict["mean"]


@pytest.fixture(scope="module")
def tiny(tiny_dataset, tmp_path_factory):
    """A function from overrides to a loaded recipe of a very small run."""
    load_tiny = tiny_loader(tiny_dataset, tmp_path_factory.mktemp("runs"))

    def load(name: str, *overrides: str) -> LoadedRecipe:
        return load_tiny(*SETTINGS, *overrides, name=name)

    return load


def algorithm(name: str, **arguments: int) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"{{use: {__name__}:{name}, args: {{{inner}}}}}"


def engine(stage: str, precision: str) -> list[str]:
    return [f"engine.deepspeed={stage}", f"engine.precision={precision}"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "weights.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def events(recipe: LoadedRecipe) -> list[str]:
    return [record["event"] for record in records(recipe, "event")]


def run_all(cases: list[tuple[str, tuple[int, ...]]]) -> list[int]:
    """Run recipes one after another on these ranks; of some, steps are never taken.

    Args:
        cases: Resolved recipes, each with the steps that are left out as if they were not there:
            their data is passed over, nothing is computed.
    """
    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    codes = []
    for text, without in cases:
        recipe = Recipe.model_validate(yaml.safe_load(text))
        codes.append(_train_without(recipe, without) if without else train(recipe, view="none"))
    leave_distributed()
    return codes


def _train_without(recipe, without: tuple[int, ...]) -> int:
    run = assemble(recipe, view="none")
    while run.state.step < run.state.steps:
        if run.state.step in without:
            for _ in range(run.slots_per_rank):
                next(run.batches)
            run.state.step += 1
        else:
            train_step(run)
        finish_step(run, stop=False)
    run.close()
    run.engine.destroy()
    return 0


def run_on(ranks: int, tmp_path: Path, *cases: tuple[LoadedRecipe, tuple[int, ...]]) -> list[int]:
    """Run on real ranks, which must agree on the exit codes."""
    given = [(recipe.text, without) for recipe, without in cases]
    codes = on_ranks(run_all, given, ranks=ranks, tmp_path=tmp_path)
    assert all(code == codes[0] for code in codes)
    return codes[0]


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> dict[str, LoadedRecipe]:
    """Runs that a bad slot of step 3 has stopped, with a checkpoint of the step before it."""
    drift = algorithm("Drift")
    spoilt = f"algorithms=[{drift}, {algorithm('SpoilLoss', step=3, slot=5)}]"
    recipes = {
        "-".join(where): tiny("loss-" + "-".join(where), spoilt, *engine(*where))
        for where in ENGINES
    }
    for name in ("SpoilInput", "SpoilGradient"):
        bad = f"algorithms=[{algorithm(name, step=3, slot=5)}]"
        recipes[name] = tiny(name, bad, *engine("zero2", "fp32"))
    for where in SKIPPED_BY_DEEPSPEED:
        name = "gradient-" + "-".join(where)
        bad = f"algorithms=[{algorithm('SpoilGradient', step=3, slot=5)}]"
        recipes[name] = tiny(name, bad, *engine(*where))
    folder = tmp_path_factory.mktemp("stopped")
    saving = [
        load_recipe_with(recipe, "checkpoint.interval_steps=3", folder / f"{name}.yaml")
        for name, recipe in recipes.items()
    ]
    assert run_on(2, folder, *((recipe, ()) for recipe in saving)) == [3] * len(saving)
    return recipes


def load_recipe_with(recipe: LoadedRecipe, override: str, file: Path) -> LoadedRecipe:
    file.write_text(recipe.text)
    return load_recipe(str(file), [override])


def report_of(recipe: LoadedRecipe) -> dict:
    path = recipe.recipe.directory / "non-finite" / "step-00000003.json"
    return json.loads(path.read_text())


def test_report_names_the_slot_and_its_documents(stopped):
    for name, recipe in stopped.items():
        facts, newest = report_of(recipe), recipe.recipe.directory / "step-00000003"
        assert facts["checkpoint"] == str(newest), name
        assert [slot["slot"] for slot in facts["slots"]] == list(range(8))
        bad = [slot for slot in facts["slots"] if not math.isfinite(float(slot["loss"]))]
        by_gradient = "radient" in name
        assert facts["cause"] == ("gradient" if by_gradient else "loss")
        assert [slot["slot"] for slot in bad] == ([] if by_gradient else [5]), name
        assert all(slot["documents"] for slot in bad)
        message = records(recipe, "event")[-1]
        assert message["event"] == "non_finite_loss" and message["step"] == 3
        assert "non-finite/step-00000003.json. The same command" in message["message"]
        assert not (recipe.recipe.directory / "step-00000006").exists()


def test_the_same_command_meets_the_step_again_bit_for_bit(stopped, tmp_path):
    """Through algorithms with a state, and torch's global generator, which checkpoints hold."""
    again = [stopped[name] for name in ("zero0-fp32", "zero3-fp32", "zero1-bf16", "SpoilInput")]
    before = [report_of(recipe)["slots"] for recipe in again]
    for recipe in again:
        shutil.rmtree(recipe.recipe.directory / "non-finite")
    assert run_on(2, tmp_path, *((recipe, ()) for recipe in again)) == [3] * len(again)
    assert [report_of(recipe)["slots"] for recipe in again] == before


def test_left_out_steps_are_no_updates(tiny, tmp_path):
    """Weights and records equal those of a run that never took these steps, also after a resume."""
    spoilt = ", ".join(algorithm("SpoilLoss", step=step, slot=5 - step) for step in (0, 3))
    slopes = ", ".join(algorithm("SpoilGradient", step=step, slot=5 - step) for step in (0, 3))
    skipping, without = [], []
    for where, bad in [*((where, spoilt) for where in ENGINES), (("zero0", "fp32"), slopes)]:
        name = "-".join(where) + ("-gradient" if bad == slopes else "")
        common = (*engine(*where), "checkpoint.interval_steps=4")
        skips = ("engine.skip_non_finite=2", f"algorithms=[{bad}]")
        skipping.append(tiny(f"skips-{name}", *common, *skips))
        without.append(tiny(f"without-{name}", *common))
    cases = [*((r, ()) for r in skipping), *((r, (0, 3)) for r in without)]
    assert run_on(2, tmp_path, *cases) == [0] * len(cases)
    for first, second in zip(skipping, without, strict=True):
        assert events(first).count("step_left_out") == 2
        final = [r.recipe.directory / "step-00000006" for r in (first, second)]
        assert_same(weights(final[0]), weights(final[1]))
        for mine, other in zip(records(first, "train"), records(second, "train"), strict=True):
            assert [mine[key] for key in ("loss", "ar_loss")] == [other["loss"], other["ar_loss"]]
            assert mine["loss"] is not None and not mine["logged"]
    resumed = skipping[1::3]
    expected = [weights(r.recipe.directory / "step-00000006") for r in resumed]
    for recipe in resumed:
        shutil.rmtree(recipe.recipe.directory / "step-00000006")
    assert run_on(2, tmp_path, *((r, ()) for r in resumed)) == [0] * len(resumed)
    for recipe, before in zip(resumed, expected, strict=True):
        assert_same(weights(recipe.recipe.directory / "step-00000006"), before)


def test_steps_left_out_are_counted_across_a_resume(tiny, tmp_path):
    spoilt = ", ".join(algorithm("SpoilLoss", step=step, slot=0) for step in (1, 3))
    gradient = ", ".join(algorithm("SpoilGradient", step=step, slot=0) for step in (1, 3))
    recipes = [
        tiny(
            f"counted-{number}",
            f"algorithms=[{bad}]",
            "engine.skip_non_finite=1",
            "checkpoint.interval_steps=2",
        )
        for number, bad in enumerate((spoilt, gradient))
    ]
    cases = [(recipe, ()) for recipe in recipes]
    # The second time each begins at step 2, with its one step spent.
    assert run_on(1, tmp_path, *cases, *cases) == [3] * 4
    for recipe in recipes:
        assert events(recipe).count("step_left_out") == 1
        assert sorted(p.name for p in recipe.recipe.directory.glob("step-*")) == ["step-00000002"]
    edited = [
        load_recipe_with(recipe, "engine.skip_non_finite=2", tmp_path / f"{number}.yaml")
        for number, recipe in enumerate(recipes)
    ]
    assert run_on(1, tmp_path, *((recipe, ()) for recipe in edited)) == [0, 0]


def vote() -> list[tuple[bool, bool]]:
    """Vote with rank 1 alone asking for a stop, then rank 0 alone having a bad slot."""
    init_distributed(timeout_s=600)
    rank, ballot = dist.get_rank(), StepVote(timeout_s=600)
    verdicts = []
    if rank == 1:
        ballot.signals.count = 1
    verdicts.append(ballot.take(non_finite=False))
    ballot.signals.count = 0
    verdicts.append(ballot.take(non_finite=rank == 0))
    verdicts.append(ballot.take(non_finite=False))
    del ballot
    leave_distributed()
    return [(verdict.stop, verdict.non_finite) for verdict in verdicts]


def test_one_rank_is_enough_for_a_vote(tmp_path):
    for verdicts in on_ranks(vote, ranks=2, tmp_path=tmp_path):
        assert verdicts == [(True, False), (False, True), (False, False)]


@pytest.mark.gpu
def test_losses_reach_the_host_ahead_of_the_backward_pass():
    """The host learns of a NaN while the device is still busy with what was queued behind it."""
    device = torch.device("cuda")
    watch = LossWatch(2, device)
    slot = Slot(0, "ar", "ar", 0, 1.0)
    empty = torch.zeros(0)
    batch = Batch(empty, empty, empty, empty, "ar", ((7,),))
    busy = torch.randn(8192, 8192, device=device)
    for last in (torch.nan, 2.0):
        torch.cuda.synchronize()
        watch.start_step()
        watch.add(slot, batch, torch.tensor(1.0, device=device))
        watch.add(slot, batch, torch.tensor(last, device=device))
        for _ in range(200):
            torch.mm(busy, busy)
        behind = torch.cuda.Event()
        behind.record()
        assert watch.non_finite() == math.isnan(last)
        assert not behind.query()
        assert watch.slots()[0].loss == 1.0
