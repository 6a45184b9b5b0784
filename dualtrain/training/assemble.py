"""From a resolved recipe to everything the loop needs, checked before the first step.

``train`` calls :func:`assemble`. The order matters: what can be refused cheaply is refused before
ranks meet (:func:`check`), and ranks meet (:func:`meet`) before memory is spent (:func:`build`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import torch

from dualtrain.algorithms.events import Algorithm, Dispatcher, Event, State
from dualtrain.algorithms.registry import build_algorithms
from dualtrain.checkpoint import store as checkpoint
from dualtrain.common.file_kinds import parse_tokenizer
from dualtrain.common.files import write_text
from dualtrain.data.batches import TrainingData, ValidationData
from dualtrain.data.corpus import read_corpus
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.prefetch import Prefetcher
from dualtrain.data.shard_cache import ShardCache
from dualtrain.derived.cost import ModelCost
from dualtrain.derived.derive import Derived, build_mixture, derive
from dualtrain.derived.memory import memory_shortage
from dualtrain.engine.build import (
    build_engine,
    build_optimizer,
)
from dualtrain.engine.gradients import Gradients
from dualtrain.engine.groups import group_parameters
from dualtrain.engine.optimizer_state import load_masters
from dualtrain.engine.parameters import (
    muon_parameter_names,
    parameter_shapes,
    whole_parameters,
)
from dualtrain.engine.process import (
    check_precision,
    choose_device,
    init_distributed,
    prepare_process,
)
from dualtrain.evaluate.scoring import Scorer
from dualtrain.launch.vote import StepVote
from dualtrain.launch.world import (
    World,
    current_world,
    single_world,
)
from dualtrain.method.mixing import Mixture
from dualtrain.model.build import build_model
from dualtrain.model.handle import ModelHandle
from dualtrain.network.backends import resolve_backend
from dualtrain.progress.meter import Meter
from dualtrain.progress.peaks import peak_flops
from dualtrain.progress.progress import Progress, ViewChoice
from dualtrain.recipe.schema import Recipe
from dualtrain.training.dataset import build_missing_dataset
from dualtrain.training.evaluation import TaskItems, TaskScoring, read_tasks
from dualtrain.training.losses import LossWatch
from dualtrain.training.origin import Origin
from dualtrain.training.prepare import lock_run_directory, prepare_run_directory
from dualtrain.training.run import Run


@dataclass(frozen=True)
class Checked:
    """What a rank has found out by itself."""

    world: World
    device: torch.device
    dtype: torch.dtype
    backend: str
    algorithms: list[Algorithm]
    tasks: TaskItems


@dataclass(frozen=True)
class Met:
    """What all ranks know since they have met, before memory is spent."""

    lock: IO[bytes] | None
    train: TokenDataset
    held_out: ValidationData
    derived: Derived
    cost: ModelCost
    mixture: Mixture
    origin: Origin


def assemble(recipe: Recipe, *, view: ViewChoice) -> Run:
    """Build a run on this rank and restore its newest checkpoint."""
    rank = check(recipe)
    return build(recipe, rank, meet(recipe, rank), view)


def check(recipe: Recipe) -> Checked:
    """Refuse what this rank cannot do, before it waits for others."""
    world = current_world() or single_world()
    prepare_process(compile_model=recipe.model.compile)
    device = choose_device(world)
    check_precision(recipe.engine.precision, device)
    dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    backend = resolve_backend(recipe.model.attention, device, dtype)
    return Checked(world, device, dtype, backend, build_algorithms(recipe), read_tasks(recipe.eval))


def meet(recipe: Recipe, rank: Checked) -> Met:
    """Join the other ranks, open the data, and agree on where the run starts."""
    world, lock = rank.world, None
    if world.rank == 0:
        prepare_run_directory(recipe)
        lock = lock_run_directory(recipe)
        build_missing_dataset(recipe)
    elif world.local_rank == 0 and recipe.data.remote is not None:
        build_missing_dataset(recipe)  # every machine has a copy of its own
    if not torch.distributed.is_initialized():
        init_distributed(timeout_s=recipe.engine.timeout_s)
    shards = open_shards(recipe, world)
    train = TokenDataset.open(recipe.data.path, "train", source=shards)
    corpus = read_corpus(recipe)
    assert corpus is not None  # the dataset is open
    derived = derive(recipe, corpus=corpus, world_size=world.world_size)
    assert derived.cost is not None  # the vocabulary is known
    if shortage := memory_shortage(derived, ranks=world.local_world_size):
        raise shortage
    origin = Origin.of(recipe, world, train.info, corpus, derived)
    if world.rank == 0:
        write_text(origin.run_dir / checkpoint.RECIPE, origin.text)
    held_out = ValidationData(
        TokenDataset.open(recipe.data.path, "val", source=shards),
        sequence_length=recipe.sequence_length,
        append_eos=recipe.data.append_eos,
        document_mask=recipe.data.document_mask,
        sequences=recipe.eval.sequences,
    )
    mixture = build_mixture(recipe, derived.steps)
    return Met(lock, train, held_out, derived, derived.cost, mixture, origin)


def build(recipe: Recipe, rank: Checked, met: Met, view: ViewChoice) -> Run:
    """Build the model and its engine, and restore what the run continues."""
    world, origin = rank.world, met.origin
    state = _begin(recipe, rank, met)
    meter = _make_meter(recipe, rank.device, met.cost)
    dispatcher = Dispatcher(rank.algorithms, logger=meter)
    is_changed = _announce_model(dispatcher, state)
    gradients = _attach_engine(state, met.derived.deepspeed)
    if origin.resume.kind == "weights" and not is_changed:
        # DeepSpeed has made bf16 weights of them, and its masters of those.
        load_masters(state.engine, origin.path)
    if origin.resume.continues:
        checkpoint.load(origin.path, state.engine, world, origin.rank_states)
        checkpoint.set_random_state(origin.mine["random"])
        dispatcher.load_state_dict(origin.mine["algorithms"])
        meter.load_state_dict(origin.mine["meter"])
        state.step = origin.first_step
    handle = _make_handle(state, rank)
    progress = Progress.open(
        origin.run_dir,
        rank=world.rank,
        view=view,
        trackers=recipe.progress.trackers,
        config=recipe.model_dump(mode="json"),
    )
    slots_per_rank = met.mixture.slots_per_step // world.world_size
    return Run(
        recipe=recipe,
        world=world,
        origin=origin,
        derived=met.derived,
        parameters=met.cost.parameters,
        dataset=met.train,
        held_out=met.held_out,
        tasks=_task_scoring(rank.tasks, recipe, handle, met.train, progress.message),
        state=state,
        dispatcher=dispatcher,
        handle=handle,
        batches=_prefetch(state, met, world),
        slots_per_rank=slots_per_rank,
        gradients=gradients,
        meter=meter,
        progress=progress,
        losses=LossWatch(slots_per_rank, rank.device, skipped=origin.skipped_steps),
        vote=StepVote(timeout_s=recipe.engine.timeout_s),
        lock=met.lock,
    )


def _begin(recipe: Recipe, rank: Checked, met: Met) -> State:
    """The state at INIT: with the bare model, in its first values or a checkpoint's weights."""
    origin, info = met.origin, met.train.info
    is_fresh = origin.resume.kind == "fresh"
    model = build_model(recipe, info, met.derived.deepspeed, pretrained=is_fresh)
    if origin.resume.kind == "weights":
        checkpoint.load_weights(origin.path, model)
    return State(
        recipe=recipe,
        steps=met.derived.steps,
        rank=rank.world.rank,
        world_size=rank.world.world_size,
        device=rank.device,
        vocabulary=info.vocabulary,
        mixture=met.mixture,
        model=model,
    )


