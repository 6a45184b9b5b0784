"""Repeat one slot of a step that was not finite, from the report that the run left.

``dualtrain replay`` calls :func:`replay`. It goes the way of the training up to the loss, on one
rank and without DeepSpeed: the same weights, sequences, corruption, attention and compute type. It
reads the report and the dataset and writes nothing, so it may run beside the run that it is about.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualtrain import checkpoint
from dualtrain.algorithms import build_algorithms
from dualtrain.assemble import open_shards, training_data
from dualtrain.build_model import build_model
from dualtrain.data.batches import TrainingData
from dualtrain.data.corpus import read_corpus
from dualtrain.data.dataset import TokenDataset
from dualtrain.engine import check_precision, choose_device, prepare_process
from dualtrain.errors import UserError
from dualtrain.events import Dispatcher, Event, State, Vocabulary
from dualtrain.file_kinds import parse_tokenizer
from dualtrain.launch import ALONE
from dualtrain.model import DualOutput, resolve_backend
from dualtrain.model.norms import cast_weights
from dualtrain.non_finite import DIRECTORY, FORMAT, REPORT
from dualtrain.recipe.derive import build_mixture, derive
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.merge import bfloat16_mode
from dualtrain.train import forward, slot_loss, there

PREVIEW_TOKENS = 24
"""Tokens shown of the beginning of a document."""


@dataclass(frozen=True)
class ReplayedSlot:
    """What a slot came to when it was run again.

    Attributes:
        step: Updates before the step.
        slot: Position in the step.
        rank: The rank that ran it.
        objective: What it was trained on.
        recorded: Its loss in the run.
        loss: Its loss now.
        first_bad_module: The first module to finish with an output that is not finite, if any.
        bad_gradients: Parameters whose gradient from this slot is not finite; only looked for where
            the loss is finite.
        documents: Number and first words of each document, in order.
        largest_weight: Name and magnitude of the weight farthest from zero.
        bad_weights: Parameters that are not finite themselves.
        differences: What differs between then and now, such as the device.
    """

    step: int
    slot: int
    rank: int
    objective: str
    recorded: float
    loss: float
    first_bad_module: str | None
    bad_gradients: tuple[str, ...]
    documents: tuple[tuple[int, str], ...]
    largest_weight: tuple[str, float]
    bad_weights: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether the loss is the run's, bit for bit."""
        return self.loss == self.recorded or (math.isnan(self.loss) and math.isnan(self.recorded))

    @property
    def is_finite(self) -> bool:
        """Whether neither the loss nor a gradient is bad."""
        return math.isfinite(self.loss) and not self.bad_gradients

    def lines(self) -> list[str]:
        """What to tell the user."""
        return [
            f"step {self.step}, slot {self.slot} ({self.objective}, rank {self.rank})",
            f"  loss now       {self.loss!r}",
            f"  loss recorded  {self.recorded!r}: {self._comparison()}",
            *(f"                 {difference}" for difference in self.differences),
            f"  not finite     {self._place()}",
            f"  weights        {self._weights()}",
            "  documents",
            *(f"    {number:>10}  {text}" for number, text in self.documents),
        ]

    def _comparison(self) -> str:
        if self.is_same:
            return "the same, bit for bit"
        if self.differences:
            return f"the difference is {abs(self.loss - self.recorded):.3g}"
        return (
            f"the difference is {abs(self.loss - self.recorded):.3g}, on a machine like the run's: "
            "suspect the hardware"
        )

    def _place(self) -> str:
        if self.first_bad_module is not None:
            return f"first in the output of {self.first_bad_module}"
        if not math.isfinite(self.loss):
            return "the loss, not the model's outputs: an algorithm changed it"
        if self.bad_gradients:
            return f"the gradients of {_some(self.bad_gradients)}"
        return "nothing: loss, outputs and gradients are finite"

    def _weights(self) -> str:
        if self.bad_weights:
            return f"not finite: {_some(self.bad_weights)}"
        name, magnitude = self.largest_weight
        return f"finite, at most {magnitude:.4g} from zero (in {name})"


