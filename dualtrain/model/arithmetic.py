"""What a model of given sizes costs: parameters and floating-point operations, in closed form.

Plain numbers in, plain numbers out: a dry run and the progress meter use these without building a
model or importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

HeadKind = Literal["paper", "linear"]
AttentionKind = Literal["causal", "full", "prefix"]


class ModelSizes(Protocol):
    """What the closed forms need; ``DualConfig`` has it, and so may anything else."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def head(self) -> HeadKind: ...


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters.

    Attributes:
        total: All of them.
        without_vocabulary: Without the embedding and the output matrix.
    """

    total: int
    without_vocabulary: int


def count_parameters(sizes: ModelSizes) -> ParameterCount:
    """Count the parameters of a ``DualLM``.

    A block has four square attention matrices, three of the SwiGLU MLP and the gains of two norms:
    ``4 W^2 + 3 W M + 2 W``. Beside the blocks: the head's norm (W), in the paper's head also its
    projection (W^2) and the bias (V), and the two vocabulary matrices (2 V W, untied).
    """
    body = sizes.layers * (_block_matrix_elements(sizes) + 2 * sizes.width) + sizes.width
    if sizes.head == "paper":
        body += sizes.width**2 + sizes.vocab_size
    return ParameterCount(total=body + 2 * sizes.vocab_size * sizes.width, without_vocabulary=body)


def parameter_shapes(sizes: ModelSizes) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a ``DualLM`` by name, in the model's order."""
    width, mlp, rows = sizes.width, sizes.mlp_width, sizes.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(sizes.layers):
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

    Args:
        sizes: The model.
        sequence_length: T, in tokens.
        attention: Kind of attention; ``prefix`` is counted as ``full``.
        supervised_share: s; by default 1 causally, else 1/2, the mean of uniform masking.

    Returns:
        Floating-point operations per input token.
    """
    if supervised_share is None:
        supervised_share = 1.0 if attention == "causal" else 0.5
    keys = sequence_length / 2 if attention == "causal" else sequence_length
    projection = sizes.width**2 if sizes.head == "paper" else 0
    block = 2 * _block_matrix_elements(sizes) + 4 * sizes.width * keys
    head = 2 * (projection + sizes.vocab_size * sizes.width)
    return 3 * (sizes.layers * block + supervised_share * head)


def _block_matrix_elements(sizes: ModelSizes) -> int:
    return 4 * sizes.width**2 + 3 * sizes.width * sizes.mlp_width
