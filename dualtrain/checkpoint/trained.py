"""A trained model, ready to be used: found, checked, and loaded without DeepSpeed.

``eval``, ``generate`` and ``export`` begin here. A checkpoint holds what is needed beside the
weights (``config.json``, ``tokenizer.json``, ``dataset.json``); of one made by an older version
the recipe and the dataset that it names are asked. The directory of an exported model, ours or
another in the layout of Hugging Face, is taken, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.files import MARKER, find_defects
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import check_name, parse_tokenizer, read_object
from dualtrain.common.files import user_path
from dualtrain.data.dataset import DATASET_FILE, TOKENIZER_FILE, DatasetInfo
from dualtrain.model.build import CONFIG, empty_model, read_exported
from dualtrain.model.exported import exported_append_eos, exported_target
from dualtrain.model.imported import ImportedLM
from dualtrain.model.inference import inference
from dualtrain.network.attention import resolve_backend
from dualtrain.network.output import DualOutput
from dualtrain.recipe.load import load_recipe
from dualtrain.recipe.schema import Recipe

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Vocab:
    """What has to be known of a tokenizer's ids.

    Attributes:
        size: Ids from here on are padding of the embedding.
        bos_id: ``<s>``, which begins each document.
        eos_id: ``</s>``.
        mask_id: ``<mask>``; None where the model has none, and then no mode that masks.
        special_ids: All that are no text; never masked, never produced.
    """

    size: int
    bos_id: int
    eos_id: int
    mask_id: int | None
    special_ids: tuple[int, ...]

    @property
    def stop_ids(self) -> tuple[int, int]:
        """What ends a text: its own end, or, in imported models, the beginning of the next one."""
        return self.bos_id, self.eos_id


@dataclass(frozen=True)
class Source:
    """Where a model comes from, before anything large is read.

    Attributes:
        path: A checkpoint's directory, or an exported model's.
        recipe: The resolved recipe; None for a model from elsewhere.
        info: Of the dataset; None likewise.
        facts: The checkpoint's ``state.json``; empty likewise.
        notes: What the user should be told of how it was found.
    """

    path: Path
    recipe: Recipe | None
    info: DatasetInfo | None
    facts: dict[str, Any]
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


@dataclass
class TrainedModel:
    """A model in evaluation mode with all that its use needs.

    Attributes:
        model: ``DualLM``, or a module with the same ``forward``.
        tokenizer: Takes text literally: ``<mask>`` in it is no mask.
        context: Longest row in tokens: the training's sequence length.
        target: What its diffusion objective predicts at i: token i+1, or i.
        precision: Its compute precision; weights are fp32, under autocast for bf16.
        backend: Attention backend for plans that leave a choice.
    """

    source: Source
    model: nn.Module
    tokenizer: Tokenizer
    vocab: Vocab
    context: int
    target: Literal["next", "in_place"]
    device: torch.device
    precision: Precision
    backend: str

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of the attention."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def __call__(self, *inputs: object, **options: object) -> DualOutput:
        """Run the model under its precision; use :meth:`inference` around."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(*inputs, **options)

    def inference(self) -> AbstractContextManager[None]:
        """Without gradients."""
        return inference(self.model)

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


def find_source(path: Path | str, *, step: int | None = None) -> Source:
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
        return Source(path, None, None, {})
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
    source: Source | Path | str,
    *,
    step: int | None = None,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    on_note: Callable[[str], None] | None = None,
) -> TrainedModel:
    """Load a model.

    Args:
        source: From :func:`find_source`, or what it takes.
        step: Of a run directory, the checkpoint of this step.
        device: By default the first GPU, or the CPU where there is none.
        precision: By default fp32 on a CPU, the run's precision on a GPU.
        on_note: Told what the user should know of how the model was found.

    Raises:
        UserError: As :func:`find_source`; also files that do not fit one another.
    """
    if not isinstance(source, Source):
        source = find_source(source, step=step)
    if on_note is not None:
        for note in source.notes:
            on_note(note)
    chosen = choose(device)
    precision = precision or _default_precision(source, chosen)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    asked = "auto" if source.recipe is None else source.recipe.model.attention
    # A backend that the run used elsewhere may not exist here.
    backend = resolve_backend(asked if chosen.type == "cuda" else "auto", chosen, dtype)
    model = _load_model(source)
    nn.Module.to(model, chosen)
    return TrainedModel(
        source=source,
        model=model.eval(),
        tokenizer=load_tokenizer(source),
        vocab=read_vocab(source),
        context=context_of(source, model),
        target=_target_of(source),
        device=chosen,
        precision=precision,
        backend=backend,
    )


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