def replay(path: Path | str, *, slot: int | None = None) -> ReplayedSlot:
    """Run one slot of a reported step again.

    Args:
        path: The report's directory, its ``report.json``, or a run directory, for its newest one.
        slot: Position in the step; by default the first whose loss was not finite, or, where it was
            the gradient, the first whose gradient is not.

    Raises:
        UserError: there is no such report or slot, or the dataset is another one.
    """
    report = _Report.read(Path(path))
    torch.set_num_threads(report.facts["threads"])
    if slot is not None:
        return _Rerun(report, report.find(slot)).run()
    bad = [facts for facts in report.slots if not math.isfinite(float(facts["loss"]))]
    if bad:
        return _Rerun(report, bad[0]).run()
    results = (_Rerun(report, facts).run() for facts in report.slots)
    return next((found for found in results if not found.is_finite), None) or (
        _Rerun(report, report.slots[0]).run()
    )


@dataclass(frozen=True)
class _Report:
    """A report's directory and its ``report.json``."""

    directory: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Report:
        directory = path.parent if path.name == REPORT else path
        if not (directory / REPORT).is_file():
            inside = sorted((directory / DIRECTORY).glob(f"step-*/{REPORT}"))
            if not inside:
                raise UserError(
                    str(path),
                    f"there is no {REPORT}",
                    f"RUN_DIR/{DIRECTORY}/step-NNNNNNNN, which a run leaves that exits with 3",
                )
            directory = inside[-1].parent
        try:
            facts = json.loads((directory / REPORT).read_text())
        except ValueError as error:
            raise UserError(str(directory / REPORT), f"is damaged: {error}") from None
        if facts.get("format") != FORMAT:
            what = f"is of format {facts.get('format')!r}"
            raise UserError(str(directory / REPORT), what, f"format {FORMAT}")
        return cls(directory, facts)

    @property
    def slots(self) -> list[dict[str, Any]]:
        return self.facts["slots"]

    def find(self, slot: int) -> dict[str, Any]:
        for facts in self.slots:
            if facts["slot"] == slot:
                return facts
        known = f"0 to {self.slots[-1]['slot']}"
        raise UserError("--slot", f"step {self.facts['step']} has no slot {slot}", known)


