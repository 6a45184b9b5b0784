"""A trained model, ready to be used: found, checked, and loaded without DeepSpeed.

``eval``, ``generate`` and ``export`` begin here. A checkpoint holds what is needed beside the
weights (``config.json``, ``tokenizer.json``, ``dataset.json``); of one made by an older version
the recipe and the dataset that it names are asked. The directory of an exported model, ours or
another in the layout of Hugging Face, is taken, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import nn

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.files import MARKER, find_defects
from dualtrain.common.errors import UserError, nearest
from dualtrain.common.file_kinds import check_name, parse_tokenizer, read_object
from dualtrain.common.files import user_path
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.data.dataset import DATASET_FILE, TOKENIZER_FILE, DatasetInfo
from dualtrain.model.build import CONFIG, empty_model, read_exported
from dualtrain.model.exported import exported_append_eos, exported_document_mask, exported_target
from dualtrain.model.handle import ModelHandle, Target
from dualtrain.network.backends import resolve_backend
from dualtrain.network.config import DualConfig
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import Recipe

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and what can be known of it before its weights are read.

    Attributes:
        path: A checkpoint's directory, or an exported model's.
        recipe: The resolved recipe; None for a model from elsewhere.
        info: The facts of its dataset; None for a model from elsewhere.
        facts: The checkpoint's ``state.json``; empty for a model from elsewhere.
        notes: What the user should be told of how it was found.
    """

    path: Path
    recipe: Recipe | None = None
    info: DatasetInfo | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a checkpoint of ours, else an exported model."""
        return bool(self.facts)

    @property
    def name(self) -> str:
        """What to call it: ``NAME at step N``, or the directory."""
        if self.recipe is None:
            return self.path.name
        return f"{self.recipe.name} at step {self.facts['step']}"

    @property
    def run_dir(self) -> Path:
        """Where what is found out about the model is written by default."""
        return self.path.parent if self.is_checkpoint else self.path

    @property
    def append_eos(self) -> bool:
        """Whether the texts of its training ended with ``</s>``, as far as is known."""
        if self.recipe is not None:
            return self.recipe.data.append_eos
        return exported_append_eos(self._config)

    @property
    def document_mask(self) -> bool:
        """Whether attention ended at the borders of documents in its training."""
        if self.recipe is not None:
            return self.recipe.data.document_mask
        return exported_document_mask(self._config)

    @property
    def target(self) -> Target:
        """What its diffusion objective predicts at i: token i+1, or i."""
        if self.recipe is not None:
            return self.recipe.objective.target
        return exported_target(self._config)

    @cached_property
    def tokenizer_file(self) -> Path:
        """Its ``tokenizer.json``.

        Raises:
            UserError: There is none.
        """
        own = self.path / TOKENIZER_FILE
        if own.is_file():
            return own
        hint = "export the model again, or add its tokenizer"
        if self.recipe is not None:
            dataset = Path(self.recipe.data.path)
            if (dataset / TOKENIZER_FILE).is_file():
                return dataset / TOKENIZER_FILE
            hint = f"copy the tokenizer.json of {dataset}, the run's dataset, there"
        raise UserError(str(self.path), f"has no {TOKENIZER_FILE}", hint=hint)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Takes text literally: ``<mask>`` in it is no mask."""
        return parse_tokenizer(self.tokenizer_file)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the ids of its tokenizer mean.

        Raises:
            UserError: A model from elsewhere has no token to begin a document with.
        """
        if self.info is not None:
            return self.info.vocabulary
        eos = self._special_id("eos_token_id", "</s>", "<|endoftext|>")
        bos = self._special_id("bos_token_id", "<s>", "<|endoftext|>")
        bos = eos if bos is None else bos
        if bos is None:
            raise UserError(
                str(self.path / CONFIG),
                "names no bos_token_id, nor eos_token_id",
                "a token that begins documents",
            )
        eos = bos if eos is None else eos
        mask = self._special_id("mask_token_id", "<mask>")
        added = self.tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special} | {bos, eos}
        return Vocabulary(
            size=1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values()),
            special_ids=tuple(sorted(special if mask is None else special | {mask})),
            bos_id=bos,
            eos_id=eos,
            mask=mask,
            stop_ids=(bos, eos),
        )

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_object(self.path / CONFIG, "a model's configuration")

    def _special_id(self, key: str, *names: str) -> int | None:
        """A special token as the configuration has it, else by its name in the tokenizer."""
        ids = self._config.get(key)
        # Some models have several ends of a text.
        found = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(found, int) and found >= 0:
            return found
        if found is not None:
            raise UserError(f"{self.path / CONFIG}: {key}", f"{ids!r}", "the id of a token")
        known = (self.tokenizer.token_to_id(name) for name in names)
        return next((number for number in known if number is not None), None)


@dataclass(frozen=True, kw_only=True)
class TrainedModel(ModelHandle):
    """A model in evaluation mode with all that its use needs.

    Attributes:
        tokenizer: Takes text literally: ``<mask>`` in it is no mask.
    """

    model: nn.Module
    source: ModelSource
    tokenizer: Tokenizer

    @property
    def precision(self) -> Precision:
        """Of its passes; the weights are fp32, under autocast for bf16."""
        return "bf16" if self.autocast else "fp32"

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without ``<s>``."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def alpha(self) -> object | None:
        """The recipe's AR share, if it is known."""
        return None if self.source.recipe is None else self.source.recipe.alpha


