"""The configuration of a ``DualLM``: what its weights mean, and nothing about how it is run.

The names are transformers', as in an exported ``config.json``; a recipe's are shorter. Needs
neither torch nor transformers: a dry run counts with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dualtrain.common.errors import UserError

if TYPE_CHECKING:
    from dualtrain.recipe.schema import ModelSection

HeadKind = Literal["paper", "linear"]

VOCABULARY_MULTIPLE = 64
"""The dataset's vocabulary is rounded up to a multiple of this."""

_FORMER = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "sequence_length": "max_position_embeddings",
}
"""Names in the checkpoints of earlier versions, which are also the recipe's."""


@dataclass(frozen=True)
class DualConfig:
    """Sizes and constants of a dual-objective language model; by default the paper's of 470M.

    Attributes:
        vocab_size: Rows of the embedding and of the output matrix.
        hidden_size: Width of the residual stream.
        intermediate_size: Hidden width of the SwiGLU MLP.
        max_position_embeddings: Tokens of a training sequence. Longer rows work too.
        head: ``paper``: norm, linear, GELU, linear with bias; ``linear``: Llama's layout.

    Raises:
        UserError: The heads do not divide the width into parts of even size, or ``head`` is
            unknown.
    """

    vocab_size: int = 51_200
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 3554
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-7
    rope_theta: float = 160_000.0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 3
    mask_token_id: int = 4
    head: HeadKind = "paper"

    model_type: ClassVar[str] = "dualtrain"

    def __post_init__(self) -> None:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % (2 * heads):
            raise UserError(
                "model.heads",
                f"{heads} heads do not divide width {width} into parts of even size",
                "width to be a multiple of 2 * heads (rotary embeddings turn pairs)",
            )
        if self.head not in ("paper", "linear"):
            raise UserError("model.head", f"{self.head!r}", "paper or linear")

    @classmethod
    def of_recipe(cls, model: ModelSection, vocab_size: int, **others: int) -> DualConfig:
        """The configuration of a recipe's model.

        Args:
            vocab_size: Tokens of the dataset's vocabulary; count where the recipe says nothing.
            others: What the section does not say: token ids, length of a sequence.
        """
        rows = model.vocab_size or ceil(vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        section = model.model_dump(include={*_FORMER, "rope_theta", "head"})
        return cls.of({**section, "vocab_size": rows, **others})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DualConfig:
        """A configuration by names, also those of earlier versions; others are left aside."""
        named = {_FORMER.get(name, name): value for name, value in values.items()}
        return cls(**{f.name: named[f.name] for f in fields(cls) if f.name in named})

    def to_json_string(self) -> str:
        """What a checkpoint's ``config.json`` holds, as transformers' configurations say it."""
        return json.dumps({"model_type": self.model_type, **asdict(self)}, indent=2) + "\n"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
