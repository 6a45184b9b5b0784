"""From a resolved recipe to everything the loop needs, checked before the first step.

``train`` calls :func:`assemble`. The order matters: what can be refused cheaply is refused before
processes meet, and processes meet before memory is spent.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dualtrain.algorithms.events import Dispatcher, Event, State
from dualtrain.algorithms.registry import build_algorithms
from dualtrain.checkpoint import store as checkpoint
from dualtrain.common.file_kinds import parse_tokenizer
from dualtrain.common.files import write_text
from dualtrain.data.batches import TrainingData, ValidationData
from dualtrain.data.corpus import read_corpus
from dualtrain.data.dataset import TokenDataset
from dualtrain.data.prefetch import Prefetcher
from dualtrain.data.shard_cache import ShardCache
from dualtrain.derived.derive import Derived, build_mixture, derive
from dualtrain.derived.memory import check_memory
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
)
from dualtrain.method.mixing import Mixture, Slot
from dualtrain.model.build import build_model
from dualtrain.model.handle import ModelHandle
from dualtrain.network.attention import resolve_backend
from dualtrain.progress.progress import Meter, Progress, ViewChoice, peak_flops
from dualtrain.recipe.schema import Recipe
from dualtrain.training.dataset import build_missing_dataset
from dualtrain.training.evaluation import TaskItems, TaskScoring, read_tasks
from dualtrain.training.non_finite import LossWatch
from dualtrain.training.origin import Origin
from dualtrain.training.prepare import lock_run_directory, prepare_run_directory
from dualtrain.training.run import Run


def assemble(recipe: Recipe, *, view: ViewChoice) -> Run:
    """Build a run on this rank and restore its newest checkpoint.

    Args:
        recipe: The resolved recipe, the same on every rank.

    Raises:
        UserError: for everything in the recipe, the dataset or the machine that does not fit.
    """
    world = current_world()
    assert world is not None
    prepare_process(compile_model=recipe.model.compile)
    device = choose_device(world)
    check_precision(recipe.engine.precision, device)
    compute_dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    backend = resolve_backend(recipe.model.attention, device, compute_dtype)
    algorithms = build_algorithms(recipe)
    tasks = read_tasks(recipe.eval)
    lock = None
    if world.rank == 0:
        prepare_run_directory(recipe)
        lock = lock_run_directory(recipe)
        build_missing_dataset(recipe)
    elif world.local_rank == 0 and recipe.data.remote is not None:
        build_missing_dataset(recipe)  # every machine has a copy of its own
    if not torch.distributed.is_initialized():
        init_distributed(timeout_s=recipe.engine.timeout_s)

    shards = open_shards(recipe, world)
    dataset = TokenDataset.open(recipe.data.path, "train", source=shards)
    corpus = read_corpus(recipe)
    assert corpus is not None  # the dataset is open
    derived = derive(recipe, corpus=corpus, world_size=world.world_size)
    assert derived.cost is not None  # the vocabulary is known
    check_memory(derived, ranks=world.local_world_size)
    mixture = build_mixture(recipe, derived.steps)
    slots_per_rank = mixture.slots_per_step // world.world_size
    origin = Origin.of(
        recipe, world=world, dataset=dataset, corpus=corpus, slots_per_rank=slots_per_rank
    )
    if world.rank == 0:
        write_text(origin.run_dir / checkpoint.RECIPE, origin.text)
    is_fresh = origin.resume.kind == "fresh"
    model = build_model(recipe, dataset.info, origin.config, pretrained=is_fresh)
    if origin.resume.kind == "weights":
        checkpoint.load_weights(origin.path, model)
    state = State(
        recipe=recipe,
        steps=derived.steps,
        rank=world.rank,
        world_size=world.world_size,
        device=device,
        vocabulary=dataset.info.vocabulary,
        mixture=mixture,
        model=model,
    )
    meter = Meter(
        device,
        ar_weight=recipe.objective.ar_weight,
        flops_per_token=derived.cost.flops_per_token,
        peak_flops=peak_flops(torch.cuda.get_device_name(device))
        if device.type == "cuda"
        else None,
    )
    dispatcher = Dispatcher(algorithms, logger=meter)
    is_changed = _announce_model(dispatcher, state)
    gradients = _attach_engine(state, origin.config)
    if origin.resume.kind == "weights" and not is_changed:
        # DeepSpeed has made bf16 weights of them, and its masters of those.
        assert state.engine is not None
        load_masters(state.engine, origin.path)
    if origin.resume.continues:
        _restore(state, dispatcher, meter, origin, world)
    assert state.engine is not None
    handle = ModelHandle(
        model=state.engine,
        vocabulary=state.vocabulary,
        context=recipe.sequence_length,
        target=recipe.objective.target,
        device=device,
        dtype=compute_dtype,
        backend=backend,
        rank=world.rank,
        world_size=world.world_size,
    )
    data = training_data(recipe, dataset, derived, mixture)
    dataset.prepare_all(data.documents)
    progress = Progress.open(
        origin.run_dir, rank=world.rank, view=view, tensorboard=recipe.progress.tensorboard
    )
    return Run(
        recipe=recipe,
        text=origin.text,
        fingerprint=origin.fingerprint,
        zero_stage=origin.zero_stage,
        derived=derived,
        world=world,
        run_dir=origin.run_dir,
        dataset=dataset,
        validation=ValidationData(
            TokenDataset.open(recipe.data.path, "val", source=shards),
            sequence_length=recipe.sequence_length,
            append_eos=recipe.data.append_eos,
            sequences=recipe.eval.sequences,
        ),
        tasks=_task_scoring(tasks, recipe, handle, dataset, progress.message),
        state=state,
        dispatcher=dispatcher,
        handle=handle,
        batches=Prefetcher(
            data,
            _slots(mixture, state.step, world),
            depth=recipe.data.prefetch_steps * slots_per_rank,
            pin_memory=device.type == "cuda",
        ),
        slots_per_rank=slots_per_rank,
        gradients=gradients,
        meter=meter,
        progress=progress,
        losses=LossWatch(slots_per_rank, device, skipped=origin.facts.get("skipped_steps", 0)),
        vote=StepVote(timeout_s=recipe.engine.timeout_s),
        first_step=state.step,
        elapsed_before_s=origin.facts.get("elapsed_s", 0.0),
        last_eval=origin.facts.get("last_eval"),
        last_scores=origin.facts.get("last_scores", []),
        lock=lock,
        last_saved=origin.resume.path if origin.resume.kind == "full" else None,
        notes=origin.resume.notes,
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


def _restore(
    state: State, dispatcher: Dispatcher, meter: Meter, origin: Origin, world: World
) -> None:
    assert state.engine is not None
    checkpoint.load(origin.path, state.engine, world, origin.rank_states)
    checkpoint.set_random_state(origin.mine["random"])
    dispatcher.load_state_dict(origin.mine["algorithms"])
    meter.load_state_dict(origin.mine["meter"])
    state.step = origin.facts["step"]


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


def _slots(mixture: Mixture, step: int, world: World) -> Iterator[Slot]:
    """This rank's slots from a step to the end of the run, in the order of the loop."""
    for number in range(step, mixture.steps):
        yield from mixture.for_rank(number, world.rank, world.world_size)