def find_source(path: Path | str, *, step: int | None = None) -> ModelSource:
    """Find what a user means by a path: a run, a checkpoint or an exported model.

    Args:
        path: A run directory (its newest whole checkpoint), a checkpoint's directory, or the
            directory of an exported model.
        step: Of a run directory, the checkpoint of this step.

    Raises:
        UserError: There is nothing of the kind, or it is half-written or damaged.
    """
    path = user_path(path)
    check_name(path)
    if not path.exists():
        raise UserError(str(path), "does not exist", "a run directory, a checkpoint, or an export")
    if not path.is_dir():
        raise UserError(str(path), "is a file", "a run directory, a checkpoint, or an export")
    is_one = (path / MARKER).exists() or (path / checkpoint.STATE).exists()
    if is_one or path.name.endswith(".partial"):
        if step is not None:
            raise UserError("--step", f"{path} is a checkpoint already", "a run directory")
        return _checkpoint_source(path)
    if step is not None:
        return _checkpoint_source(_at_step(path, step))
    if checkpoint.list_checkpoints(path):
        return _newest(path)
    if (path / CONFIG).is_file():
        return ModelSource(path)
    unfinished = sorted(path.glob("step-*.partial"))
    if unfinished:
        raise UserError(
            str(path),
            f"has no whole checkpoint, only the unfinished {unfinished[-1].name}",
            f"a directory step-NNNNNNNN with its {MARKER}",
            "let the run go on until it has saved",
        )
    raise UserError(
        str(path),
        "has neither checkpoints nor an exported model",
        f"directories step-NNNNNNNN, or a {CONFIG}",
        "the run's directory is in its recipe, by default runs/NAME",
    )


def open_trained(
    source: ModelSource | Path | str,
    *,
    step: int | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> TrainedModel:
    """Load a model.

    Args:
        source: From :func:`find_source`, or what it takes.
        device: By default the first GPU, or the CPU where there is none.
        precision: By default fp32 on a CPU, the run's precision on a GPU.
        on_note: Told what the user should know of how the model was found.

    Raises:
        UserError: As :func:`find_source`; also files that do not fit one another.
    """
    if not isinstance(source, ModelSource):
        source = find_source(source, step=step)
    for note in source.notes:
        on_note(note)
    chosen, recipe = choose(device), source.recipe
    check_precision(precision)
    if precision is None:
        of_run = "fp32" if recipe is None else recipe.engine.precision
        precision = "fp32" if chosen.type == "cpu" else of_run
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # A backend that the run used elsewhere may not exist here.
    asked = "auto" if recipe is None or chosen.type != "cuda" else recipe.model.attention
    backend = resolve_backend(asked, chosen, dtype)
    model = _load_model(source)
    nn.Module.to(model, chosen)
    return TrainedModel(
        source=source,
        model=model.eval(),
        tokenizer=source.tokenizer,
        vocabulary=source.vocabulary,
        context=_context(source, model),
        target=source.target,
        device=chosen,
        dtype=dtype,
        autocast=dtype is torch.bfloat16,
        backend=backend,
    )


def check_precision(asked: str | None) -> None:
    """Refuse a precision that is not known; None leaves it open.

    Raises:
        UserError: It is another word.
    """
    known = get_args(Precision)
    if asked is not None and asked not in known:
        what, expected = f"{asked!r} is not known", " or ".join(known)
        raise UserError("--precision", what, expected, nearest(asked, known))


def choose(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        UserError: There is no such device here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError("--device", f"{device!r} cannot be used: {reason}", "cpu or cuda") from None
    return chosen


def _newest(run_dir: Path) -> ModelSource:
    """The newest whole checkpoint; newer damaged ones are named."""
    notes = []
    for path in reversed(checkpoint.list_checkpoints(run_dir)):
        defects = _defects(path)
        if not defects:
            return _checkpoint_source(path, tuple(notes))
        notes.append(f"{path} is damaged and passed over: {defects[0]}")
    raise UserError(str(run_dir), "every checkpoint is damaged: " + "; ".join(notes))


def _at_step(run_dir: Path, step: int) -> Path:
    path = checkpoint.checkpoint_path(run_dir, step)
    if not path.is_dir():
        steps = [checkpoint.step_of(p) for p in checkpoint.find_checkpoints(run_dir)]
        raise UserError(
            "--step",
            f"{run_dir} has no checkpoint of step {step}",
            f"one of {', '.join(map(str, steps))}" if steps else "a run with checkpoints",
        )
    return path


def _checkpoint_source(path: Path, notes: tuple[str, ...] = ()) -> ModelSource:
    defects = _defects(path)
    if defects:
        raise UserError(
            str(path),
            f"is not a whole checkpoint: {defects[0]}",
            f"a directory step-NNNNNNNN as its {MARKER} lists it",
            "take another checkpoint of the run",
        )
    recipe = load_recipe(str(path / checkpoint.RECIPE), []).recipe
    held = (path / DATASET_FILE).is_file()
    info = DatasetInfo.load(path if held else recipe.data.path)
    return ModelSource(path, recipe, info, checkpoint.read_state(path), notes)


def _defects(path: Path) -> list[str]:
    """What is wrong with the files that using the model takes; others may be missing."""
    needed = {*checkpoint.REQUIRED, CONFIG, TOKENIZER_FILE, DATASET_FILE}
    return find_defects(path, required=checkpoint.REQUIRED, share=(0, 1), only=needed)


def _load_model(source: ModelSource) -> nn.Module:
    """Build the model and fill it, with no more memory than the weights and one parameter."""
    if not source.is_checkpoint:
        return read_exported(source.path)
    assert source.recipe is not None and source.info is not None
    model = empty_model(source.path, source.recipe, source.info)
    checkpoint.load_weights(source.path, model)
    return model


def _context(source: ModelSource, model: Any) -> int:
    """Longest row in tokens."""
    if source.recipe is not None:
        return source.recipe.sequence_length
    if isinstance(model.config, DualConfig):
        return model.config.max_position_embeddings
    from dualtrain.model.imported_config import longest_row  # which takes transformers

    return longest_row(model.config)
