"""Whether a dataset that is there is the one that a conversion would make."""

from __future__ import annotations

import os
from collections.abc import Sequence

from data_tools.choose import VAL_FRACTION
from data_tools.sources import BUILTIN, CorpusFile
from data_tools.sources.build_source import open_source, open_val_source
from data_tools.sources.find import STANDARD_INPUT
from data_tools.tokenizers.ranks import find_tokenizer
from dualtrain.common.errors import UserError
from dualtrain.common.files import file_hash
from dualtrain.data.dataset import DatasetInfo, SourceFile
from dualtrain.recipe.schema import BuildSection

_HASHED_BYTES = 1 << 30
"""Of larger corpora only the sizes are compared: a run looks at its sources each time it starts."""


def check_made_alike(place: str, info: DatasetInfo, build: BuildSection) -> None:
    """Raise UserError unless the dataset at `place` was made with these settings and sources."""
    differences = changed_settings(info, build) or _changed_files(info, build)
    if differences:
        raise UserError(
            place,
            "holds a dataset made differently: " + "; ".join(differences),
            "the same settings and files",
            "choose another place, or remove it to have it made again; "
            "with data.build=null a run takes it as it is",
        )


def changed_settings(info: DatasetInfo, build: BuildSection) -> list[str]:
    """In what the settings of a dataset that is there differ from these, in words."""
    made, asked = _with_defaults(info.arguments), effective_arguments(build)
    return [
        f"{name} is {made.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if made.get(name) != value
    ]


def effective_arguments(
    build: BuildSection,
) -> dict[str, bool | int | float | str | list[str] | None]:
    """The settings as they work, so that what means the same compares as equal."""
    arguments = build.model_dump()
    sources = build.sources
    arguments["source"] = sources[0] if len(sources) == 1 else sources
    if build.val_tokens is None and not build.val_sources:
        arguments["val_fraction"] = build.val_fraction or VAL_FRACTION
    return arguments


def _with_defaults(arguments: dict) -> dict:
    """A dataset's arguments; one made before a setting existed was made with its default."""
    defaults = {
        name: field.get_default()
        for name, field in BuildSection.model_fields.items()
        if not field.is_required()
    }
    return defaults | arguments


def _changed_files(info: DatasetInfo, build: BuildSection) -> list[str]:
    """What changed in the source since; what is no longer there need not be the same."""
    names = build.sources
    if STANDARD_INPUT in names + build.val_sources:
        return ["standard input cannot be compared with what was read then"]
    differences = []
    given = build.tokenizer
    if given and os.path.exists(os.path.expanduser(given)):
        # A dataset of a version that knew special tokens by their own names only is as good.
        is_same = any(
            find_tokenizer(given, pattern=build.tokenizer_pattern, own_names=own_names).sha256
            == info.tokenizer_sha256
            for own_names in (False, True)
        )
        if not is_same:
            differences.append(f"{given} is another tokenizer now")
    if any(name.startswith(BUILTIN) for name in names):
        return differences  # changes with Python, which must not stop an old run
    try:
        held_out = open_val_source(build)
        files = open_source(build, None).files + (held_out.files if held_out else ())
        now = {file.name: file for file in files}
    except UserError:
        return differences
    then = {file.path: file for file in info.sources}
    changed = sorted(
        path
        for path in then.keys() | now.keys()
        if path not in now or path not in then or _differs(then[path], now[path])
    )
    if changed:
        differences.append(f"{len(changed)} source files changed since, first {changed[0]}")
    return differences


def _differs(then: SourceFile, now: CorpusFile) -> bool:
    if then.bytes != now.bytes:
        return True
    return then.sha256 is not None and then.sha256 != _hash(now)


def recorded(files: Sequence[CorpusFile]) -> list[SourceFile]:
    """What ``dataset.json`` says of files: with hashes of their contents, if that is quick."""
    is_quick = sum(file.bytes for file in files) <= _HASHED_BYTES
    return [
        SourceFile(path=file.name, bytes=file.bytes, sha256=_hash(file) if is_quick else None)
        for file in files
    ]


def _hash(file: CorpusFile) -> str | None:
    """None for what is no file, such as the embedded corpus."""
    return file_hash(file.path) if os.path.isfile(file.path) else None
