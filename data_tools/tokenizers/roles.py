"""Which of a tokenizer's own special tokens play the roles that a dataset needs.

A dataset knows its special tokens by role: ``<s>`` begins a document, ``</s>`` ends it, ``<mask>``
stands for what is to be predicted. BERT calls them ``[CLS]``, ``[SEP]`` and ``[MASK]``. What the
files beside a tokenizer say of its tokens comes first, then the roles' own names, then names that
published models use. ``tokenizer`` adds tokens for the roles that are left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers

from dualtrain.common.file_kinds import read_object
from dualtrain.data.dataset import DATASET_FILE, SPECIAL_TOKENS, DatasetInfo

_KEYS = {
    "<unk>": ("unk_token",),
    "<s>": ("bos_token", "cls_token"),
    "</s>": ("eos_token", "sep_token"),
    "<pad>": ("pad_token",),
    "<mask>": ("mask_token",),
}
"""What transformers calls them, in the files beside a tokenizer."""

_SEPARATOR = "<|endoftext|>"
_NAMES = {
    "<unk>": ("[UNK]", "<|unk|>", "<UNK>"),
    "<s>": (
        *("[CLS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|bos|>", "<BOS>"),
        *("<｜begin▁of▁sentence｜>", _SEPARATOR),
    ),
    "</s>": (
        *("[SEP]", "<eos>", "<|end_of_text|>", "[EOS]", "<|eos|>", "<EOS>"),
        *("<｜end▁of▁sentence｜>", _SEPARATOR),
    ),
    "<pad>": (
        *("[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>"),
        "<｜▁pad▁｜>",
    ),
    "<mask>": ("[MASK]", "<|mask|>", "<|mdm_mask|>", "<MASK>"),
}
_DESCRIPTIONS = ("special_tokens_map.json", "tokenizer_config.json")


def declared_roles(tokenizer_file: Path) -> dict[str, tuple[str, ...]]:
    """Read what the files beside a tokenizer say of its tokens.

    Returns:
        For each role the names that are given to it, the likeliest first.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in _DESCRIPTIONS:
        file = tokenizer_file.with_name(name)
        if not file.is_file():
            continue
        values = read_object(file, "a description of special tokens")
        for role, keys in _KEYS.items():
            given = (values.get(key) for key in keys)
            # Where a token has flags, it is an object.
            names = (v.get("content") if isinstance(v, dict) else v for v in given)
            found[role] = (*found.get(role, ()), *(n for n in names if isinstance(n, str)))
    return found


def recorded_ids(tokenizer_file: Path, content: bytes) -> dict[str, int] | None:
    """Ids by role if the file is the tokenizer of a dataset, which must keep them; else None."""
    if not tokenizer_file.with_name(DATASET_FILE).is_file():
        return None
    info = DatasetInfo.load(tokenizer_file.parent)
    is_its_own = info.tokenizer_sha256 == hashlib.sha256(content).hexdigest()
    return info.special_tokens if is_its_own else None


def find_roles(
    tokenizer: tokenizers.Tokenizer, declared: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """Find the token in each role that a tokenizer has a token for.

    A token has one role, but one token may both begin and end texts.

    Args:
        declared: From :func:`declared_roles`.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    found: dict[str, str] = {}
    # The separator may also be declared as padding or as unknown: what it begins counts.
    for role in ("<s>", "</s>", "<unk>", "<pad>", "<mask>"):
        shareable = {found["<s>"]} if role == "</s>" and "<s>" in found else set()
        taken = set(found.values()) - shareable
        for name in _candidates(role, declared, special, tokenizer):
            if name not in taken and tokenizer.token_to_id(name) is not None:
                found[role] = name
                break
    return {role: found[role] for role in SPECIAL_TOKENS if role in found}


def _candidates(
    role: str,
    declared: Mapping[str, tuple[str, ...]],
    special: set[str],
    tokenizer: tokenizers.Tokenizer,
) -> Iterator[str]:
    """Names for a role; ordinary tokens are only taken if their name is told, or the role's own."""
    own = getattr(tokenizer.model, "unk_token", None)
    if role == "<unk>" and own:
        yield own  # what text is given that it does not know, whatever others say
    yield from declared.get(role, ())
    yield from (name for name in (role, *_NAMES[role]) if name in special)
    yield role