def _make_meter(recipe: Recipe, device: torch.device, cost: ModelCost) -> Meter:
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Meter(
        device,
        ar_weight=recipe.objective.ar_weight,
        flops_per_token=cost.flops_per_token,
        peak_flops=peak,
    )


def _make_handle(state: State, rank: Checked) -> ModelHandle:
    """The engine, as evaluation and sampling call it."""
    return ModelHandle(
        model=state.engine,
        vocabulary=state.vocabulary,
        context=state.recipe.sequence_length,
        target=state.recipe.objective.target,
        device=rank.device,
        dtype=rank.dtype,
        backend=rank.backend,
        rank=state.rank,
        world_size=state.world_size,
    )


def _prefetch(state: State, met: Met, world: World) -> Prefetcher:
    """This rank's slots and their sequences, from here to the end, in the order of the loop."""
    recipe, mixture = state.recipe, met.mixture
    data = training_data(recipe, met.train, met.derived, mixture)
    met.train.prepare_all(data.documents)
    steps = range(state.step, mixture.steps)
    slots = (mixture.for_rank(step, world.rank, world.world_size) for step in steps)
    return Prefetcher(
        data,
        chain.from_iterable(slots),
        depth=recipe.data.prefetch_steps * mixture.slots_per_step // world.world_size,
        pin_memory=state.device.type == "cuda",
    )


