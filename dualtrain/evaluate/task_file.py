"""What a task file may say, and reading one: every mistake with its file and line.

``tasks`` calls :func:`read_task_file`. What the templates and expressions of a file make of a line
of data is the business of ``templates``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dualtrain.common.errors import UserError, UserErrors, nearest
from dualtrain.common.input_files import InputFile
from dualtrain.evaluate.templates import Templates, compile_expression, compile_template
from dualtrain.recipe.yaml_source import Located, Plain, dotted, parse, shown
from dualtrain.recipe.yaml_source import Path as KeyPath

Metric = Literal["accuracy", "accuracy_norm"]

_EXPECTED = {
    "string_type": "text",
    "model_type": "a section",
    "dict_type": "a section",
    "list_type": "a list",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, _ and - only",
}
_CODE = ("choices", "gold", "group")
_TEXT = ("prompt", "choice")
_OF_TASKS = {"prompt", "choices", "gold", "metric"}
"""Keys by which a file that is not as it should be is known to mean a task."""


def _number_as_code(value: Any) -> Any:
    """`gold: 0` in YAML is the expression 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value


Expression = Annotated[str, BeforeValidator(_number_as_code)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HubSection(_Section):
    """Where the data is on the Hugging Face hub, for when the file is not there."""

    path: str = Field(min_length=1, description="Of the dataset; a local directory will do, too.")
    names: list[str] = Field(
        default_factory=list, description="Its configurations, read one after another."
    )
    split: str = Field(min_length=1, description="Its split.")
    fields: dict[str, Expression] = Field(
        default_factory=dict,
        description="For each field of the data file, a Jinja expression of the dataset's columns; "
        "empty where they are the same.",
    )


class TaskFile(_Section):
    """One task: where its data is, and what is asked about each line of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="What `--tasks` calls it.")
    description: str = Field(min_length=1, description="What is tested, in a line.")
    source: str = Field(default="", description="Who made it, and which part of it this is.")
    licence: str = Field(default="", description="Of the data.")
    data: str = Field(
        min_length=1,
        description="Name of the data file, JSON lines; it may have .gz, .xz, .zst or .bz2 behind.",
    )
    hub: HubSection | None = Field(default=None, description="Where the data is otherwise.")
    prompt: str = Field(description="Jinja template of the text in front of an answer.")
    choices: Expression = Field(description="Jinja expression of the list of answers.")
    choice: str = Field(
        default=" {{ choice }}",
        description="Jinja template of an answer as it is put behind the prompt.",
    )
    gold: Expression = Field(
        description="Jinja expression of the right answer's number, from 0 on."
    )
    group: Expression | None = Field(
        default=None, description="Jinja expression of what results are also grouped by."
    )
    metric: Metric = Field(
        description="accuracy: by log-likelihood; accuracy_norm: by log-likelihood per character."
    )


@dataclass(frozen=True)
class ReadTaskFile:
    """A task file that is as it should be.

    Attributes:
        templates: Its templates and expressions, ready to use.
        hub_fields: Those of ``hub.fields``.
    """

    spec: TaskFile
    templates: Templates
    hub_fields: Templates | None
    path: Path
    sha256: str


class BrokenTaskFile(UserErrors):
    """A YAML file that is no task, or one with mistakes.

    Args:
        errors: What is wrong, all of it.
        name: The task that it means to be; the file's own name where it does not say.
        is_task: Whether it means to be one at all, as far as it can be known.
    """

    def __init__(self, errors: list[UserError], name: str, is_task: bool) -> None:
        self.name, self.is_task = name, is_task
        super().__init__(errors)

    def __reduce__(self) -> tuple[type[BrokenTaskFile], tuple[object, ...]]:
        return type(self), (self.errors, self.name, self.is_task)


def read_task_file(path: Path) -> ReadTaskFile:
    """Read and check a task file.

    Raises:
        BrokenTaskFile: It cannot be read, is something else, or something is wrong with it; all
            at once, by line.
    """
    name, is_task = path.stem, True
    try:
        file = InputFile.read(path)
        tree, errors = parse(file.text(), str(path))
        values = tree.plain()
        if isinstance(values, dict):
            is_task = not _OF_TASKS.isdisjoint(values)
            claimed = values.get("name")
            name = claimed if isinstance(claimed, str) else name
        else:
            is_task = values is None
        digest = hashlib.sha256(file.content).hexdigest()
        return _read(values, tree, errors, path, digest)
    except UserError as error:
        raise BrokenTaskFile([error], name, is_task) from None


def _read(
    values: Plain, tree: Located, errors: list[UserError], path: Path, digest: str
) -> ReadTaskFile:
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {shown(values)}"
        raise UserError(str(tree.place), what, "a task: `name: ...`, `data: ...`, `prompt: ...`")
    if _OF_TASKS.isdisjoint(values):
        what = f"is no task file: it has the keys {', '.join([*values][:5])}"
        raise UserError(str(tree.place), what, ", ".join(sorted(_OF_TASKS)))
    try:
        spec = TaskFile.model_validate(values)
    except ValidationError as error:
        errors += [_explain(detail, tree) for detail in error.errors(include_url=False)]
        raise UserErrors(errors) from None
    templates, hub_fields = _compile(spec, tree, errors)
    if errors:
        raise UserErrors(errors)
    return ReadTaskFile(spec, templates, hub_fields, path, digest)


def _compile(
    spec: TaskFile, tree: Located, errors: list[UserError]
) -> tuple[Templates, Templates | None]:
    """Compile everything that is Jinja; adds what cannot be to `errors`."""
    parts: dict[KeyPath, tuple[bool, str]] = {}
    for key in (*_TEXT, *_CODE):
        text = getattr(spec, key)
        if text is not None:
            parts[(key,)] = (key in _TEXT, text)
    for key, text in (spec.hub.fields if spec.hub else {}).items():
        parts[("hub", "fields", key)] = (False, text)
    made = {}
    for path, (is_text, text) in parts.items():
        where = f"{tree.locate(path)}: {dotted(path)}"
        try:
            made[path] = (compile_template if is_text else compile_expression)(text)
        except ValueError as error:
            kind = "template" if is_text else "expression"
            errors.append(UserError(where, f"{shown(text)}: {error}", f"a Jinja {kind}"))
    file = tree.place.file
    fields = {path[-1]: part for path, part in made.items() if path[0] == "hub"}
    templates = Templates({p[0]: part for p, part in made.items() if p[0] != "hub"}, file)
    return templates, Templates(fields, file) if fields else None


def _explain(detail: ErrorDetails, tree: Located) -> UserError:
    path, kind, value = detail["loc"], detail["type"], detail.get("input")
    key = str([*path][-1])
    where = f"{tree.locate(path)}: {dotted(path)}"
    section = HubSection if path[0] == "hub" and len(path) > 1 else TaskFile
    if kind == "extra_forbidden":
        keys = list(section.model_fields)
        return UserError(where, "unknown key", f"one of {', '.join(keys)}", nearest(key, keys))
    if kind == "missing":
        return UserError(where, "is missing", _description(section, key))
    if kind == "literal_error":
        words = ["accuracy", "accuracy_norm"]
        what = f"{shown(value)} is not known"
        return UserError(where, what, " or ".join(words), nearest(value, words))
    expected = _EXPECTED.get(kind, _description(section, key))
    is_number = kind == "string_type" and isinstance(value, (int, float))
    what = f"is {shown(value)}" if not isinstance(value, str) else f"{shown(value)} is not allowed"
    hint = f'write "{value}", in quotes' if is_number else ""
    if kind == "string_type" and isinstance(value, list):
        hint = """an expression stands in quotes: "[sol1, sol2]" or "['yes', 'no']\""""
    return UserError(where, what, expected, hint)


def _description(section: type[_Section], key: str) -> str:
    field = section.model_fields.get(key)
    if field is None or not field.description:
        return ""
    text = field.description.rstrip(".")
    return text[0].lower() + text[1:] if text[1:2].islower() else text
