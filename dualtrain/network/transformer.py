"""The transformer: Llama's body, and one of two heads.

The same network with the same head predicts token i+1 at position i, causally from clean input or
with full attention from partly masked input; only the attention plan and the input differ.

Parameters are named as in ``LlamaForCausalLM``. Inside the body everything is (B, T, W): B rows,
T positions, W width; H heads of size D.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualtrain.network.attention import AttentionPlan, plan_rows
from dualtrain.network.config import DualConfig
from dualtrain.network.initialize import initialize_parameter
from dualtrain.network.loss import OutputLayer, compute_type
from dualtrain.network.output import DualOutput, head_output

Rotary = tuple[Tensor, Tensor]

# Tensor cores want rows of whole 16 bytes, which are so many numbers in half precision.
_ALIGNED = 8
# What the MLP's width is filled up to a multiple of where it is not aligned.
_TILE = 64


class Linear(nn.Linear):
    """A matrix without bias, whose memory ``DualLM`` fills."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """A table of vectors, whose memory ``DualLM`` fills."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with gain, computed in float32 whatever comes in."""

    keeps_float32 = True

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        # Casting here, not in rms_norm: torch 2.6 would round before it multiplies by the gain.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        gain = self.weight.to(exact)
        return F.rms_norm(hidden.to(exact), gain.shape, gain, self.eps).to(hidden.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; no biases."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.head_size = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, rotary: Rotary, plan: AttentionPlan) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_size))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = plan.attend(rotate(query, rotary), rotate(key, rotary), value)
        return self.o_proj(mixed.flatten(2))


class SwiGLU(nn.Module):
    """The gated MLP."""

    may_pack = True
    """Whether the weights are there outside of their own modules; not at ZeRO stage 3."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and self.packs(hidden.device, compute_type(hidden)):
            return self.packed(hidden)
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a compiled block computes as :meth:`packed` does.

        At widths such as 3554 Inductor would pad every product by itself, and for that write the
        weights and two gradients again in each of them. Uncompiled, packing is only more to launch.
        """
        is_odd = self.down_proj.in_features % _ALIGNED != 0
        return self.may_pack and is_odd and device.type == "cuda" and dtype.itemsize == 2

    def packed(self, hidden: Tensor) -> Tensor:
        """Compute the same with gate and up as one product, all widths filled up with zeros.

        A column of zeros in both gives silu(0) * 0, which meets a column of zeros in turn.
        """
        spare = -self.down_proj.in_features % _TILE
        gate, up = (F.pad(m.weight, (0, 0, 0, spare)) for m in (self.gate_proj, self.up_proj))
        gated, linear = F.linear(hidden, torch.cat((gate, up))).chunk(2, dim=-1)
        return F.linear(F.silu(gated) * linear, F.pad(self.down_proj.weight, (0, spare)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden: Tensor, *, rotary: Rotary, plan: AttentionPlan) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, plan)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Body(nn.Module):
    """Embedding and blocks. The norm is applied by the head, to the positions that need it."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, *, plan: AttentionPlan, positions: Tensor | None = None
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        rotary = rotary_tables(self.config, positions)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.layers:
            # rotary and plan go by name: ZeRO-3's hooks examine positional arguments only, and
            # would warn of a type they do not know.
            if recompute:
                hidden = checkpoint(
                    block,
                    hidden,
                    rotary=rotary,
                    plan=plan,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing here is random
                )
            else:
                hidden = block(hidden, rotary=rotary, plan=plan)
        return hidden


class DualLM(nn.Module):
    """A language model with two objectives: next tokens causally, masked tokens with full context.

    Args:
        seed: Decides the initial weights, together with nothing else. On the meta device they are
            left out: call :meth:`initialize` after ``to_empty``.
    """

    def __init__(self, config: DualConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        width, is_papers = config.hidden_size, config.head == "paper"
        if is_papers:
            self.head_projection = Linear(width, width)
        self.lm_head = OutputLayer(width, config.vocab_size, bias=is_papers)
        self.initialize(seed)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention: AttentionPlan | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        z_loss: float = 0.0,
        selection: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> DualOutput:
        """Compute logits, the loss, or each position's loss.

        Args:
            attention: From :func:`plan_attention`; None is causal, each row one document.
            positions: (B, T) int64, where each token stands for the rotary embedding; None counts
                through each row, as training does.
            targets: (B, T) int64, what each position predicts; None asks for the logits. (N,)
                int64, beside a selection that may name a position more than once: the losses of
                these targets, whatever ``reduction``.
            weights: (B, T) float32, factors on the losses; None is 1 everywhere. Where one is 0
                the target may be anything.
            z_loss: Factor on the squared log-sum-exp of the logits.
            selection: (N,) int64 positions of the flattened batch, from
                :func:`select_positions`: the head runs for these only, so they must include all
                that have a weight. None selects by itself on a CPU; on other devices, where that
                would wait for the device, it means all.
            reduction: ``mean``: the loss, ``sum / (B * T)``. ``none``: each position's
                cross-entropy (unweighted, 0 where the weight is 0), without gradient.

        Returns:
            The outputs that were asked for: ``logits`` without targets, ``nll`` for ``none``,
            ``nll`` and ``is_top`` for (N,) targets, else ``loss``, ``cross_entropy`` and
            ``z_loss``.
        """
        if attention is None:
            attention = plan_rows(input_ids)
        hidden = self.model(input_ids, plan=attention, positions=positions)
        return head_output(
            self,
            hidden,
            targets=targets,
            weights=weights,
            z_loss=z_loss,
            selection=selection,
            reduction=reduction,
        )

    def prepare_head(self, hidden: Tensor) -> Tensor:
        """Apply what the head does before its output matrix."""
        hidden = self.model.norm(hidden)
        if self.config.head == "paper":
            hidden = F.gelu(self.head_projection(hidden), approximate="tanh")
        return hidden

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill every parameter with its initial values, the same ones on any device."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                initialize_parameter(name, parameter, self.config, seed)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass recomputes each block instead of keeping its activations."""
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.model.activation_checkpointing = value

    def compile_blocks(self) -> None:
        """Compile each block in place: one graph per kind of attention, shared by all blocks.

        Parameter names stay as they are, and ZeRO-3 can gather parameters between blocks, which
        it could not inside one compiled model.
        """
        for block in self.model.layers:
            block.compile(dynamic=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> OutputLayer:
        return self.lm_head


def rotary_tables(config: DualConfig, positions: Tensor) -> Rotary:
    """Compute cosines and sines of the rotary angles.

    Made anew in each forward pass rather than kept in a buffer, which casting the model to bf16
    would round, and materialising it from the meta device would leave empty.

    Returns:
        Two (T, 1, D / 2) or (B, T, 1, D / 2) float32 tensors.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (config.rope_theta ** (even / config.head_dim))
    angle = (positions.float()[..., None] * frequency)[..., None, :]
    return angle.cos(), angle.sin()


def rotate(vectors: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (i, i + D / 2) of (B, T, H, D) queries or keys by its angle.

    The tables are float32, so the products are, whatever the vectors are.
    """
    cos, sin = rotary
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(vectors.dtype)