def training_data(
    recipe: Recipe, dataset: TokenDataset, derived: Derived, mixture: Mixture
) -> TrainingData:
    """The recipe's streams of sequences."""
    return TrainingData(
        dataset,
        mixture=mixture,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        unique_tokens=derived.unique_tokens,
        append_eos=recipe.data.append_eos,
        document_mask=recipe.data.document_mask,
        plan_dir=Path(tempfile.gettempdir()) / f"dualtrain-{os.getuid()}" / "plans",
    )


def open_shards(recipe: Recipe, world: World) -> ShardCache | None:
    """Where this rank's shards come from, unless the dataset is simply there."""
    section = recipe.data
    if section.remote is None:
        return None
    return ShardCache(
        section.remote,
        section.path,
        reader=world.local_rank,
        readers=world.local_world_size,
    )


def _announce_model(dispatcher: Dispatcher, state: State) -> bool:
    """Dispatch INIT; algorithms that are there for it find whole parameters at every stage.

    For them every rank holds the whole model at once, also at stage 3.

    Returns:
        Whether there is such an algorithm.
    """
    watched = any(algorithm.match(Event.INIT, state) for algorithm in dispatcher.algorithms)
    with whole_parameters(state.model.parameters() if watched else ()):
        dispatcher.dispatch(Event.INIT, state)
    return watched


def _attach_engine(state: State, config: dict[str, object]) -> Gradients:
    """Divide the parameters, as algorithms left them at INIT, and give them to DeepSpeed."""
    recipe, model = state.recipe, state.model
    muon = muon_parameter_names(model) if recipe.optim.name == "muon" else ()
    groups = group_parameters(parameter_shapes(model), muon)
    model.to(state.device)
    state.engine = build_engine(model, build_optimizer(model, groups, recipe.optim), config)
    state.optimizer_groups = groups
    return Gradients(state.engine, clip_norm=recipe.optim.clip_norm)


def _task_scoring(
    tasks: TaskItems,
    recipe: Recipe,
    model: ModelHandle,
    dataset: TokenDataset,
    on_note: Callable[[str], None],
) -> TaskScoring | None:
    """How the recipe's tasks are scored with the engine, if it has any."""
    if not tasks:
        return None
    slot_tokens = recipe.micro_batch * recipe.sequence_length
    scorer = Scorer(
        model,
        # On a GPU as much as training has room for.
        tokens_per_batch=None if model.device.type == "cpu" else slot_tokens,
        on_note=on_note,
    )
    return TaskScoring(
        tasks,
        recipe.eval.modes,
        scorer=scorer,
        tokenizer=parse_tokenizer(dataset.tokenizer_path),
    )
