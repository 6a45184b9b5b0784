"""``dualtrain import``: a model of the paper's released code, written as an export of ours.

Where a revision of the hub's repository is asked for, its name tells alpha and repetitions, as in
``alpha_0.500_n-reps=8``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from dualtrain.common.errors import UserError, nearest
from dualtrain.common.file_kinds import parse_tokenizer, read_object
from dualtrain.common.files import user_path
from dualtrain.common.hub import fetch_from_hub, hub_failures
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.data.dataset import SPECIAL_TOKENS, TOKENIZER_FILE
from dualtrain.export.export import ExportContents, Exported, weights_dtype, write_export
from dualtrain.export.model_card import FRONT, PAPER
from dualtrain.model.build import CONFIG
from dualtrain.model.exported import exported_config
from dualtrain.model.released import STATE_DICT, convert, read_state_dict

if TYPE_CHECKING:
    from dualtrain.export.command import ImportOptions

_WEIGHTS = ("state_dict.bin", "pytorch_model.bin", "model.safetensors")
_WANTED = ("*.json", *_WEIGHTS)
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_BRANCH = re.compile(r"alpha_(?P<alpha>\d\.\d+)_n-reps=(?P<repetitions>\d+)")


@dataclass(frozen=True)
class _Files:
    """The files of one released model; ``name`` is its revision's, or its directory's."""

    name: str
    weights: Path
    config: Path
    tokenizer: Path


def import_released(
    options: ImportOptions, *, on_note: Callable[[str], None]
) -> Iterator[Exported]:
    """Import a model, or every revision of a repository, one after another.

    Args:
        on_note: Told what the user should know of a model.

    Raises:
        UserError: There is no such source or revision; the files are those of another model, or do
            not fit one another; the directory cannot be written.
    """
    if not options.source:
        hint = "perhaps a variable of the shell is not set"
        raise UserError("SOURCE", "an empty name is given", "a model's", hint)
    weights_dtype(options.dtype)
    source, _, revision = options.source.partition("@")
    if user_path(options.source).exists():
        source, revision = options.source, ""
    if not options.all_revisions:
        yield _import(options, source, revision, options.to, on_note)
        return
    if revision:
        raise UserError("--all", f"{revision} is asked for, too", "one of both")
    names = _revisions(source)
    if not names:
        what = "has no revisions such as alpha_0.500_n-reps=8"
        raise UserError(source, what, "a repository of released models, or a copy of one")
    for name in names:
        if (options.to / name / CONFIG).is_file():
            on_note(f"{options.to / name} is there already")
        else:
            yield _import(options, source, name, options.to / name, on_note)


def read_branch(name: str) -> tuple[float, int] | None:
    """Alpha and repetitions of a released model, by the name of its revision or directory."""
    found = _BRANCH.fullmatch(name)
    return None if found is None else (float(found["alpha"]), int(found["repetitions"]))


def _import(
    options: ImportOptions,
    source: str,
    revision: str,
    to: Path,
    on_note: Callable[[str], None],
) -> Exported:
    files = _find_files(options, source, revision)
    tokenizer = parse_tokenizer(files.tokenizer)
    special_tokens = _special_tokens(tokenizer, files.tokenizer)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    config, weights = convert(
        read_state_dict(files.weights),
        read_object(files.config, "the sizes of a released model"),
        special_tokens,
        where=str(files.weights),
        settings_file=str(files.config),
    )
    if size > config.vocab_size:
        what = f"has {size:,} tokens, but {files.weights} {config.vocab_size:,} rows"
        raise UserError(str(files.tokenizer), what, "the model's own", "name it with --tokenizer")
    if size < config.vocab_size:
        on_note(f"{files.tokenizer} has {size:,} tokens, the model {config.vocab_size:,} rows")
    added = tokenizer.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}
    vocabulary = Vocabulary(
        size=size,
        special_ids=tuple(sorted(special | set(special_tokens.values()))),
        bos_id=special_tokens["<s>"],
        eos_id=special_tokens["</s>"],
        mask=special_tokens["<mask>"],
    )
    contents = ExportContents(
        name=files.name,
        config=config,
        # The released code predicts masked tokens from the position before, and has no </s>.
        values=exported_config(config, target="next", append_eos=False),
        vocabulary=vocabulary,
        tokenizer_file=files.tokenizer,
        special_tokens=special_tokens,
        context=config.max_position_embeddings,
        weights=weights,
        card=lambda _config, _values, parameters, _names: _card(
            options.source, files.name, parameters
        ),
    )
    return write_export(contents, to, precision=options.dtype)


def _special_tokens(tokenizer: Tokenizer, file: Path) -> dict[str, int]:
    found = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    if missing := [name for name in ("<s>", "</s>", "<mask>") if found[name] is None]:
        what = f"has no {', '.join(missing)}"
        raise UserError(str(file), what, "the tokenizer of a released model")
    return {name: token for name, token in found.items() if token is not None}


def _card(source: str, name: str, parameters: int) -> str:
    parts = [
        f"# {name}",
        f"A language model of {parameters:,} parameters with two objectives, autoregressive and"
        f" masked diffusion, of {PAPER}. Trained by its authors with their released code; these are"
        f" the weights of `{source}`, in the layout of dualtrain.",
    ]
    if branch := read_branch(name):
        alpha, repetitions = branch
        parts.append(
            f"By its name: AR share (alpha) {alpha}, {repetitions} repetitions of the data."
        )
    return FRONT + "\n" + "\n\n".join(parts) + "\n"


def _find_files(options: ImportOptions, source: str, revision: str) -> _Files:
    place = user_path(source)
    if place.is_file():
        if revision:
            raise UserError(options.source, "a file has no revisions", "a directory or repository")
        directory, weights = place.parent, place
        name = place.parent.resolve().name
    else:
        directory = _directory(place, source, revision)
        weights = _one_of(directory, _WEIGHTS, STATE_DICT, "name the file itself")
        name = revision or directory.resolve().name
    config = options.config or _one_of(
        directory, (CONFIG,), "its sizes, such as the released configs/large.json", "use --config"
    )
    tokenizer = options.tokenizer or _one_of(
        directory, (TOKENIZER_FILE,), "its tokenizer", "use --tokenizer"
    )
    return _Files(name, weights, config, tokenizer)


def _one_of(directory: Path, names: tuple[str, ...], expected: str, hint: str) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise UserError(str(directory), f"has no {' nor '.join(names)}", expected, hint)


def _directory(place: Path, source: str, revision: str) -> Path:
    """The directory with the files of a revision: of a local copy, or fetched."""
    if place.is_dir():
        found = place if not revision else _copies(place).get(revision)
        if found is None:
            known = list(_copies(place))
            what, expected = f"has no copy of {revision}", _some(known)
            raise UserError(source, what, expected, nearest(revision, known))
        return found
    if not _HUB_NAME.fullmatch(source):
        expected = "a state dict, a directory, or a repository's name such as ltg/dual-lm-470m"
        raise UserError(source, "does not exist", expected)
    return _fetch(source, revision)


def _copies(place: Path) -> dict[str, Path]:
    """Revisions in a local copy: directories of their names, or the hub's own cache."""
    if (place / "snapshots").is_dir():
        refs = (file for file in sorted((place / "refs").rglob("*")) if file.is_file())
        commits = {str(ref.relative_to(place / "refs")): ref.read_text().strip() for ref in refs}
        found = {name: place / "snapshots" / commit for name, commit in commits.items()}
    else:
        found = {path.name: path for path in sorted(place.iterdir()) if path.is_dir()}
    return {name: path for name, path in found.items() if path.is_dir()}


