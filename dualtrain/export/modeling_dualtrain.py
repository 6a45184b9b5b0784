"""A model trained by dualtrain, for transformers: autoregressive, prefix and masked diffusion.

Self-contained: copied as it is into exported models, and loaded from there by
``AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)``, or as ``AutoModel``,
``AutoModelForMaskedLM`` or ``AutoModelForSequenceClassification``, which read whole rows at once.
Works with transformers 4.53 and newer, 5 included.

One network predicts token i+1 at position i, whatever it is asked: causally, over a prompt that
sees itself in both directions, or at masked tokens with everything around them.

    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=50)
    model.generate_prefix(**tokenizer(text, return_tensors="pt"), max_new_tokens=50)
    model.generate_diffusion(**tokenizer(text, return_tensors="pt"), max_new_tokens=50)
    model.infill(**tokenizer("She <mask><mask><mask> and smiled.", return_tensors="pt"))

Rows of different lengths are padded on the left (or right, where nothing is generated), with an
attention mask as usual. Shapes: B rows, T new positions, S positions with those in the cache, W
width, V vocabulary; H heads of size D.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

Kind = Literal["causal", "full", "prefix"]
Order = Literal["confidence", "left_to_right", "random"]

# Newer versions of transformers call it `cache`.
_CACHE_FIELD = next(
    field.name
    for field in fields(CausalLMOutputWithPast)
    if field.name in ("past_key_values", "cache")
)


class DualTrainConfig(PretrainedConfig):
    """Sizes and constants of a dual-objective language model.

    Args:
        vocab_size: Rows of the embedding and of the output matrix.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Transformer blocks.
        num_attention_heads: Attention heads.
        intermediate_size: Hidden width of the SwiGLU MLP.
        max_position_embeddings: Tokens of a training sequence.
        rms_norm_eps: Epsilon of RMSNorm.
        rope_theta: Base of the rotary frequencies.
        head: ``paper``: norm, linear, GELU, linear with bias; ``linear``: norm, linear.
        diffusion_target: What position i predicts under full attention: the ``next`` token, or the
            one ``in_place``.
        masked_logits: What ``AutoModelForMaskedLM`` gives at position i: logits of the ``next``
            token, or of the one ``in_place``; None: as ``diffusion_target``.
        classifier_dropout: In the head for classification.
        mask_token_id: Stands for a masked token.
        bos_token_id: Begins each document.
        eos_token_id: Ends a text.
        pad_token_id: Fills rows up.
        use_cache: Whether keys and values are kept for the next token unless a call says otherwise.
        **kwargs: What ``PretrainedConfig`` takes.
    """

    model_type = "dualtrain"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 51_200,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 3554,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-7,
        rope_theta: float = 160_000.0,
        head: str = "paper",
        diffusion_target: str = "next",
        masked_logits: str | None = None,
        classifier_dropout: float = 0.1,
        mask_token_id: int = 4,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = 3,
        use_cache: bool = True,
        **kwargs,
    ) -> None:
        kwargs["tie_word_embeddings"] = False
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.head = head
        self.diffusion_target = diffusion_target
        self.masked_logits = masked_logits
        self.classifier_dropout = classifier_dropout
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache

    @classmethod
    def get_config_dict(cls, *arguments, **options):
        """Read a configuration; one written for Llama describes a model with the linear head."""
        values, options = super().get_config_dict(*arguments, **options)
        if values.get("model_type") == "llama":
            values = {**values, "model_type": cls.model_type}
        return values, options


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with gain, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        gain = self.weight.to(exact)
        return F.rms_norm(hidden.to(exact), gain.shape, gain, self.eps).to(hidden.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; no biases."""

    def __init__(self, config: DualTrainConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer, self.head_size = layer, width // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, hidden: Tensor, rotary: tuple, cache, seen: Tensor | None, causal: bool):
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, rotary), _rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = F.scaled_dot_product_attention(query, key, value, seen, is_causal=causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated MLP."""

    def __init__(self, config: DualTrainConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DualTrainConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden: Tensor, *attention) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *attention)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DualTrainPreTrainedModel(PreTrainedModel):
    """What all classes of this file share."""

    config: DualTrainConfig
    config_class = DualTrainConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # Older versions of transformers leave what no file holds, such as a new classifier, as
        # the memory was; newer ones do the same as this.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class DualTrainModel(DualTrainPreTrainedModel):
    """Embedding and blocks, and the norm that the head applies."""

    # Of a checkpoint for a language model.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^head_projection\."]

    def __init__(self, config: DualTrainConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    # Older versions of transformers find these by themselves in models of their own only.
    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        attention: Kind = "full",
        prefix_lengths: Tensor | None = None,
    ) -> BaseModelOutput:
        """Compute the hidden states that a head reads, of rows that are seen whole.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 0 where a row is filled up; or (B, T, T), 0 where the second
                position is not seen by the first.
            position_ids: As for the causal model.
            inputs_embeds: (B, T, W), in place of ``input_ids``.
            output_hidden_states: Return the residual stream before and after each block; None: as
                the configuration has it.
            attention: ``causal``, ``full``, or ``prefix`` with ``prefix_lengths``.
            prefix_lengths: As for the causal model.

        Returns:
            ``last_hidden_state``, (B, T, W), after the last norm.

        Raises:
            ValueError: Arguments that do not fit one another.
        """
        hidden = self.embed(input_ids, inputs_embeds)
        stream = self.stream(hidden, attention, attention_mask, prefix_lengths, position_ids)
        states = self.last_of(stream, output_hidden_states)
        kept: Any = tuple(states) if len(states) > 1 else None
        return BaseModelOutput(last_hidden_state=self.norm(states[-1]), hidden_states=kept)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return what enters the first block, (B, T, W).

        Raises:
            ValueError: Both are given, or none.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds is needed")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def stream(
        self,
        hidden: Tensor,
        kind: Kind,
        attention_mask: Tensor | None,
        prefix_lengths: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
    ) -> Iterator[Tensor]:
        """Yield the (B, T, W) residual stream before and after each block; see :meth:`forward`."""
        cached = 0 if cache is None else cache.get_seq_length()
        seen, causal = _visibility(kind, hidden, cached, attention_mask, prefix_lengths)
        if position_ids is None:
            position_ids = _count(hidden, cached, attention_mask)
        rotary = _rotary_tables(self.config, position_ids)
        yield hidden
        for block in self.layers:
            hidden = block(hidden, rotary, cache, seen, causal)
            yield hidden

    def last_of(self, stream: Iterator[Tensor], output_hidden_states: bool | None) -> deque[Tensor]:
        """Run a stream; return all of it where that is asked for, else its end."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return deque(stream, maxlen=None if output_hidden_states else 1)


class LanguageModel(DualTrainPreTrainedModel):
    """The network with its head, whose logits at position i are those of token i+1."""

    def __init__(self, config: DualTrainConfig) -> None:
        super().__init__(config)
        paper = config.head == "paper"
        self.model = DualTrainModel(config)
        if paper:
            self.head_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=paper)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits, (..., V) of (..., W)."""
        hidden = self.model.norm(hidden)
        if self.config.head == "paper":
            hidden = F.gelu(self.head_projection(hidden), approximate="tanh")
        return self.lm_head(hidden)


class DualTrainForCausalLM(LanguageModel, GenerationMixin):
    """A language model that reads causally, over a bidirectional prompt, or with full attention."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        attention: Kind | None = None,
        prefix_lengths: Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), 0 where a row is filled up.
            position_ids: (B, T) for the rotary embedding; None counts each row's own tokens.
            past_key_values: What an earlier call returned; its keys and values come first.
            inputs_embeds: (B, T, W), in place of ``input_ids``.
            labels: (B, T) int64, the tokens of the input with -100 where nothing is to be learned.
            use_cache: Return keys and values; None: as the configuration has it. Under full
                attention there are none.
            logits_to_keep: The last so many positions, or these, only; 0: all.
            output_hidden_states: Return the residual stream before and after each block; None: as
                the configuration has it.
            attention: ``causal``, ``full`` or ``prefix``; None: prefix with ``prefix_lengths``,
                else causal.
            prefix_lengths: (B,) int64, tokens of each row, padding not counted, that all see each
                other; those after them see them and what is before.
            cache: Another name of ``past_key_values``.
            **kwargs: For the loss function.

        Raises:
            ValueError: Arguments that do not fit one another.
        """
        cache = past_key_values if cache is None else cache
        kind = attention or ("causal" if prefix_lengths is None else "prefix")
        if kwargs.get("output_attentions"):
            raise ValueError("attention weights are not returned")
        hidden = self.model.embed(input_ids, inputs_embeds)
        if kind == "full":
            if use_cache or (cache is not None and cache.get_seq_length()):
                raise ValueError("under full attention later tokens change earlier ones: no cache")
            cache = None
        elif cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        stream = self.model.stream(
            hidden, kind, attention_mask, prefix_lengths, position_ids, cache
        )
        states = self.model.last_of(stream, output_hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(states[-1][:, kept])
        loss = None
        if labels is not None:
            if kind == "full" and self.config.diffusion_target == "in_place":
                kwargs["shift_labels"] = labels
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output: dict[str, Any] = {"loss": loss, "logits": logits, _CACHE_FIELD: cache}
        if len(states) > 1:
            output["hidden_states"] = tuple(states)
        return CausalLMOutputWithPast(**output)

    def generate_prefix(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options
    ) -> Any:
        """Continue prompts that see themselves in both directions.

        Args:
            input_ids: (B, T) int64, padded on the left.
            attention_mask: (B, T), 0 where a row is filled up; None: nowhere.
            **options: As for ``generate``.

        Returns:
            What ``generate`` returns, (B, T and new tokens) int64 unless asked otherwise.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.generate(
            input_ids,
            attention_mask=attention_mask,
            prefix_lengths=attention_mask.sum(-1),
            **options,
        )

    @torch.no_grad()
    def generate_diffusion(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        **options,
    ) -> Tensor:
        """Continue prompts with masked tokens, which are then filled in.

        Args:
            input_ids: (B, T) int64, padded on the left. Masked tokens in it are filled, too.
            attention_mask: (B, T), 0 where a row is filled up; None: nowhere.
            max_new_tokens: Length of the continuation: diffusion knows no end of a text.
            **options: As for :meth:`infill`.

        Returns:
            (B, T + max_new_tokens) int64.
        """
        masks = input_ids.new_full((len(input_ids), max_new_tokens), self.config.mask_token_id)
        ids = torch.cat([input_ids, masks], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(masks)], dim=1)
        return self.infill(ids, attention_mask, **options)

    @torch.no_grad()
    def infill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        steps: int | None = None,
        block_length: int | None = None,
        order: Order = "confidence",
        temperature: float = 0.8,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Fill every masked token, reading whole rows at each step.

        Each step predicts all masked tokens of a block and keeps an equal share of them.

        Args:
            input_ids: (B, T) int64 with ``config.mask_token_id`` where text is wanted.
            attention_mask: (B, T), 0 where a row is filled up; None: nowhere.
            steps: Passes of the model in all; None: one for each masked token, never more.
            block_length: Masked tokens that are filled before any behind them; None: all.
            order: Which predictions are kept first: the most probable, the leftmost, or random.
            temperature: Divides the logits; 0 takes the likeliest token.
            generator: Of random numbers; None: torch's own.

        Returns:
            (B, T) int64.

        Raises:
            ValueError: A masked token begins its row and no position predicts it; fewer steps than
                blocks.
        """
        ids = input_ids.clone()
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        masked = (ids == self.config.mask_token_id) & (real != 0)
        shift = int(self.config.diffusion_target == "next")
        if shift and bool((masked & ((real != 0).cumsum(1) == 1)).any()):
            raise ValueError("a row begins with a masked token: put bos_token_id before it")
        number = masked.cumsum(1)
        plans = [_plan_passes(count, steps, block_length) for count in masked.sum(1).tolist()]
        for step in range(max(map(len, plans))):
            now = [plan[step] if step < len(plan) else (0, 0) for plan in plans]
            reach, kept = torch.tensor(now, device=ids.device).T[..., None]
            open_ = masked & (number <= reach)
            # A masked token is read where it is, or one position before it.
            stream = self.model.stream(self.model.embed_tokens(ids), "full", real)
            hidden = deque(stream, maxlen=1)[0]
            logits = self.head(hidden[open_.roll(-shift, 1)]).float()
            tokens, priority = _draw(self._allowed(logits), order, temperature, generator)
            chosen = _highest(open_, priority, kept)
            ids[chosen] = ids.masked_scatter(open_, tokens)[chosen]
            masked &= ~chosen
        return ids

    def _allowed(self, logits: Tensor) -> Tensor:
        """Put tokens that are no text at minus infinity: training never masks them."""
        settings: Any = self.generation_config
        eos = settings.eos_token_id
        ends = eos if isinstance(eos, (list, tuple)) else [eos]
        named = [settings.bos_token_id, settings.pad_token_id, self.config.mask_token_id]
        banned = {*(settings.suppress_tokens or ()), *ends, *named} - {None}
        return logits.index_fill(-1, torch.tensor(sorted(banned), device=logits.device), -torch.inf)


class DualTrainForMaskedLM(LanguageModel):
    """A language model that reads rows whole and predicts their masked tokens."""

    def __init__(self, config: DualTrainConfig) -> None:
        if config.masked_logits not in (None, "next", "in_place"):
            raise ValueError(f"masked_logits: {config.masked_logits!r}, expected next or in_place")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Compute logits where ``config.masked_logits`` says, and the loss if there are labels.

        A position that none predicts has logits of 0.

        Args:
            input_ids: (B, T) int64 with ``config.mask_token_id`` for masked tokens.
            attention_mask: As for :class:`DualTrainModel`.
            position_ids: As for the causal model.
            inputs_embeds: (B, T, W), in place of ``input_ids``.
            labels: (B, T) int64, masked tokens where they stand, and -100 elsewhere.
            output_hidden_states: As for :class:`DualTrainModel`.
            **kwargs: For the loss function.

        Raises:
            ValueError: Arguments that do not fit one another.
        """
        hidden = self.model.embed(input_ids, inputs_embeds)
        stream = self.model.stream(hidden, "full", attention_mask, None, position_ids)
        states = self.model.last_of(stream, output_hidden_states)
        logits: Any = self.head(states[-1])
        in_place = logits
        trained = self.config.diffusion_target
        wanted = self.config.masked_logits or trained
        if trained == "next" and (wanted == "in_place" or labels is not None):
            in_place = F.pad(logits[:, :-1], (0, 0, 1, 0))
        loss: Any = None
        if labels is not None:
            if trained == "next":
                labels = F.pad(labels[:, 1:], (1, 0), value=-100)
            loss = self.loss_function(
                logits=in_place, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if wanted == "in_place":
            logits = in_place
        elif trained == "in_place":
            logits = F.pad(logits[:, 1:], (0, 0, 0, 1))
        kept: Any = tuple(states) if len(states) > 1 else None
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=kept)


