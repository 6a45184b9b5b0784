"""What a model of given sizes costs: parameters and floating-point operations, in closed form.

Plain numbers in, plain numbers out: a dry run and the progress meter use these without building a
model or importing torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from dualtrain.network.config import DualConfig

AttentionKind = Literal["causal", "full", "prefix"]


@dataclass(frozen=True)
class ModelSizes:
    """A model's parameters by name, and what else its costs follow from.

    Attributes:
        shapes: In the model's order; of tied parameters once.
        vocabulary: Names of the embedding and of the output matrix; one name if they are tied.
        matrices: Names of the blocks' matrices.
        head_matrices: Names of matrices between the blocks and the output matrix.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    attention_width: int
    shapes: Mapping[str, tuple[int, ...]]
    vocabulary: tuple[str, ...]
    matrices: tuple[str, ...]
    head_matrices: tuple[str, ...] = ()

    @property
    def muon_matrices(self) -> tuple[str, ...]:
        """Names of the matrices that Muon updates."""
        return (*self.matrices, *self.head_matrices)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(prod(shape) for shape in self.shapes.values())

    def elements(self, names: Iterable[str]) -> int:
        """How many of them these have."""
        return sum(prod(self.shapes[name]) for name in names)


def model_sizes(config: DualConfig) -> ModelSizes:
    """The sizes of a ``DualLM``, of which a block has four square matrices and three of the MLP."""
    width, mlp, rows = config.hidden_size, config.intermediate_size, config.vocab_size
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    shapes: dict[str, tuple[int, ...]] = {embedding: (rows, width)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (width, width)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (mlp, width)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (mlp, width)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, mlp)
    matrices = tuple(name for name, shape in shapes.items() if len(shape) == 2)[1:]
    shapes["model.norm.weight"] = (width,)
    head = ("head_projection.weight",) if config.head == "paper" else ()
    shapes |= {name: (width, width) for name in head}
    shapes[output] = (rows, width)
    if config.head == "paper":
        shapes["lm_head.bias"] = (rows,)
    layers = config.num_hidden_layers
    return ModelSizes(rows, width, layers, mlp, width, shapes, (embedding, output), matrices, head)


def flops_per_token(
    sizes: ModelSizes,
    sequence_length: int,
    attention: AttentionKind,
    supervised_share: float | None = None,
) -> float:
    """Count the useful operations of training on one input token, forward and backward.

    With width W, MLP width M, layers L, vocabulary V and sequence length T::

        3 * ( L * (2 * (4 W^2 + 3 W M) + 4 W K) + s * 2 * (H + V W) )

    A multiplication and an addition are two operations; the backward pass costs twice the forward
    pass. K is the mean number of keys a query sees: T / 2 causally, T otherwise. H is W^2 in the
    paper's head, else 0. s is the share of positions that are supervised: the head runs for no
    others. Norms, rotary embeddings and the softmax are left out, as is usual; document boundaries
    are not subtracted from K, so packed short documents make a utilisation look better than it is.
    In general the elements of the blocks' matrices stand for ``L * (4 W^2 + 3 W M)``, and the width
    of the attention for the W beside K.

    Args:
        attention: Kind of attention; ``prefix`` is counted as ``full``.
        supervised_share: s; by default 1 causally, else 1/2, the mean of uniform masking.
    """
    if supervised_share is None:
        supervised_share = 1.0 if attention == "causal" else 0.5
    keys = sequence_length / 2 if attention == "causal" else sequence_length
    attended = sizes.num_hidden_layers * 4 * sizes.attention_width * keys
    body = 2 * sizes.elements(sizes.matrices) + attended
    head = 2 * (sizes.elements(sizes.head_matrices) + sizes.vocab_size * sizes.hidden_size)
    return 3 * (body + supervised_share * head)