def _revisions(source: str) -> list[str]:
    place = user_path(source)
    if place.is_dir():
        names = list(_copies(place))
    elif _HUB_NAME.fullmatch(source):
        names = _branches(source)
    else:
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(source, what, "with --all, a repository, or a local copy of one")
    return [name for name in names if read_branch(name) is not None]


def _branches(repository: str) -> list[str]:
    from huggingface_hub import list_repo_refs

    try:
        return [branch.name for branch in list_repo_refs(repository).branches]
    except hub_failures() as error:
        raise _unreachable(repository, "", error) from None


def _fetch(repository: str, revision: str) -> Path:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return fetch_from_hub(repository, revision, _WANTED)
    except RevisionNotFoundError:
        known = _branches(repository)
        what, expected = f"has no revision {revision}", _some(known)
        raise UserError(repository, what, expected, nearest(revision, known)) from None
    except hub_failures() as error:
        raise _unreachable(repository, revision, error) from None


def _unreachable(repository: str, revision: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    option = f" --revision {revision}" if revision else ""
    hint = f"where there is a network, `hf download {repository}{option} --local-dir DIR`; then DIR"
    return UserError(repository, f"the hub has not given it: {reason}", "a network", hint)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"one of {shown}{', …' if len(names) > 5 else ''}" if names else "a copy with revisions"