class DualTrainForSequenceClassification(DualTrainPreTrainedModel):
    """Classes of rows that are read whole, from the hidden state of their first token, ``<s>``."""

    def __init__(self, config: DualTrainConfig) -> None:
        super().__init__(config)
        self.model = DualTrainModel(config)
        width = config.hidden_size
        self.classifier = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(config.classifier_dropout),
            nn.Linear(width, config.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Compute (B, ``config.num_labels``) logits, and the loss if there are labels.

        Args:
            input_ids: (B, T) int64.
            attention_mask: As for :class:`DualTrainModel`.
            position_ids: As for the causal model.
            inputs_embeds: (B, T, W), in place of ``input_ids``.
            labels: (B,) int64 classes; of other types as ``config.problem_type`` has them.
            output_hidden_states: As for :class:`DualTrainModel`.
            **kwargs: For the loss function.

        Raises:
            ValueError: Arguments that do not fit one another.
        """
        hidden = self.model.embed(input_ids, inputs_embeds)
        stream = self.model.stream(hidden, "full", attention_mask, None, position_ids)
        states = self.model.last_of(stream, output_hidden_states)
        rows = torch.arange(len(hidden), device=hidden.device)
        first = torch.zeros_like(rows)
        if attention_mask is not None:
            first = _real(attention_mask).int().argmax(-1).to(rows.device)
        logits = self.classifier(self.model.norm(states[-1][rows, first]))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        kept: Any = tuple(states) if len(states) > 1 else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=kept)


def _visibility(
    kind: Kind,
    hidden: Tensor,
    cached: int,
    attention_mask: Tensor | None,
    prefix_lengths: Tensor | None,
) -> tuple[Tensor | None, bool]:
    """Say which keys each query sees: (B or 1, 1, T, S) bool, or None and the kernel's causal flag.

    Raises:
        ValueError: An unknown kind; prefix lengths missing, or given for another kind; an attention
            mask of another length.
    """
    if kind not in ("causal", "full", "prefix"):
        raise ValueError(f"unknown attention {kind!r}, expected causal, full or prefix")
    if (prefix_lengths is None) == (kind == "prefix"):
        raise ValueError("prefix_lengths belong to prefix attention, and to no other kind")
    rows, length, device = hidden.shape[0], hidden.shape[1], hidden.device
    total = cached + length
    if attention_mask is not None and not (
        attention_mask.shape == (rows, total)
        or (not cached and attention_mask.shape == (rows, total, total))
    ):
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {shape}, expected {(rows, total)}")
    # Looking at it makes a GPU wait, which for one token is not worth it.
    if length > 1 and attention_mask is not None and bool((attention_mask != 0).all()):
        attention_mask = None
    if attention_mask is None and kind == "full":
        return None, False
    if attention_mask is None and kind == "causal" and (cached == 0 or length == 1):
        return None, length > 1
    key = torch.arange(total, device=device)
    query = key[cached:, None]
    if attention_mask is None:
        attention_mask = torch.ones(1, total, dtype=torch.bool, device=device)
    allowed = attention_mask.to(device) != 0
    if allowed.ndim == 2:
        allowed = allowed[:, None]
    seen = (key <= query)[None]
    if kind == "full":
        seen = torch.ones_like(seen)
    elif prefix_lengths is not None:
        number = _real(attention_mask.to(device)).cumsum(-1) - 1
        lengths = torch.as_tensor(prefix_lengths, device=device).view(-1, 1)
        seen = seen | (number < lengths)[:, None]
    # Padding sees itself: a query that sees nothing would give NaN.
    return ((seen & allowed) | (key == query))[:, None], False


def _real(attention_mask: Tensor) -> Tensor:
    """Return which tokens are no padding, (B, S) bool; in a mask of pairs they see themselves."""
    if attention_mask.ndim == 3:
        attention_mask = attention_mask.diagonal(dim1=-2, dim2=-1)
    return attention_mask != 0


def _count(hidden: Tensor, cached: int, attention_mask: Tensor | None) -> Tensor:
    """Return (B or 1, T) positions of the new tokens, counted without padding."""
    if attention_mask is None:
        return torch.arange(cached, cached + hidden.shape[1], device=hidden.device)[None]
    counted = _real(attention_mask).long().cumsum(-1) - 1
    return counted.clamp(min=0)[:, cached:]


def _rotary_tables(config: DualTrainConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the rotary angles: two (B or 1, 1, T, D / 2) float32 tensors."""
    size = config.hidden_size // config.num_attention_heads
    even = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (config.rope_theta ** (even / size))
    angle = (positions.float()[..., None] * frequency)[:, None]
    return angle.cos(), angle.sin()


def _rotate(vectors: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + D / 2) of (B, H, T, D) queries or keys by its angle, in float32."""
    cos, sin = rotary
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(vectors.dtype)


def _draw(
    logits: Tensor, order: Order, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of (N, V) logits, and say which are to be kept first.

    Returns:
        (N,) int64 tokens, and (N,) float32 priorities, the highest first.
    """
    if order not in ("confidence", "left_to_right", "random"):
        raise ValueError(f"unknown order {order!r}, expected confidence, left_to_right or random")
    device = logits.device if generator is None else generator.device
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probabilities = (logits / temperature).softmax(-1).to(device)
        tokens = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
    if order == "left_to_right":
        return tokens, -torch.arange(len(tokens), dtype=torch.float32, device=logits.device)
    if order == "random":
        numbers = torch.rand(len(tokens), generator=generator, device=device)
        return tokens, numbers.to(logits.device)
    # The model's own probability, whatever the temperature: how sure it is of this token.
    return tokens, logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _plan_passes(masks: int, steps: int | None, block_length: int | None) -> list[tuple[int, int]]:
    """Share the masked tokens of a row among the steps: blocks by their length, then evenly.

    Returns:
        For each step how many of the row's masked tokens its block and those before it have, and
        how many of them it fills.

    Raises:
        ValueError: No step, an empty block, or fewer steps than blocks.
    """
    if (steps is not None and steps < 1) or (block_length is not None and block_length < 1):
        raise ValueError("steps and block_length are 1 or more")
    size = min(block_length or masks, masks)
    blocks = [min(size, masks - begin) for begin in range(0, masks, size or 1)]
    left = masks if steps is None else min(steps, masks)
    if left < len(blocks):
        raise ValueError(f"{steps} steps for {len(blocks)} blocks, expected at least one each")
    passes, begin = [], 0
    for place, length in enumerate(blocks):
        behind = masks - begin - length
        most = min(length, left - (len(blocks) - place - 1))
        share = max(1, left - behind, min(most, round(left * length / (length + behind))))
        begin, left = begin + length, left - share
        fills = [length // share + (step < length % share) for step in range(share)]
        passes += [(begin, count) for count in fills]
    return passes


def _highest(masked: Tensor, priority: Tensor, kept: Tensor) -> Tensor:
    """Choose in each row the masked tokens of the highest priority.

    Args:
        masked: (B, T) bool, with N of them.
        priority: (N,) float32.
        kept: (B, 1) int64, how many.
    """
    everywhere = torch.full(masked.shape, -torch.inf, device=masked.device)
    everywhere = everywhere.masked_scatter(masked, priority)
    # Stable, so that of equals the leftmost comes first.
    place = everywhere.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return masked & (place < kept)
