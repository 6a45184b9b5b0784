"""The real model trained by DeepSpeed and by plain PyTorch, cell by cell of a matrix.

:func:`train_cells`, on real ranks, is compared with :func:`reference`, which is one process, full
fp32 parameters and the paper's formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from helpers.models import add_noise
from helpers.paper_optimizer import PaperOptimizer
from torch import Tensor, nn

from dualtrain.engine.config import bfloat16_mode, merge_settings
from dualtrain.engine.parameters import muon_parameter_names
from dualtrain.method.mixing import Mixture, Slot
from dualtrain.method.objectives import Example
from dualtrain.network.attention import plan_attention
from dualtrain.network.config import DualConfig
from dualtrain.network.output import DualOutput
from dualtrain.network.transformer import DualLM
from dualtrain.recipe.schema import ObjectiveSection, OptimSection

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from dualtrain.algorithms.events import Logger, State

MARKS = (1, 5, 20)
"""Steps after which parameters are compared."""

SEED = 11
LENGTH, MICRO_BATCH = 16, 2
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One engine's settings.

    Attributes:
        stage: ZeRO stage.
        accumulation: Slots of a rank in a step.
        newton_schulz: ``optim.newton_schulz``.
        precision: ``engine.precision``.
        offload: What lives in host memory.
        optimizer: ``optim.name``.
        steps: Updates.
    """

    stage: int
    accumulation: int = 1
    newton_schulz: Literal["standard", "gram"] = "gram"
    precision: Literal["fp32", "bf16"] = "fp32"
    offload: Literal["nothing", "optimizer", "parameters"] = "nothing"
    optimizer: Literal["muon", "adamw"] = "muon"
    steps: int = MARKS[-1]

    @property
    def bfloat16(self) -> str:
        """How bf16 is used: ``off``, ``autocast`` or ``weights``."""
        return bfloat16_mode(self.precision, self.stage)

    def optim(self) -> OptimSection:
        return OptimSection(name=self.optimizer, newton_schulz=self.newton_schulz)

    def ds_config(self, world_size: int) -> dict[str, object]:
        config = merge_settings(
            f"zero{self.stage}",
            precision=self.precision,
            micro_batch=MICRO_BATCH,
            accumulation=self.accumulation,
            world_size=world_size,
        )
        zero = cast("dict[str, object]", config["zero_optimization"])
        # Nothing is small enough to stay whole.
        zero["stage3_param_persistence_threshold"] = 0
        if self.offload != "nothing":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if self.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
        return config


@dataclass
class Trained:
    """What became of a cell.

    Attributes:
        parameters: fp32 masters by step: at 0 and at those of ``MARKS`` that were reached.
        gradients: Accumulated gradient of the first step, of the parameters that AdamW has.
        groups: Of the engine's optimizer: (members' elements, lr, weight decay, uses Muon).
    """

    parameters: dict[int, Parameters] = field(default_factory=dict)
    gradients: Parameters = field(default_factory=dict)
    groups: list[tuple[int, float, float, bool]] = field(default_factory=list)


def make_model() -> DualLM:
    """Both heads' parts; 13 square matrices, 6 tall, 3 wide: none fit 2 or 4 partitions evenly."""
    config = DualConfig(
        vocab_size=512,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        head="paper",
    )
    # So that no matrix is zero, and no gradient therefore.
    return add_noise(DualLM(config, seed=SEED), 0.1, SEED)


def learning_rate(step: int) -> float:
    return 7e-3 * (1 - step / 40)


