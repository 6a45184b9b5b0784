"""Weights of a published model, read into an imported one parameter by parameter.

``import_model`` and ``build_model`` call :func:`load_pretrained`. Only safetensors are read: other
formats are programs that run when they are opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dualtrain.engine import whole_parameters
from dualtrain.errors import UserError
from dualtrain.model.imported import ImportedLM
from dualtrain.randomness import generator

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

# Of the spread of the old rows: enough to tell new rows apart.
_NOISE = 0.02


@dataclass(frozen=True)
class NewRows:
    """How the rows of tokens come about that the published model does not know.

    Each is the mean of the rows it knows, or another token's row, plus a little noise.

    Attributes:
        rows: Of the embedding and the output matrix, at least as many as published.
        tokens: Ids of new tokens below the published number of rows, which were only reserved.
        like: For some new ids the id of the known row that they begin as.
        seed: Of the noise.
    """

    rows: int
    tokens: tuple[int, ...]
    like: Mapping[int, int]
    seed: int

    def extend(self, published: Tensor, name: str) -> Tensor:
        """Give a vocabulary's matrix its new rows.

        Args:
            published: (R, W).
            name: Of the parameter; the noise depends on it.

        Returns:
            (rows, W) float32.
        """
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


def load_pretrained(directory: Path, model: ImportedLM, new_rows: NewRows | None = None) -> None:
    """Fill an imported model with the weights of a directory; at stage 3 every rank calls.

    Never more than one parameter is whole, nor in memory twice.

    Args:
        directory: In the layout of Hugging Face.
        model: Of its configuration, but for the vocabulary.
        new_rows: How to make up for a larger vocabulary; None where it is the published one.

    Raises:
        UserError: There are no weights in safetensors, or they are not those of this model.
    """
    files = _Weights(directory, model.body.base_model_prefix)
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    for name, parameter in model.named_parameters():
        found = files.take(aliases[id(parameter)])
        with torch.no_grad(), whole_parameters([parameter]):
            if new_rows is not None and id(parameter) in ends:
                found = new_rows.extend(found, name)
            if found.shape != parameter.shape:
                raise UserError(
                    str(directory),
                    f"{name} is of shape {tuple(found.shape)}",
                    f"{tuple(parameter.shape)}, as its config.json says",
                )
            parameter.copy_(found)
    files.check_rest()


class _Weights:
    """The tensors of a directory by name."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self._directory, self._prefix = directory, prefix
        self._files = dict(_find_tensors(directory))

    def take(self, names: Sequence[str]) -> Tensor:
        """Read a tensor, under the first of its names that is there; the others go with it.

        Published GPT-2 leaves out the name of the body.
        """
        from safetensors import safe_open

        spellings = [*names, *(name.removeprefix(f"{self._prefix}.") for name in names)]
        there = [name for name in spellings if name in self._files]
        if not there:
            raise UserError(
                str(self._directory), f"lacks the weights {names[0]}", "those of its config.json"
            )
        with safe_open(self._files[there[0]], framework="pt") as weights:
            found = weights.get_tensor(there[0])
        for name in there:
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


def _find_tensors(directory: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every tensor of a model."""
    from safetensors import SafetensorError, safe_open

    index = directory / INDEX
    if index.is_file():
        for name, file in json.loads(index.read_text())["weight_map"].items():
            yield name, directory / file
        return
    single = directory / SINGLE
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(
            str(directory),
            "has no weights in safetensors",
            f"{SINGLE}, or {INDEX} and the files it names",
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) converts other formats",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                names = list(weights.keys())
        except SafetensorError as error:
            raise UserError(str(file), f"cannot be read: {error}", "safetensors") from None
        yield from ((name, file) for name in names)
