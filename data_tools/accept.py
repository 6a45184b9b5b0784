"""Whether a dataset that is there is the one that a conversion would make."""

from __future__ import annotations

from pathlib import Path

from data_tools.build_source import STANDARD_INPUT, open_source
from data_tools.choose import VAL_FRACTION
from data_tools.sources import BUILTIN
from data_tools.tokenizer import find_tokenizer
from dualtrain.data.dataset import DatasetInfo
from dualtrain.errors import UserError
from dualtrain.recipe.schema import BuildSection


def check_made_alike(place: str, info: DatasetInfo, build: BuildSection) -> None:
    """Raise UserError unless the dataset at `place` was made with these settings and sources."""
    there, asked = _with_defaults(info.arguments), effective_arguments(build)
    differences = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if not differences:
        differences = _changed_files(info, build)
    if differences:
        raise UserError(
            place,
            "holds a dataset made differently: " + "; ".join(differences),
            "the same settings and files",
            "choose another place, or remove it to have it made again",
        )


def effective_arguments(
    build: BuildSection,
) -> dict[str, bool | int | float | str | list[str] | None]:
    """The settings as they work, so that what means the same compares as equal."""
    arguments = build.model_dump()
    sources = build.sources
    arguments["source"] = sources[0] if len(sources) == 1 else sources
    if build.val_tokens is None:
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
    if STANDARD_INPUT in names:
        return ["standard input cannot be compared with what was read then"]
    differences = []
    given = build.tokenizer
    if given and Path(given).exists():
        found = find_tokenizer(given, pattern=build.tokenizer_pattern)
        if found.sha256 != info.tokenizer_sha256:
            differences.append(f"{given} is another tokenizer now")
    if any(name.startswith(BUILTIN) for name in names):
        return differences  # changes with Python, which must not stop an old run
    try:
        now = {f.path: f.bytes for f in open_source(build, None).files}
    except UserError:
        return differences
    then = {f.path: f.bytes for f in info.sources}
    changed = sorted(p for p in then.keys() | now.keys() if then.get(p) != now.get(p))
    if changed:
        differences.append(f"{len(changed)} source files changed since, first {changed[0]}")
    return differences
