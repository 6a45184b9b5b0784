"""The configuration of a ``DualLM``: what its weights mean, and nothing about how it is run.

The attention backend, compilation and activation checkpointing are choices of a run, so they are
arguments elsewhere and never written into a model's ``config.json``.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from dualtrain.common.errors import UserError
from dualtrain.network.arithmetic import HeadKind


class DualConfig(PretrainedConfig):
    """Sizes and constants of a dual-objective language model.

    The defaults are the paper's 470M model. Attributes can be read and set by transformers' own
    names (``hidden_size``, ...), too; arguments and ``config.json`` have the names below.

    Args:
        vocab_size: Rows of the embedding and of the output matrix.
        width: Width of the residual stream.
        layers: Transformer blocks.
        heads: Attention heads; ``width`` is divisible by them.
        mlp_width: Hidden width of the SwiGLU MLP.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of RMSNorm.
        head: ``paper``: norm, linear, GELU, linear with bias; ``linear``: Llama's layout.
        sequence_length: Tokens of a training sequence. Longer rows work too.
        bos_token_id: ``<s>``, which begins each document.
        eos_token_id: ``</s>``.
        pad_token_id: ``<pad>``.
        mask_token_id: ``<mask>``, in place of a token the model is to predict.
        **kwargs: What ``PretrainedConfig`` takes.

    Raises:
        UserError: The heads do not divide the width into parts of even size, or ``head`` is
            unknown.
    """

    model_type = "dualtrain"
    # Names that tools around transformers look for.
    attribute_map = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "heads",
        "intermediate_size": "mlp_width",
        "rms_norm_eps": "norm_eps",
        "max_position_embeddings": "sequence_length",
    }

    def __init__(
        self,
        vocab_size: int = 51_200,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        mlp_width: int = 3554,
        rope_theta: float = 160_000.0,
        norm_eps: float = 1e-7,
        head: HeadKind = "paper",
        sequence_length: int = 2048,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = 3,
        mask_token_id: int = 4,
        **kwargs,  # a type would have to fit all that PretrainedConfig takes
    ) -> None:
        # Untied always; transformers 4 would assume tied. A config.json may repeat the key.
        kwargs["tie_word_embeddings"] = False
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        self.vocab_size = vocab_size
        self.width = width
        self.layers = layers
        self.heads = heads
        self.mlp_width = mlp_width
        self.rope_theta = rope_theta
        self.norm_eps = norm_eps
        self.head = head
        self.sequence_length = sequence_length
        self.mask_token_id = mask_token_id
        if width % (2 * heads):
            raise UserError(
                "model.heads",
                f"{heads} heads do not divide width {width} into parts of even size",
                "width to be a multiple of 2 * heads (rotary embeddings turn pairs)",
            )
        if head not in ("paper", "linear"):
            raise UserError("model.head", f"{head!r}", "paper or linear")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads
