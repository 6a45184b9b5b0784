"""From a resolved recipe to everything the loop needs, checked before the first step.

``train`` calls :func:`assemble`. The order matters: what can be refused cheaply is refused before
processes meet, and processes meet before memory is spent.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from dualtrain import checkpoint
from dualtrain.algorithms import build_algorithms
from dualtrain.data.batches import TrainingData, ValidationData
from dualtrain.data.corpus import read_corpus
from dualtrain.data.dataset import DatasetInfo, TokenDataset
from dualtrain.data.prefetch import Prefetcher
from dualtrain.data.remote import fetch_facts
from dualtrain.data.shard_cache import ShardCache
from dualtrain.engine import (
    build_engine,
    build_optimizer,
    check_precision,
    choose_device,
    group_parameters,
    init_distributed,
    prepare_process,
)
from dualtrain.events import Dispatcher, Event, State, Vocabulary
from dualtrain.launch import World, current_world
from dualtrain.mixing import Mixture, Objective, Slot
from dualtrain.model import (
    DualConfig,
    DualLM,
    flops_per_token,
    muon_parameter_names,
    resolve_backend,
)
from dualtrain.progress import EvalRecord, Meter, Progress, ViewChoice, peak_flops
from dualtrain.recipe.derive import Derived, build_mixture, derive
from dualtrain.recipe.estimates import model_sizes
from dualtrain.recipe.load import dump_recipe
from dualtrain.recipe.merge import deepspeed_config, zero_stage
from dualtrain.recipe.schema import Recipe
from dualtrain.run_directory import lock_run_directory, prepare_run_directory
from dualtrain.signals import StopRequest

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


@dataclass
class Run:
    """The parts of a run that the loop works with; one on every rank.

    Attributes:
        recipe: The resolved recipe.
        text: The same as YAML; goes into every checkpoint.
        fingerprint: Of the dataset; a resumed run must have the same.
        zero_stage: DeepSpeed's, 0 to 3.
        derived: Steps, tokens and slots that follow from the recipe.
        world: This rank among all.
        run_dir: Checkpoints, metrics, logs.
        dataset: The training split.
        validation: The held-out sequences.
        state: What algorithms see, the engine among it.
        dispatcher: The algorithms.
        backend: Attention backend.
        compute_dtype: What attention is computed in.
        batches: Slots and sequences of this rank, made ahead.
        slots_per_rank: Micro-batches of this rank in a step.
        meter: Losses of the interval.
        progress: Records and view; silent on ranks other than 0.
        stop: Signals, and the ranks' agreement on them.
        first_step: Updates done before this process started.
        elapsed_before_s: Wall time the run took before this process started.
        last_eval: The newest evaluation.
        last_saved: The newest checkpoint.
        lock: Rank 0's claim to the run directory.
    """

    recipe: Recipe
    text: str
    fingerprint: str
    zero_stage: int
    derived: Derived
    world: World
    run_dir: Path
    dataset: TokenDataset
    validation: ValidationData
    state: State
    dispatcher: Dispatcher
    backend: str
    compute_dtype: torch.dtype
    batches: Prefetcher
    slots_per_rank: int
    meter: Meter
    progress: Progress
    stop: StopRequest
    first_step: int
    elapsed_before_s: float
    last_eval: EvalRecord | None
    last_saved: Path | None
    lock: TextIO | None
    _began: float = field(default_factory=time.monotonic)
    _waited_s: float = 0.0

    @property
    def engine(self) -> DeepSpeedEngine:
        """DeepSpeed's engine around the model."""
        assert self.state.engine is not None
        return self.state.engine

    def dispatch(self, event: Event) -> None:
        """Announce an event to the algorithms."""
        self.dispatcher.dispatch(event, self.state)

    def elapsed_s(self) -> float:
        """Wall time of the run so far, over all the processes that worked on it."""
        return self.elapsed_before_s + time.monotonic() - self._began

    def data_wait_s(self) -> float:
        """Seconds this rank waited for data since the last call."""
        before, self._waited_s = self._waited_s, self.batches.wait_s
        return self._waited_s - before

    def close(self) -> None:
        """Give back terminal, threads and files."""
        # First, so that a batch in the making does not wait for its shards to be tried again.
        self.dataset.close()
        self.batches.close()
        self.progress.close()
        if self.lock is not None:
            self.lock.close()