class Slots:
    """Real slots of both objectives: their batches from shards, as the training makes them."""

    def __init__(self, dataset: Path, slots: int) -> None:
        from dualtrain.algorithms.dual_objective import DualObjective
        from dualtrain.data.batches import TrainingData
        from dualtrain.data.dataset import TokenDataset

        source = TokenDataset.open(dataset, "train")
        self.mixture = Mixture(
            alpha=Fraction(3, 8),
            steps=MARKS[-1],
            slots=slots,
            micro_batch=MICRO_BATCH,
            rotation=True,
        )
        self._data = TrainingData(
            source,
            mixture=self.mixture,
            sequence_length=LENGTH,
            seed=SEED,
            unique_tokens=None,
            append_eos=True,
        )
        self._vocabulary = source.info.vocabulary
        self._hook = DualObjective(seed=SEED, objective=ObjectiveSection())

    def example(self, slot: Slot) -> Example:
        from dualtrain.algorithms.events import Event

        batch = self._data.batch(slot.stream, slot.first_sequence)
        state = SimpleNamespace(slot=slot, batch=batch, vocabulary=self._vocabulary, example=None)
        self._hook.apply(Event.BATCH_START, cast("State", state), cast("Logger", None))
        assert state.example is not None
        return state.example


def slot_loss(model: Callable[..., DualOutput], example: Example, dtype: torch.dtype) -> Tensor:
    """The loss of a slot under the attention of its objective."""
    plan = plan_attention(
        example.attention, example.document_ids, backend="sdpa", device="cpu", dtype=dtype
    )
    output = model(
        example.input_ids,
        attention=plan,
        targets=example.targets,
        weights=example.weights,
        z_loss=1e-4,
    )
    assert output.loss is not None
    return output.loss


def train_cells(cells: list[Cell], dataset: Path) -> list[Trained]:
    """Train one engine for each cell; every rank returns the same."""
    import torch.distributed as dist

    from dualtrain.engine.process import (
        init_distributed,
        leave_distributed,
        prepare_process,
    )

    prepare_process(compile_model=False)
    init_distributed(timeout_s=600)
    results = [_train(cell, dataset, dist.get_rank(), dist.get_world_size()) for cell in cells]
    leave_distributed()
    return results


def _train(cell: Cell, dataset: Path, rank: int, world: int) -> Trained:
    from dualtrain.engine.build import (
        build_engine,
        build_optimizer,
        set_learning_rate,
    )
    from dualtrain.engine.groups import group_parameters

    model, trained = make_model(), Trained()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    muon = muon_parameter_names(model) if cell.optimizer == "muon" else []
    groups = group_parameters(shapes, muon)
    optimizer = build_optimizer(model, groups, cell.optim())
    engine = build_engine(model, optimizer, cell.ds_config(world))
    trained.parameters[0] = masters(engine)
    trained.groups = list(engine_groups(engine))
    dtype = torch.float32 if cell.precision == "fp32" else torch.bfloat16
    source = Slots(dataset, world * cell.accumulation)
    for step in range(cell.steps):
        set_learning_rate(engine, learning_rate(step))
        for slot in source.mixture.for_rank(step, rank, world):
            engine.backward(slot_loss(engine, source.example(slot), dtype) * slot.loss_scale)
            engine.step()
        if step == 0:
            observed = shapes.keys() - set(muon)
            trained.gradients = first_gradients(engine, observed, cell.optim().betas[0])
        if step + 1 in MARKS:
            trained.parameters[step + 1] = masters(engine)
    engine.destroy()
    return trained


