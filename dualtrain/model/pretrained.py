"""Weights of a published or exported model, read into one of ours parameter by parameter.

Only safetensors are read: other formats are programs that run when they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import open_weights, read_object
from dualtrain.common.randomness import generator
from dualtrain.engine.parameters import whole_parameters
from dualtrain.network.transformer import DualLM

if TYPE_CHECKING:
    from dualtrain.model.imported import ImportedLM

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What older versions of transformers saved beside the weights: masks and rotary frequencies.
_CONSTANTS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".inv_freq",
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")

# Share of the spread of the old rows: enough to tell new rows apart.
_NOISE = 0.02


@dataclass(frozen=True)
class NewRows:
    """How the rows of tokens come about that the published model does not know.

    Each is the mean of the rows it knows, or another token's row, plus a little noise.

    Attributes:
        published: Rows of the published embedding and output matrix.
        rows: Wanted rows of both, at least as many.
        tokens: Ids of new tokens below the published number of rows, which were only reserved.
        like: For some new ids the id of the known row that they begin as.
    """

    published: int
    rows: int
    tokens: tuple[int, ...]
    like: Mapping[int, int]
    seed: int

    def extend(self, published: Tensor, name: str) -> Tensor:
        """From (published, W) to (rows, W) float32, with noise by the parameter's name."""
        result = torch.zeros(self.rows, published.shape[1])
        result[: len(published)] = published
        is_known = torch.arange(self.rows) < len(published)
        is_known[list(self.tokens)] = False
        known = result[is_known]
        mean, spread = known.mean(dim=0), known.std(dim=0, correction=0)
        random = generator(self.seed, f"new rows of {name}")
        for token in (~is_known).nonzero().flatten().tolist():
            begin = result[self.like[token]] if token in self.like else mean
            noise = torch.from_numpy(random.standard_normal(len(mean), dtype="float32"))
            result[token] = begin + _NOISE * spread * noise
        return result


def load_pretrained(
    directory: Path, model: DualLM | ImportedLM, new_rows: NewRows | None = None
) -> None:
    """Fill a model with the weights of a directory; at stage 3 every rank calls.

    Never more than one parameter is whole, nor in memory twice.

    Args:
        directory: In the layout of Hugging Face.
        model: Of that configuration, but for the vocabulary.
        new_rows: How to make up for a larger vocabulary; None where it is the published one.

    Raises:
        UserError: There are no weights in safetensors, or they are not those of this model.
    """
    files = _Weights(directory, getattr(model, "base_model_prefix", ""))
    ends = ()
    if new_rows is not None:
        ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        found = files.take(aliases[id(parameter)])
        with torch.no_grad(), whole_parameters([parameter]):
            expected = tuple(parameter.shape)
            extending = new_rows if id(parameter) in ends else None
            if extending is not None:
                expected = (extending.published, *expected[1:])
            if tuple(found.shape) != expected:
                what = f"{name} is of shape {tuple(found.shape)}"
                raise UserError(str(directory), what, f"{expected}, as its config.json says")
            parameter.copy_(found if extending is None else extending.extend(found, name))
    files.check_rest()


class _Weights:
    """The tensors of a directory by name."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        self._files = dict(_find_tensors(directory))

    def take(self, names: Sequence[str]) -> Tensor:
        """Read a tensor, under the first of its names that is there; the others go with it."""
        # Published GPT-2 leaves out the name of the body.
        spellings = [*names, *(name.removeprefix(f"{self._prefix}.") for name in names)]
        known = [name for name in spellings if name in self._files]
        if not known:
            what = f"lacks the weights {names[0]}"
            raise UserError(str(self._directory), what, "those of its config.json")
        name, file = known[0], self._files[known[0]]
        with open_weights(file) as weights:
            found = weights.get_tensor(name)
        check_values(found, name, str(file))
        for name in known:
            self._files.pop(name, None)
        return found

    def check_rest(self) -> None:
        """Refuse weights that the model has no place for."""
        rest = [name for name in self._files if not name.endswith(_CONSTANTS)]
        if rest:
            some = ", ".join(sorted(rest)[:3])
            raise UserError(
                str(self._directory),
                f"has weights that its config.json says nothing of: {some}",
                "a causal language model's weights alone",
            )


def check_values(found: Tensor, name: str, where: str) -> None:
    """Refuse values that training could only fail on, step after step.

    Args:
        where: What messages call the file.

    Raises:
        UserError: They are of a quantised type, or not all finite.
    """
    if found.dtype not in _DTYPES:
        what = f"{name} is of type {str(found.dtype).removeprefix('torch.')}"
        hint = "quantised weights cannot be trained"
        raise UserError(where, what, "fp32, bf16 or fp16", hint)
    values = found.float() if found.dtype == torch.float64 else found
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise UserError(
            where,
            f"{name} has {wrong:,} values that are NaN or infinite, of {found.numel():,}",
            "numbers that fp32 can hold",
            "fetch the file again, or take another checkpoint of the model",
        )


def _find_tensors(directory: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every tensor of a model."""
    index = directory / INDEX
    if index.is_file():
        places = read_object(index, "the index of a model's weights").get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise UserError(str(index), "has no weight_map", "the file of each tensor by name")
        for name, file in places.items():
            yield name, directory / file
        return
    single = directory / SINGLE
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(f.name for pattern in _OTHER_WEIGHTS for f in directory.glob(pattern))
        raise UserError(
            str(directory),
            "has no weights in safetensors" + (f", only {', '.join(others[:3])}" if others else ""),
            f"{SINGLE}, or {INDEX} and the files it names",
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) converts other formats",
        )
    for file in files:
        with open_weights(file) as weights:
            names = list(weights.keys())
        yield from ((name, file) for name in names)
