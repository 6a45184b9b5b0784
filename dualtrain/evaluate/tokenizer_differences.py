"""Whether two tokenizers make the same ids of every text, though their files differ.

An export's ``tokenizer.json`` is not the dataset's byte for byte: it puts ``<s>`` first, for one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualtrain.common.file_kinds import parse_tokenizer
from dualtrain.model.exported_tokenizer import put_space_only_first

_PARTS = {
    "model": "the model",
    "normalizer": "the normalizer",
    "pre_tokenizer": "the pre-tokenizer",
}


def tokenizer_differences(one: Path, other: Path) -> list[str]:
    """In what two ``tokenizer.json`` encode text differently; empty where they do not.

    Raises:
        UserError: One cannot be read.
    """
    first, second = parse_tokenizer(one), parse_tokenizer(other)
    ids, other_ids = first.get_vocab().items(), second.get_vocab().items()
    found = []
    if different := max(len(ids - other_ids), len(other_ids - ids)):
        found.append(f"{different:,} of {len(ids):,} tokens")
    # As the library writes them: whatever wrote the files.
    contents = json.loads(first.to_str()), json.loads(second.to_str())
    for content in contents:
        content["model"].pop("vocab", None)
        put_space_only_first(content)  # as an export has it
    for key, name in _PARTS.items():
        if contents[0][key] != contents[1][key]:
            found.append(name)
    if _added(contents[0]) != _added(contents[1]):
        found.append("the added tokens")
    return found


def _added(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Added tokens that are looked for in a text: special ones are not."""
    return [token for token in content["added_tokens"] if not token["special"]]