def parameters_of(engine: DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return cast("nn.Module", engine.module).named_parameters()


def masters(engine: DeepSpeedEngine) -> Parameters:
    """Full fp32 parameters; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = {}
    for name, parameter in parameters_of(engine):
        master = safe_get_full_fp32_param(parameter)
        full[name] = (parameter if master is None else master).detach().float().clone()
    return full


def first_gradients(engine: DeepSpeedEngine, names: set[str], beta: float) -> Parameters:
    """The raw gradient of the first step: AdamW's first moment is (1 - beta) times it then."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in parameters_of(engine):
        if name not in names:
            continue
        _find_states(engine, parameter)
        moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        if moment is None:  # stage 0: torch's own state
            moment = cast("torch.optim.Optimizer", engine.optimizer).state[parameter]["exp_avg"]
        found[name] = moment.detach().float().view(_shape(parameter)) / (1 - beta)
    return found


def _find_states(engine: DeepSpeedEngine, parameter: nn.Parameter) -> None:
    """Let DeepSpeed 0.19.8 find a parameter's states at stages 1 and 2.

    It looks for them once, after the first group's update, when the other groups have none.
    """
    fragment = getattr(parameter, "_hp_mapping", None)
    if fragment is None:
        return
    zero: Any = engine.optimizer
    flat_partitions = getattr(zero, "single_partition_of_fp32_groups", None)
    if flat_partitions is None:
        flat_partitions = zero.fp32_groups_flat_partition
    flat = flat_partitions[fragment.param_group_index]
    fragment.set_optim_state_fragment(flat, zero.optimizer.state[flat])


def engine_groups(engine: DeepSpeedEngine) -> Iterator[tuple[int, float, float, bool]]:
    """The groups that the engine's optimizer goes by; ZeRO has put flat partitions into them."""
    for group in cast("torch.optim.Optimizer", engine.optimizer).param_groups:
        elements = sum(parameter.numel() for parameter in group["params"])
        yield elements, group["lr"], group["weight_decay"], group.get("use_muon", False)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def reference(cell: Cell, ranks: int, dataset: Path) -> Trained:
    """What the cell must become: every slot in one process, the paper's update in fp32.

    The gradient is computed as the cell's precision says (in fp32, under autocast, or by a copy of
    the matrices in bf16), summed and averaged in fp32.
    """
    model, trained = make_model(), Trained()
    if cell.bfloat16 == "weights":
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # gains stay fp32
                parameter.data = parameter.data.to(torch.bfloat16)
    parameters = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    muon = muon_parameter_names(model) if cell.optimizer == "muon" else []
    standard = cell.newton_schulz == "standard"
    optimizer = PaperOptimizer(
        parameters, muon, newton_schulz_dtype=torch.bfloat16 if standard else torch.float32
    )
    trained.parameters[0] = {name: p.clone() for name, p in parameters.items()}
    source = Slots(dataset, ranks * cell.accumulation)
    for step in range(cell.steps):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name])
        gradients = mean_gradients(model, source, step, cell)
        optimizer.step(gradients, learning_rate(step))
        if step == 0:
            trained.gradients = gradients
        if step + 1 in MARKS:
            trained.parameters[step + 1] = {name: p.clone() for name, p in parameters.items()}
    return trained


def mean_gradients(model: DualLM, source: Slots, step: int, cell: Cell) -> Parameters:
    """The mean over all slots of a step of the slots' gradients."""
    slots = source.mixture.slots(step)
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for slot in slots:
        model.zero_grad()
        dtype = torch.float32 if cell.precision == "fp32" else torch.bfloat16
        casting: AbstractContextManager = nullcontext()
        if cell.bfloat16 == "autocast":
            casting = torch.autocast("cpu", torch.bfloat16)
        with casting:
            loss = slot_loss(model, source.example(slot), dtype)
        (loss * slot.loss_scale).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad.float() / len(slots)
    return total


def deviation(actual: Trained, expected: Trained, step: int) -> tuple[float, str]:
    """The largest difference of a parameter relative to how far it moved, and its name."""
    worst = (0.0, "")
    for name, value in expected.parameters[step].items():
        moved = (value - expected.parameters[0][name]).norm()
        difference = (actual.parameters[step][name] - value).norm() / moved
        worst = max(worst, (float(difference), name))
    return worst


def tolerance(cell: Cell, step: int) -> float:
    """How much of its movement a parameter may deviate, with the reason.

    - fp32: other orders of float32 additions (1e-7 of a gradient), of which Newton-Schulz makes
      more where a gradient has small singular values: by up to 3.4445^5 = 485. Measured: 2e-5.
    - ``standard`` rounds to bf16, 8 bits: where a number stands at the border of two roundings, the
      orders above decide, and the iteration enlarges that likewise. Measured: 7e-2.
    - bf16: as fp32, until a weight at such a border is rounded otherwise, which changes every later
      gradient by up to 0.4 %. Measured: 2e-5 up to such a moment, 6e-2 after it.
    """
    if cell.newton_schulz == "standard" and cell.optimizer == "muon":
        return 0.2
    if cell.precision == "bf16":
        return 5e-4 if step == 1 else 0.2
    return 1e-4
