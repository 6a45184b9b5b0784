"""``dualtrain export``: a checkpoint as a directory for transformers, written whole or not at all.

    config.json, generation_config.json    what the model is, and how it generates
    model.safetensors                      or several files and their index
    tokenizer.json, tokenizer_config.json, special_tokens_map.json
    modeling_dualtrain.py                  the modes that transformers has not, as remote code
    README.md                              the model card

No model is built, no GPU and no DeepSpeed is needed: a checkpoint's ``weights.safetensors`` is
whole whatever the ZeRO stage, and its names are Llama's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from dualtrain.checkpoint import store as checkpoint
from dualtrain.checkpoint.trained import find_source
from dualtrain.common.errors import UserError
from dualtrain.common.file_kinds import check_name, read_object
from dualtrain.common.files import absolute, made_whole, reserved, writing
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.export.model_card import model_card
from dualtrain.export.weights import Weights, write_weights
from dualtrain.model.build import CONFIG, model_config, read_config
from dualtrain.model.exported import CODE, DTYPE, exported_config, exported_import
from dualtrain.model.exported_tokenizer import write_tokenizer
from dualtrain.network.config import DualConfig

if TYPE_CHECKING:
    from dualtrain.export.command import ExportOptions

CODE_FILE = f"{CODE}.py"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        architecture: The class that transformers loads it as.
        is_plain: Whether transformers knows that class without the code in the directory.
        files: Size in bytes by name.
    """

    directory: Path
    name: str
    architecture: str
    is_plain: bool
    precision: str
    parameters: int
    files: dict[str, int]

    def lines(self) -> list[str]:
        """What to tell the user."""
        width = max(map(len, self.files))
        trust = "" if self.is_plain else ", trust_remote_code=True"
        return [
            f"{self.name}: {self.parameters:,} parameters in {self.precision},"
            f" as {self.architecture}, in {self.directory}",
            *(f"  {name:{width}}  {size:>13,} bytes" for name, size in self.files.items()),
            "load it with",
            f'  AutoModelForCausalLM.from_pretrained("{self.directory}"{trust})',
        ]


@dataclass(frozen=True, kw_only=True)
class ExportContents:
    """What is to be written of a model.

    Attributes:
        values: Its ``config.json``.
        special_tokens: Ids by role.
        context: The longest row it reads, in tokens.
        card: Makes the model card of the configuration, its values, the number of parameters, and
            the names of the special tokens by role.
    """

    name: str
    config: DualConfig | PretrainedConfig
    values: Mapping[str, Any]
    vocabulary: Vocabulary
    tokenizer_file: Path
    special_tokens: Mapping[str, int]
    context: int
    weights: Weights
    card: Callable[[DualConfig | PretrainedConfig, Mapping[str, Any], int, Mapping[str, str]], str]


def export_checkpoint(
    options: ExportOptions, *, on_note: Callable[[str], None] = lambda note: None
) -> Exported:
    """Export a checkpoint.

    Args:
        on_note: Told what the user should know of how the model was found.

    Raises:
        UserError: There is no whole checkpoint, or the directory cannot be written.
    """
    weights_dtype(options.dtype)
    source = find_source(options.path, step=options.step)
    for note in source.notes:
        on_note(note)
    recipe, info = source.recipe, source.info
    if recipe is None or info is None:
        raise UserError(
            str(source.path), "is an exported model already", "a run directory or a checkpoint"
        )
    # A checkpoint of an older version has no configuration of its own.
    file = source.path / CONFIG
    config = read_config(file) if file.is_file() else model_config(recipe, info)
    facts: dict[str, Any] = {
        "target": recipe.objective.target,
        "append_eos": recipe.data.append_eos,
        "document_mask": recipe.data.document_mask,
    }
    if isinstance(config, DualConfig):
        values = exported_config(config, **facts)
    else:
        values = exported_import(read_object(file, "a model's configuration"), **facts)
    contents = ExportContents(
        name=source.name,
        config=config,
        values=values,
        vocabulary=info.vocabulary,
        tokenizer_file=source.tokenizer_file,
        special_tokens=info.special_tokens,
        context=recipe.sequence_length,
        weights=source.path / checkpoint.WEIGHTS,
        card=partial(model_card, source),
    )
    return write_export(
        contents, options.to, precision=options.dtype, max_shard_size=options.max_shard_size
    )


def write_export(
    contents: ExportContents, to: Path, *, precision: str, max_shard_size: str = "5GB"
) -> Exported:
    """Write a directory whole, or leave nothing of it.

    Raises:
        UserError: The directory cannot be written, or the precision or the size is none.
    """
    dtype, config = weights_dtype(precision), contents.config
    values = {**contents.values, DTYPE: str(dtype).removeprefix("torch.")}
    with _new_directory(to) as directory:
        _write_json(directory / CONFIG, values)
        _write_json(directory / "generation_config.json", _generation(config, contents.vocabulary))
        names = write_tokenizer(
            contents.tokenizer_file,
            directory,
            special_tokens=contents.special_tokens,
            context=contents.context,
        )
        if isinstance(config, DualConfig):
            shutil.copyfile(Path(__file__).with_name(CODE_FILE), directory / CODE_FILE)
        parameters = write_weights(
            contents.weights, directory, dtype=dtype, max_shard_size=max_shard_size
        )
        # Names of files need not be Unicode.
        (directory / "README.md").write_text(
            contents.card(config, values, parameters, names), "utf-8", "backslashreplace"
        )
        files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return Exported(
        directory=to,
        name=contents.name,
        architecture=values["architectures"][0],
        is_plain=values["model_type"] != DualConfig.model_type,
        precision=precision,
        parameters=parameters,
        files=files,
    )


def weights_dtype(precision: str) -> torch.dtype:
    """What ``--dtype`` means.

    Raises:
        UserError: It is another word.
    """
    if precision not in _DTYPES:
        raise UserError("--dtype", repr(precision), " or ".join(_DTYPES))
    return _DTYPES[precision]


@contextmanager
def _new_directory(directory: Path | str) -> Iterator[Path]:
    """Give a directory to write into, which takes its place only if nothing goes wrong."""
    where = f"--to {directory}"
    with writing(directory, where=where, hint="nothing is left of it"):
        place = absolute(directory)
        check_name(place)
        with reserved(place, where=where) as partial, made_whole(partial, place):
            yield partial


def _generation(config: DualConfig | PretrainedConfig, vocabulary: Vocabulary) -> dict[str, object]:
    """How ``generate`` begins and ends a text, and what it never writes."""
    # The beginning of the next document ends a text, too, where a model was taught to write it.
    ends = list(dict.fromkeys([vocabulary.eos_id, vocabulary.bos_id]))
    never = {*vocabulary.special_ids, *range(vocabulary.size, config.vocab_size)} - {*ends}
    return {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id,
        "suppress_tokens": sorted(never),
    }


def _write_json(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