def load_tokenizer(source: Source) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        UserError: It is not there, or another one than the dataset's.
    """
    return parse_tokenizer(tokenizer_file(source))


def tokenizer_file(source: Source) -> Path:
    """Where the model's ``tokenizer.json`` is.

    Raises:
        UserError: Nowhere.
    """
    own = source.path / TOKENIZER_FILE
    if own.is_file():
        return own
    if source.recipe is not None:
        of_dataset = Path(source.recipe.data.path) / TOKENIZER_FILE
        if of_dataset.is_file():
            return of_dataset
        hint = f"copy the tokenizer.json of {source.recipe.data.path}, the run's dataset, there"
    else:
        hint = "export the model again, or add its tokenizer"
    raise UserError(str(source.path), f"has no {TOKENIZER_FILE}", hint=hint)


def read_vocab(source: Source) -> Vocab:
    """The ids of a model's tokenizer.

    Raises:
        UserError: A model from elsewhere has no token to begin a document with.
    """
    info = source.info
    if info is not None:
        return Vocab(info.vocab_size, info.bos_id, info.eos_id, info.mask_id, info.special_ids)
    tokenizer = load_tokenizer(source)
    config = read_object(source.path / CONFIG, "a model's configuration")
    added = tokenizer.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}

    def find(key: str, *names: str) -> int | None:
        ids = config.get(key)
        if isinstance(ids, list):
            ids = ids[0]
        if ids is not None:
            return ids
        return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)

    eos = find("eos_token_id", "</s>", "<|endoftext|>")
    bos = find("bos_token_id", "<s>", "<|endoftext|>")
    bos = eos if bos is None else bos
    if bos is None:
        raise UserError(
            str(source.path / CONFIG),
            "names no bos_token_id, nor eos_token_id",
            "a token that begins documents",
        )
    mask = find("mask_token_id", "<mask>")
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    named = {token for token in (bos, eos, mask) if token is not None}
    return Vocab(size, bos, bos if eos is None else eos, mask, tuple(sorted(special | named)))


def appends_eos(source: Source) -> bool:
    """Whether the texts that the model was trained on ended with ``</s>``, as far as is known."""
    if source.recipe is not None:
        return source.recipe.data.append_eos
    return exported_append_eos(read_object(source.path / CONFIG, "a model's configuration"))


def context_of(source: Source, model: nn.Module) -> int:
    """Longest row in tokens."""
    if source.recipe is not None:
        return source.recipe.sequence_length
    if isinstance(model, ImportedLM):
        return model.longest_row
    config: Any = model.config
    return getattr(config, "max_position_embeddings", None) or config.n_positions


def _target_of(source: Source) -> Literal["next", "in_place"]:
    """What the diffusion objective predicts at a position."""
    if source.recipe is not None:
        return source.recipe.objective.target
    return exported_target(read_object(source.path / CONFIG, "a model's configuration"))


def _newest(run_dir: Path) -> Source:
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


def _checkpoint_source(path: Path, notes: tuple[str, ...] = ()) -> Source:
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
    return Source(path, recipe, info, checkpoint.read_state(path), notes)


def _defects(path: Path) -> list[str]:
    """What is wrong with the files that using the model takes; others may be missing."""
    needed = {*checkpoint.REQUIRED, CONFIG, TOKENIZER_FILE, DATASET_FILE}
    return find_defects(path, required=checkpoint.REQUIRED, share=(0, 1), only=needed)


def _default_precision(source: Source, device: torch.device) -> Precision:
    if device.type == "cpu" or source.recipe is None:
        return "fp32"
    return source.recipe.engine.precision


def _load_model(source: Source) -> nn.Module:
    """Build the model and fill it, with no more memory than the weights and one parameter."""
    if not source.is_checkpoint:
        return read_exported(source.path)
    recipe, info = source.recipe, source.info
    assert recipe is not None and info is not None
    model = empty_model(source.path, recipe, info)
    checkpoint.load_weights(source.path, model)
    return model