def assemble(recipe: Recipe, *, view: ViewChoice) -> Run:
    """Build a run on this rank and restore its newest checkpoint.

    Args:
        recipe: The resolved recipe, the same on every rank.
        view: What the terminal shows.

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
    lock = None
    if world.rank == 0:
        prepare_run_directory(recipe)
        lock = lock_run_directory(recipe)
        build_missing_dataset(recipe)
    elif world.local_rank == 0 and recipe.data.remote is not None:
        build_missing_dataset(recipe)  # every machine has a copy of its own
    if not torch.distributed.is_initialized():
        init_distributed(timeout_s=recipe.engine.timeout_s)

    shards = _open_cache(recipe, world)
    dataset = TokenDataset.open(recipe.data.path, "train", source=shards)
    derived = derive(recipe, corpus=read_corpus(recipe), world_size=world.world_size)
    mixture = build_mixture(recipe, derived.steps)
    slots_per_rank = mixture.slots_per_step // world.world_size
    source = _Source.of(recipe, world=world, dataset=dataset, slots_per_rank=slots_per_rank)
    if world.rank == 0:
        (source.run_dir / checkpoint.RECIPE).write_text(source.text)
    model = build_model(recipe, dataset.info)
    if source.resume.kind == "weights":
        checkpoint.load_weights(source.path, model)
    state = State(
        recipe=recipe,
        steps=derived.steps,
        rank=world.rank,
        world_size=world.world_size,
        device=device,
        vocabulary=Vocabulary(
            dataset.info.vocab_size, dataset.info.mask_id, dataset.info.special_ids
        ),
        mixture=mixture,
        model=model,
    )
    meter = Meter(
        device,
        ar_weight=recipe.objective.ar_weight,
        flops_per_token=_flops_per_token(recipe, model.config.vocab_size),
        peak_flops=peak_flops(torch.cuda.get_device_name(device))
        if device.type == "cuda"
        else None,
    )
    dispatcher = Dispatcher(algorithms, logger=meter)
    dispatcher.dispatch(Event.INIT, state)
    _attach_engine(state, source.config)
    if source.resume.kind == "full":
        _restore(state, dispatcher, meter, source)
    data = TrainingData(
        dataset,
        sequence_length=recipe.sequence_length,
        micro_batch=recipe.micro_batch,
        seed=recipe.seed,
        unique_tokens=derived.unique_tokens,
        alpha=mixture.rotation_alpha,
        append_eos=recipe.data.append_eos,
        plan_dir=Path(tempfile.gettempdir()) / f"dualtrain-{os.getuid()}" / "plans",
    )
    dataset.prepare_all(data.documents)
    return Run(
        recipe=recipe,
        text=source.text,
        fingerprint=source.fingerprint,
        zero_stage=source.zero_stage,
        derived=derived,
        world=world,
        run_dir=source.run_dir,
        dataset=dataset,
        validation=ValidationData(
            TokenDataset.open(recipe.data.path, "val", source=shards),
            sequence_length=recipe.sequence_length,
            append_eos=recipe.data.append_eos,
            sequences=recipe.eval.sequences,
        ),
        state=state,
        dispatcher=dispatcher,
        backend=backend,
        compute_dtype=compute_dtype,
        batches=Prefetcher(
            data,
            _slots(mixture, state.step, world),
            depth=recipe.data.prefetch_steps * slots_per_rank,
            pin_memory=device.type == "cuda",
        ),
        slots_per_rank=slots_per_rank,
        meter=meter,
        progress=Progress.open(
            source.run_dir, rank=world.rank, view=view, tensorboard=recipe.progress.tensorboard
        ),
        stop=StopRequest(),
        first_step=state.step,
        elapsed_before_s=source.facts.get("elapsed_s", 0.0),
        last_eval=source.facts.get("last_eval"),
        lock=lock,
        last_saved=source.resume.path if source.resume.kind == "full" else None,
    )


def build_missing_dataset(recipe: Recipe) -> None:
    """Make ``data.path`` as ``data.build`` or ``data.remote`` says, unless it is there already.

    Of a remote dataset only the facts are fetched; shards follow when they are read.

    Raises:
        UserError: when what is there was made with other arguments, or the sources are unusable.
    """
    if recipe.data.remote is not None:
        fetch_facts(recipe.data.remote, recipe.data.path)
    if recipe.data.build is not None:
        from data_tools.app import build_with_view

        build_with_view(recipe.data.build, Path(recipe.data.path))


def _open_cache(recipe: Recipe, world: World) -> ShardCache | None:
    """Where this rank's shards come from, unless the dataset is simply there."""
    section = recipe.data
    if section.remote is None:
        return None
    limit_gib = section.cache_limit_gib
    return ShardCache(
        section.remote,
        section.path,
        limit_bytes=None if limit_gib is None else int(limit_gib * 2**30),
        reader=world.local_rank,
        readers=world.local_world_size,
    )