class _Rerun:
    """The run as it stood before a reported step, on one rank.

    Args:
        report: The report.
        wanted: What it says of the slot.
    """

    def __init__(self, report: _Report, wanted: dict[str, Any]) -> None:
        self.report, self.wanted = report, wanted
        recipe = load_recipe(str(report.directory / checkpoint.RECIPE), []).recipe
        self.recipe, facts = recipe, report.facts
        prepare_process(compile_model=recipe.model.compile)
        self.device = choose_device(ALONE)
        check_precision(recipe.engine.precision, self.device)
        self.dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
        self.backend = resolve_backend(recipe.model.attention, self.device, self.dtype)
        self.bfloat16 = bfloat16_mode(recipe.engine.precision, facts["zero_stage"])
        shards = open_shards(recipe, ALONE)
        self.dataset = TokenDataset.open(recipe.data.path, "train", source=shards)
        if self.dataset.info.fingerprint != facts["dataset"]:
            raise UserError(
                recipe.data.path,
                f"is not the run's dataset: fingerprint {self.dataset.info.fingerprint}",
                facts["dataset"],
            )
        corpus = read_corpus(recipe)
        derived = derive(recipe, corpus=corpus, world_size=facts["ranks"])
        mixture = build_mixture(recipe, derived.steps)
        self.data: TrainingData = training_data(recipe, self.dataset, derived, mixture)
        info = self.dataset.info
        self.state = State(
            recipe=recipe,
            steps=derived.steps,
            rank=wanted["rank"],
            world_size=facts["ranks"],
            device=self.device,
            vocabulary=Vocabulary(info.vocab_size, info.mask_id, info.special_ids),
            mixture=mixture,
            model=build_model(recipe, info, pretrained=False),
            step=facts["step"],
        )
        self.dispatcher = Dispatcher(build_algorithms(recipe), logger=_Silence())

    def run(self) -> ReplayedSlot:
        """Begin the step, go to the slot, and look at what it does."""
        self._begin()
        self._go_to_slot()
        state, wanted = self.state, self.wanted
        loss = there(state.loss)
        value = float(loss.detach().double())
        is_bad = not math.isfinite(value)
        weights = dict(state.model.named_parameters())
        extremes = {name: float(p.detach().abs().max()) for name, p in weights.items()}
        return ReplayedSlot(
            step=state.step,
            slot=wanted["slot"],
            rank=wanted["rank"],
            objective=wanted["objective"],
            recorded=float(wanted["loss"]),
            loss=value,
            first_bad_module=self._first_bad_module() if is_bad else None,
            bad_gradients=() if is_bad else _bad_gradients(loss, weights),
            documents=self._documents(),
            largest_weight=max(extremes.items(), key=lambda item: item[1]),
            bad_weights=tuple(name for name, most in extremes.items() if not math.isfinite(most)),
            differences=self._differences(),
        )

    def _begin(self) -> None:
        """Everything that comes before the step's first slot."""
        state, directory = self.state, self.report.directory
        self.dispatcher.dispatch(Event.INIT, state)
        checkpoint.load_weights(directory, state.model)
        nn.Module.to(state.model, self.device)
        if self.bfloat16 == "weights":
            cast_weights(state.model, torch.bfloat16)
        self.dispatcher.dispatch(Event.FIT_START, state)
        file = directory / f"rank-{state.rank:05d}.pt"
        begun = torch.load(file, map_location="cpu", weights_only=False)
        self.dispatcher.load_state_dict(begun["algorithms"])
        checkpoint.set_random_state(begun["random"])
        self.dispatcher.dispatch(Event.STEP_START, state)

    def _go_to_slot(self) -> None:
        """Run the slot, after the rank's earlier ones where algorithms may remember those."""
        state = self.state
        slots = state.mixture.for_rank(state.step, state.rank, state.world_size)
        place = next(i for i, slot in enumerate(slots) if slot.index == self.wanted["slot"])
        first = 0 if self.recipe.algorithms else place
        for slot in slots[first : place + 1]:
            state.slot, state.batch = slot, self.data.batch(slot.stream, slot.first_sequence)
            slot_loss(state, self.dispatcher, self._model, backend=self.backend, dtype=self.dtype)

    def _model(self, *inputs: object, **options: object) -> DualOutput:
        """The model as DeepSpeed's engine calls it."""
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bfloat16 == "autocast"
        )
        with autocast:
            return self.state.model(*inputs, **options)

    def _first_bad_module(self) -> str | None:
        """Run the slot's forward pass again, looking at what every module returns."""
        bad: list[str] = []

        def look(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: object, output: object) -> None:
                if not all(bool(tensor.isfinite().all()) for tensor in _float_tensors(output)):
                    bad.append(name or "the whole model")

            return hook

        with contextlib.ExitStack() as stack:
            # Hooks inside compiled modules would not be called.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in self.state.model.named_modules():
                handle = module.register_forward_hook(look(name))
                stack.callback(handle.remove)
            with torch.no_grad():
                forward(self.state, self._model, backend=self.backend, dtype=self.dtype)
        return bad[0] if bad else None

    def _documents(self) -> tuple[tuple[int, str], ...]:
        tokenizer = parse_tokenizer(self.dataset.tokenizer_path)
        shown = []
        for number in dict.fromkeys(n for row in there(self.state.batch).documents for n in row):
            ids = self.dataset.read(number, 0, PREVIEW_TOKENS).tolist()
            text = tokenizer.decode(ids, skip_special_tokens=False)
            shown.append((number, " ".join(text.split())))
        return tuple(shown)

    def _differences(self) -> tuple[str, ...]:
        device = self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        now = {"device": name, "torch": torch.__version__}
        found = [
            f"{key} then {self.report.facts[key]}, now {value}"
            for key, value in now.items()
            if self.report.facts[key] != value
        ]
        if self.report.facts["states_at"] != "beginning of the step":
            found.append("the algorithms' states are large, and of the end of the step")
        return tuple(found)


class _Silence:
    """Takes what algorithms log, which belongs to no record here."""

    def log(self, name: str, value: float | Tensor) -> None:
        """Forget it."""


def _bad_gradients(loss: Tensor, weights: dict[str, nn.Parameter]) -> tuple[str, ...]:
    loss.backward()
    return tuple(
        name
        for name, parameter in weights.items()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    )


def _float_tensors(value: object) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _float_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _float_tensors(item)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
