"""What a model of given sizes costs: parameters and floating-point operations, in closed form.

Plain numbers in, plain numbers out: a dry run and the progress meter use these without building a
model or importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from dualtrain.network.config import DualConfig

AttentionKind = Literal["causal", "full", "prefix"]


@dataclass(frozen=True)
class ImportedSizes:
    """The sizes of an imported model, whose parameters are no function of a few sizes.

    Attributes:
        shapes: Of each parameter by name, in the model's order; of tied ones once.
        vocabulary: Names of the embedding and of the output matrix; one name if they are tied.
        matrices: Names of the body's matrices, which are those that Muon updates.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    attention_width: int
    shapes: Mapping[str, tuple[int, ...]]
    vocabulary: tuple[str, ...]
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters.

    Attributes:
        without_vocabulary: Without the embedding and the output matrix.
    """

    total: int
    without_vocabulary: int


def count_parameters(sizes: DualConfig | ImportedSizes) -> ParameterCount:
    """Count the parameters of a model.

    A block of a ``DualLM`` has four square attention matrices, three of the SwiGLU MLP and the
    gains of two norms: ``4 W^2 + 3 W M + 2 W``. Beside the blocks: the head's norm (W), in the
    paper's head also its projection (W^2) and the bias (V), and the two vocabulary matrices
    (2 V W, untied).
    """
    if isinstance(sizes, ImportedSizes):
        total = sum(prod(shape) for shape in sizes.shapes.values())
        vocabulary = sum(prod(sizes.shapes[name]) for name in sizes.vocabulary)
        return ParameterCount(total=total, without_vocabulary=total - vocabulary)
    body = (
        sizes.num_hidden_layers * (_block_matrix_elements(sizes) + 2 * sizes.hidden_size)
        + sizes.hidden_size
    )
    if sizes.head == "paper":
        body += sizes.hidden_size**2 + sizes.vocab_size
    return ParameterCount(
        total=body + 2 * sizes.vocab_size * sizes.hidden_size, without_vocabulary=body
    )


def parameter_shapes(sizes: DualConfig | ImportedSizes) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a model by name, in the model's order."""
    if isinstance(sizes, ImportedSizes):
        return dict(sizes.shapes)
    width, mlp, rows = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(sizes.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (width, width)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (mlp, width)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (mlp, width)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, mlp)
    shapes["model.norm.weight"] = (width,)
    if sizes.head == "paper":
        shapes["head_projection.weight"] = (width, width)
    shapes["lm_head.weight"] = (rows, width)
    if sizes.head == "paper":
        shapes["lm_head.bias"] = (rows,)
    return shapes


def matrix_names(sizes: DualConfig | ImportedSizes) -> tuple[str, ...]:
    """Names of the matrices that Muon updates: the body's, and the paper's head's projection."""
    if isinstance(sizes, ImportedSizes):
        return sizes.matrices
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    shapes = parameter_shapes(sizes).items()
    return tuple(name for name, shape in shapes if len(shape) == 2 and name not in vocabulary)


def flops_per_token(
    sizes: DualConfig | ImportedSizes,
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
    Of an imported model the sum of its blocks' matrices stands for ``L * (4 W^2 + 3 W M)``, and the
    width of its attention for the W beside K.

    Args:
        attention: Kind of attention; ``prefix`` is counted as ``full``.
        supervised_share: s; by default 1 causally, else 1/2, the mean of uniform masking.
    """
    if supervised_share is None:
        supervised_share = 1.0 if attention == "causal" else 0.5
    keys = sequence_length / 2 if attention == "causal" else sequence_length
    projection, attention_width = 0, sizes.hidden_size
    if isinstance(sizes, ImportedSizes):
        elements = sum(prod(sizes.shapes[name]) for name in sizes.matrices)
        attention_width = sizes.attention_width
    else:
        elements = sizes.num_hidden_layers * _block_matrix_elements(sizes)
        projection = sizes.hidden_size**2 if sizes.head == "paper" else 0
    body = 2 * elements + sizes.num_hidden_layers * 4 * attention_width * keys
    head = 2 * (projection + sizes.vocab_size * sizes.hidden_size)
    return 3 * (body + supervised_share * head)


def _block_matrix_elements(sizes: DualConfig) -> int:
    return 4 * sizes.hidden_size**2 + 3 * sizes.hidden_size * sizes.intermediate_size