def build_model(recipe: Recipe, info: DatasetInfo) -> DualLM:
    """The recipe's model for a dataset's vocabulary, initialised from the recipe's seed."""
    section = recipe.model
    config = DualConfig(
        vocab_size=model_sizes(section, info.vocab_size).vocab_size,
        width=section.width,
        layers=section.layers,
        heads=section.heads,
        mlp_width=section.mlp_width,
        rope_theta=section.rope_theta,
        norm_eps=section.norm_eps,
        head=section.head,
        sequence_length=recipe.sequence_length,
        bos_token_id=info.bos_id,
        eos_token_id=info.eos_id,
        pad_token_id=info.pad_id,
        mask_token_id=info.mask_id,
    )
    model = DualLM(config, seed=recipe.seed)
    model.activation_checkpointing = section.activation_checkpointing
    if section.compile:
        model.compile_blocks()
    return model


@dataclass(frozen=True)
class _Source:
    """Where a run starts: its directory, its checkpoint if any, its DeepSpeed configuration."""

    run_dir: Path
    text: str
    fingerprint: str
    config: dict[str, object]
    resume: checkpoint.Resume
    world: World
    facts: dict[str, Any]

    @classmethod
    def of(
        cls, recipe: Recipe, *, world: World, dataset: TokenDataset, slots_per_rank: int
    ) -> _Source:
        run_dir, text = recipe.directory, dump_recipe(recipe)
        config = deepspeed_config(
            recipe, world_size=world.world_size, slots_per_step_per_rank=slots_per_rank
        )
        resume = checkpoint.choose_resume(recipe.checkpoint.resume, run_dir)
        facts: dict[str, Any] = {}
        if resume.kind == "full":
            assert resume.path is not None
            checkpoint.check_compatible(
                resume.path,
                recipe_text=text,
                world_size=world.world_size,
                zero_stage=zero_stage(config),
                fingerprint=dataset.info.fingerprint,
            )
            facts = checkpoint.read_state(resume.path)
        return cls(run_dir, text, dataset.info.fingerprint, config, resume, world, facts)

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.config)

    @property
    def path(self) -> Path:
        assert self.resume.path is not None
        return self.resume.path


def _attach_engine(state: State, config: dict[str, object]) -> None:
    """Divide the parameters, as algorithms left them at INIT, and give them to DeepSpeed."""
    recipe, model = state.recipe, state.model
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    muon = muon_parameter_names(model) if recipe.optim.name == "muon" else ()
    groups = group_parameters(shapes, muon)
    # transformers annotates its own `to` so that type checkers reject a device.
    torch.nn.Module.to(model, state.device)
    state.engine = build_engine(model, build_optimizer(model, groups, recipe.optim), config)
    state.optimizer_groups = groups


def _restore(state: State, dispatcher: Dispatcher, meter: Meter, source: _Source) -> None:
    assert state.engine is not None
    rank_state = checkpoint.load(source.path, state.engine, source.world)
    dispatcher.load_state_dict(rank_state["algorithms"])
    meter.load_state_dict(rank_state["meter"])
    state.step = source.facts["step"]


def _slots(mixture: Mixture, step: int, world: World) -> Iterator[Slot]:
    """This rank's slots from a step to the end of the run, in the order of the loop."""
    for number in range(step, mixture.steps):
        yield from mixture.for_rank(number, world.rank, world.world_size)


def _flops_per_token(recipe: Recipe, vocab_size: int) -> dict[Objective, float]:
    sizes, length = model_sizes(recipe.model, vocab_size), recipe.sequence_length
    return {
        "ar": flops_per_token(sizes, length, "causal"),
        "diffusion": flops_per_token(sizes, length, "full"),
    }
