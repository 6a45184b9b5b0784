"""A decoder of Hugging Face's transformers, trained and used like ``DualLM``.

Nothing of its architecture is touched: its attention layers ask a function that is registered with
transformers, and that function asks the micro-batch's :class:`AttentionPlan`, which comes to it
through the model's keyword arguments. The plan alone decides who sees whom, so transformers makes
no masks; and as plans can keep keys and values (``cache``), its caches are never used.

Shapes: B rows, T positions, W width, H query heads and G key heads of size D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig

from dualtrain.common.randomness import generator
from dualtrain.engine.parameters import muon_parameter_names
from dualtrain.model.imported_config import remove_dropout
from dualtrain.network.arithmetic import ModelSizes
from dualtrain.network.attention import AttentionPlan, plan_rows
from dualtrain.network.loss import OutputLayer
from dualtrain.network.norms import exempt_norms
from dualtrain.network.output import DualOutput, head_output

ATTENTION = "dualtrain"
"""Name of the attention function in transformers."""

# What published weights call the output matrix; transformers 5 has renamed Pythia's in memory only.
_HEADS = {"gpt_neox": "embed_out"}


class ImportedLM(nn.Module):
    """A decoder with the forward pass of ``DualLM``.

    Its parameters have the names of the published weights, so that a state dict needs no
    conversion; tied matrices appear once, as the embedding.

    Args:
        config: Of a family in ``imported_config.FAMILIES``; its dropout becomes 0.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        remove_dropout(config)
        config._attn_implementation = ATTENTION
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # An embedding that knows of padding gives that row no gradient, and some models' is their
        # `</s>`; and transformers would set the row to 0 where ZeRO-3 keeps none of them.
        padding, config.pad_token_id = config.pad_token_id, None
        model = model_class(config)
        config.pad_token_id = padding
        config.architectures = [model_class.__name__]
        self.config = config
        self.base_model_prefix: str = model.base_model_prefix
        self._head_name = _HEADS.get(config.model_type, "lm_head")
        self.add_module(self.base_model_prefix, model.base_model)
        exempt_norms(self)
        head = model.get_output_embeddings()
        head.__class__ = OutputLayer  # the same matrix, with the loss inside
        self.add_module(self._head_name, head)

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
        """As ``DualLM.forward``."""
        hidden = self.body(
            input_ids=input_ids,
            position_ids=positions,
            use_cache=False,
            attention_plan=plan_rows(input_ids) if attention is None else attention,
        ).last_hidden_state
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
        """Nothing: the body has applied its norm."""
        return hidden

    @property
    def body(self) -> Any:
        """transformers' model without its output matrix."""
        return self.get_submodule(self.base_model_prefix)

    @property
    def blocks(self) -> nn.ModuleList:
        return next(part for part in self.body.children() if isinstance(part, nn.ModuleList))

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass recomputes each block instead of keeping its activations."""
        return bool(self.blocks[0].gradient_checkpointing)

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for block in cast("list[Any]", self.blocks):
            block.gradient_checkpointing = value
            block._gradient_checkpointing_func = recompute

    def compile_blocks(self) -> None:
        """Compile each block in place: one graph per kind of attention, shared by all blocks."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.body.get_input_embeddings()

    def get_output_embeddings(self) -> OutputLayer:
        return cast(OutputLayer, self.get_submodule(self._head_name))

    def renew_rotary(self) -> None:
        """Compute the rotary frequencies anew, where the model has some.

        They are buffers, which casting the model to bf16 would round, materialising it from the
        meta device leave empty, and DeepSpeed's ``zero.Init`` make in bf16.
        """
        rotary = getattr(self.body, "rotary_emb", None)
        if rotary is None or rotary.inv_freq.is_meta:
            return
        device = rotary.inv_freq.device
        for name, buffer in type(rotary)(self.config).named_buffers():
            rotary.register_buffer(name, buffer.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImportedLM:
        """Move or cast the model, as every such method of a module does."""
        super()._apply(fn, recurse)
        if self.config.tie_word_embeddings:
            # Materialising from the meta device makes two parameters of one.
            self.get_output_embeddings().weight = self.get_input_embeddings().weight
        self.renew_rotary()
        return self


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_plan: AttentionPlan,
    scaling: float | None = None,
    **_: object,  # what families pass to other attention functions
) -> tuple[Tensor, None]:
    """Attend as the plan says; transformers' attention layers call this.

    Args:
        query: (B, H, T, D), rotated.
        key: (B, G, T, D), rotated; each of its heads serves H / G of the query's.
        value: (B, G, T, D).
        attention_mask: Always None, as there is no mask function of this name.
        scaling: Factor on the products of queries and keys; None is 1 / sqrt(D).

    Returns:
        (B, T, H, D), and None for the weights, which no plan keeps.
    """
    del module, attention_mask
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    usual = query.shape[-1] ** -0.5
    if scaling is not None and not math.isclose(scaling, usual, rel_tol=1e-6):
        query = query * (scaling / usual)  # plans know the usual one only
    # Under autocast rotation makes float32 of what the projections gave.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return attention_plan.attend(*(part.transpose(1, 2) for part in (query, key, value))), None


AttentionInterface.register(ATTENTION, attend)


@torch.no_grad()
def initial_values(config: PretrainedConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Draw initial weights from the distributions that transformers has for this family.

    A block at a time, each from a generator of its own: so values depend neither on the device nor
    on how parameters are divided over ranks, and no more than a block exists here.

    Yields:
        Name and fp32 values of every parameter, on the CPU.
    """
    with torch.device("meta"):
        twin = ImportedLM(config)
    wanted = {name for name, _ in twin.named_parameters()}
    for prefix, unit in _units(twin):
        names = [f"{prefix}.{name}" for name, _ in unit.named_parameters()]
        if wanted.isdisjoint(names):
            continue  # a tied output matrix
        unit.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            number = int(generator(seed, f"initial values of {prefix}").integers(2**63))
            torch.default_generator.manual_seed(number)
            # What a module says of its own children comes after what they say themselves.
            for module in reversed(list(unit.modules())):
                twin.body._init_weights(module)
        yield from zip(names, (values.detach() for values in unit.parameters()), strict=True)
        unit.to("meta")


def _units(model: ImportedLM) -> Iterator[tuple[str, nn.Module]]:
    """The blocks, and every module beside them that has parameters of its own, by name."""
    blocks = {id(block) for block in model.blocks}
    inside = {id(module) for block in model.blocks for module in block.modules()}
    for name, module in list(model.named_modules()):
        owns = next(module.parameters(recurse=False), None) is not None
        if id(module) in blocks or (owns and id(module) not in inside):
            yield name, module


def imported_sizes(config: PretrainedConfig) -> ModelSizes:
    """Read the sizes of a model off its parameters, without memory for them."""
    with torch.device("meta"):
        model = ImportedLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    mlp_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return ModelSizes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=mlp_width or 4 * config.hidden_size,
        attention_width=heads * head_size,
        shapes=shapes,
        vocabulary=tuple(dict.fromkeys(names[id(end)] for end in ends)),
        matrices=tuple(muon_parameter_names(model)),
    )
