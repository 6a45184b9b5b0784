"""The tokenizer of an export, for ``AutoTokenizer``: the dataset's ids, with ``<s>`` in front.

Written by hand rather than by transformers' ``save_pretrained``, whose files of version 5 cannot be
read by version 4.

Training's tokenizer takes all text literally. In an export the names of special tokens mean these
tokens, and the text between them is to have the ids that it has inside of any other text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dualtrain.common.file_kinds import read_text
from dualtrain.data.dataset import TOKENIZER_FILE

_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
_TEMPLATE = ("bos_token", "eos_token")
_WORD = "\u2581"
"""What stands for a space in the vocabularies of SentencePiece."""

ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
"""What transformers calls the roles of a dataset's special tokens."""


def write_tokenizer(
    source: Path, directory: Path, *, special_tokens: Mapping[str, int], context: int
) -> dict[str, str]:
    """Write ``tokenizer.json`` and what ``AutoTokenizer`` reads beside it.

    Args:
        source: The ``tokenizer.json`` of the training.
        special_tokens: Ids by role, as the dataset has them.

    Returns:
        The names of the special tokens, by what transformers calls their roles.
    """
    text = read_text(source, "a tokenizer.json")
    content, tokenizer = json.loads(text), Tokenizer.from_str(text)
    ids = {key: special_tokens[role] for key, role in ROLES.items() if role in special_tokens}
    # Of added tokens, tokenizers 0.23 returns what they are normalised to, such as "▁<s>".
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    names = {key: added.get(token) or tokenizer.id_to_token(token) for key, token in ids.items()}
    mask = names.get("mask_token")
    content["post_processor"] = _begin_with(names, ids, content["post_processor"])
    content["truncation"] = content["padding"] = None
    content["added_tokens"] = _literal(content["added_tokens"], names, ids, mask)
    put_space_only_first(content)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        # Text is generated at the end of a row.
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    pre_tokenizer = content["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:
        # transformers would set it to false.
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    _write(directory / TOKENIZER_FILE, content)
    _write(directory / "tokenizer_config.json", config)
    _write(directory / "special_tokens_map.json", names)
    return names


def _literal(
    added: list[dict[str, Any]], names: Mapping[str, str], ids: Mapping[str, int], mask: str | None
) -> list[dict[str, Any]]:
    """Added tokens, of which the special ones stand for their name and for nothing around it."""
    tokens = {token["id"]: dict(token) for token in added}
    for key, name in names.items():
        tokens.setdefault(ids[key], {"id": ids[key], "content": name})["special"] = True
    for token in tokens.values():
        if token["special"]:
            token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            # Tokens carry the space before their word, so a mask stands for it, too.
            token["lstrip"] = token["content"] == mask
    return [tokens[token] for token in sorted(tokens)]


def put_space_only_first(content: dict[str, Any]) -> None:
    """Have no space put behind special tokens by a tokenizer that puts one before every text.

    It does so for each part of a text between special tokens; training's texts have one part.
    """
    if not all(token["special"] for token in content["added_tokens"]):
        return  # they divide training's texts, too
    step = content["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step] if step else []
    normalizer = content["normalizer"] or {}
    normalizers = normalizer.get("normalizers", [normalizer])
    kinds = [part.get("type") for part in normalizers[-2:]]
    if kinds == ["Prepend", "Replace"] and normalizers[-2]["prepend"] == _WORD:
        # No space is left there: the first step puts one before everything, the next makes it what
        # the normalizer would have put there.
        content["normalizer"] = {**normalizer, "normalizers": [*normalizers[:-2], normalizers[-1]]}
        steps = [_metaspace(" ", "first"), _metaspace(_WORD, "never"), *steps]
    elif normalizers[0].get("type") == "Prepend" and normalizers[0]["prepend"] == " ":
        content["normalizer"] = {"type": "Sequence", "normalizers": normalizers[1:]}
        steps = [_metaspace(" ", "first"), *steps]
    elif steps and steps[0]["type"] == "ByteLevel" and steps[0]["add_prefix_space"]:
        steps = [_metaspace(" ", "first"), {**steps[0], "add_prefix_space": False}, *steps[1:]]
    elif steps and steps[0]["type"] == "Metaspace" and _prepends(steps[0]):
        first = {**steps[0], "prepend_scheme": "first"}
        first.pop("add_prefix_space", None)
        steps = [first, *steps[1:]]
        if normalizer:
            kept = [new for part in normalizers for new in _keep_space_inside(part)]
            content["normalizer"] = {"type": "Sequence", "normalizers": kept}
    else:
        return
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _keep_space_inside(normalizer: dict[str, Any]) -> list[dict[str, Any]]:
    """A normalizer that leaves one space where it would leave none at the beginning.

    At the beginning of a text the space is put there anyway.
    """
    if normalizer["type"] != "Strip" or not (
        normalizer["strip_left"] and normalizer["strip_right"]
    ):
        return [normalizer]
    one = {"type": "Replace", "pattern": {"Regex": r"^\s+(?=\S)"}, "content": " "}
    return [one, {**normalizer, "strip_left": False}]


def _metaspace(replacement: str, scheme: str) -> dict[str, Any]:
    return {
        "type": "Metaspace",
        "replacement": replacement,
        "prepend_scheme": scheme,
        "split": False,
    }


def _prepends(metaspace: Mapping[str, Any]) -> bool:
    """Whether a step puts a space before every part; older files say so in another way."""
    scheme = metaspace.get("prepend_scheme")
    return scheme == "always" or (scheme is None and metaspace.get("add_prefix_space", True))


def _begin_with(
    names: Mapping[str, str], ids: Mapping[str, int], old: dict[str, Any] | None
) -> dict[str, Any]:
    """A post-processor that puts ``<s>`` first and ``</s>`` between the texts of a pair.

    Else it does what the old one did. Tokens that the old one added go: training did not ask for
    them.
    """
    kept = [] if old is None else old.get("processors", [old])
    first, between = ({"SpecialToken": {"id": names[key], "type_id": 0}} for key in _TEMPLATE)
    one, two = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, between, two],
        "special_tokens": {
            names[key]: {"id": names[key], "ids": [ids[key]], "tokens": [names[key]]}
            for key in _TEMPLATE
        },
    }
    kept = [processor for processor in kept if processor["type"] not in _ADDS_TOKENS]
    return {"type": "Sequence", "processors": [*kept, template]}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
