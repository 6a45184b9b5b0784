"""What the ids of a tokenizer mean beside text: for training, scoring and generating alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a tokenizer that are not text.

    Attributes:
        size: Ids from here on are padding of the embedding.
        special_ids: All that are no text, the mask token among them; never masked, never produced.
        bos_id: ``<s>``, which begins each document.
        eos_id: ``</s>``.
        mask: ``<mask>``; None in a model from elsewhere that has none, and then no mode that masks.
        stop_ids: What ends a text: its own end, or, in imported models, the beginning of the next.
    """

    size: int
    special_ids: tuple[int, ...]
    bos_id: int
    eos_id: int
    mask: int | None
    stop_ids: tuple[int, ...] = ()

    @property
    def mask_id(self) -> int:
        """The mask token, where it is known that there is one."""
        assert self.mask is not None
        return self.mask
