"""The tokenizer of an export, for ``AutoTokenizer``: the dataset's ids, with ``<s>`` in front.

Written by hand rather than by transformers' ``save_pretrained``, whose files of version 5 cannot be
read by version 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualtrain.data.dataset import TOKENIZER_FILE

_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")

ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
"""What a dataset calls the tokens that transformers knows by their role."""


def write_tokenizer(
    source: Path, directory: Path, *, special_tokens: Mapping[str, int], context: int
) -> None:
    """Write ``tokenizer.json`` and what ``AutoTokenizer`` reads beside it.

    Args:
        source: The ``tokenizer.json`` of the training.
        directory: Where to write.
        special_tokens: Ids by name, as the dataset has them.
        context: Longest row in tokens.
    """
    content = json.loads(source.read_text("utf-8"))
    content["post_processor"] = _begin_with("<s>", special_tokens["<s>"], content["post_processor"])
    content["truncation"] = content["padding"] = None
    for token in content["added_tokens"]:
        if token["content"] == "<mask>":
            # Tokens carry the space before their word, so a mask stands for it, too.
            token["lstrip"] = True
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **ROLES,
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
    _write(directory / "special_tokens_map.json", ROLES)


def _begin_with(name: str, number: int, old: dict[str, Any] | None) -> dict[str, Any]:
    """A post-processor that puts a token first, and else does what the old one did.

    Tokens that the old one added go: training did not ask for them.
    """
    kept = [] if old is None else old.get("processors", [old])
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    one, two = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, two],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
    kept = [processor for processor in kept if processor["type"] not in _ADDS_TOKENS]
    return {"type": "Sequence", "processors": [*kept, template]}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
