"""A model as the samplers see it: how to call it, and what its token ids mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dualtrain.generate.choose import banned_tokens
from dualtrain.model.handle import ModelHandle, Target, inference
from dualtrain.network.attention import AttentionPlan
from dualtrain.network.output import DualOutput


def is_in_lockstep() -> bool:
    """Whether other ranks make the same passes: under ZeRO 3 they gather the parameters together.

    Then the number of passes must not depend on what is drawn: one rank that stopped early would
    leave the others waiting.
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class TextModel:
    """What generating text takes.

    Attributes:
        forward: ``DualLM``, a DeepSpeed engine around one, or a ``TrainedModel``.
        context: The longest row it reads, in tokens.
        vocab_size: Ids from here on are padding of the embedding and never produced.
        begin_id: ``<s>``, which begins each document.
        special_ids: No text: never produced, but for those that may end one.
        stop_ids: What ends a text that is written from left to right.
        mask_id: Stands for a token that is to be filled in; None where the model has none.
        target: What its diffusion objective predicts at i: token i+1, or i.
        lockstep: Whether other ranks make the same passes; false of a model that each has whole.
    """

    forward: Callable[..., DualOutput]
    context: int
    vocab_size: int
    begin_id: int
    special_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    mask_id: int | None = None
    target: Target = "next"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    lockstep: bool = field(default_factory=is_in_lockstep)

    @classmethod
    def of(cls, model: ModelHandle) -> TextModel:
        """Describe a model."""
        vocabulary = model.vocabulary
        return cls(
            forward=model,
            context=model.context,
            vocab_size=vocabulary.size,
            begin_id=vocabulary.bos_id,
            special_ids=vocabulary.special_ids,
            stop_ids=vocabulary.stop_ids,
            mask_id=vocabulary.mask,
            target=model.target,
            device=model.device,
            dtype=model.dtype,
            lockstep=model.world_size > 1,
        )

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Without gradients, and uncompiled: every pass would need a graph for its own shape."""
        model = self.forward
        with inference(model.model if isinstance(model, ModelHandle) else model):
            yield

    def logits(
        self,
        rows: Tensor,
        plan: AttentionPlan,
        selection: Tensor,
        *,
        positions: Tensor | None = None,
        may_stop: bool,
    ) -> Tensor:
        """Run the model, and rule out what must never be produced.

        Args:
            rows: (B, T) int64 token ids.
            selection: (N,) int64: which of the B * T positions are asked.
            positions: (B, T) int64, see ``DualLM.forward``.
            may_stop: Whether the tokens that end a text are allowed.

        Returns:
            (N, V) float32 on the device.
        """
        options = {} if positions is None else {"positions": positions}
        output = self.forward(
            rows.to(self.device), attention=plan, selection=selection.to(self.device), **options
        )
        assert output.logits is not None  # no targets ask for them
        logits = output.logits.float()
        ids = {*self.special_ids, *(() if self.mask_id is None else (self.mask_id,))}
        if may_stop:
            ids -= set(self.stop_ids)
        banned = banned_tokens(logits.shape[-1], self.vocab_size, tuple(sorted(ids)), logits.device)
        return logits.masked_fill(banned, -torch.inf)


def fill_up(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Put rows of different lengths into one tensor.

    Returns:
        (B, T) int64, filled up with 0 behind each row, and (B, T) int32, 0 for the row and 1 for
        what fills it up: another document, which the row does not see.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width)[None, :] >= lengths[:, None]).int()
