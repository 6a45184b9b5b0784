"""``dualtrain data``: the options of its commands, and the commands.

What is said of a setting that recipes have, too, comes from the recipe's own description.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ValidationError

from data_tools.view import ConversionView, build_with_view, print_facts, print_histogram, say
from dualtrain.common.errors import UserError, raise_together
from dualtrain.common.files import in_utf8
from dualtrain.common.options import as_command
from dualtrain.recipe.schema import BuildSection

app = typer.Typer(
    help="Make, check and look at datasets.", no_args_is_help=True, rich_markup_mode=None
)
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")

_UNSET = "perhaps a variable of the shell is not set"


def _of_recipe(name: str, *flags: str, **about: Any) -> Any:
    """An option that sets a field of the recipe; None says that it was not given."""
    field = BuildSection.model_fields[name]
    settings: dict[str, Any] = {"help": _help(name)}
    if field.default and not field.is_required():
        settings["help"] += f" Default: {field.default}."
    if get_origin(field.annotation) is Literal:
        settings["metavar"] = "|".join(get_args(field.annotation))
    return typer.Option(*flags, **settings | about)


def _help(name: str) -> str:
    """What a recipe's reference says of a field, for those who give it as an option."""
    text = (BuildSection.model_fields[name].description or "").replace("null:", "if left out:")
    for other in BuildSection.model_fields:
        if "_" in other:
            text = re.sub(rf"\b{other}\b", _flag(other), text)
    return text


def _path(name: str) -> Callable[[str], Path]:
    """How a path is read: an empty one would be the current directory."""

    def path(text: str) -> Path:
        if not text:
            raise UserError(name, "the path is empty", "a file or a directory", _UNSET)
        return Path(text)

    return path


def _argument(help: str) -> Any:
    return typer.Argument(help=help, parser=_path("path"), metavar="PATH")


def _path_option(name: str, help: str) -> Any:
    return typer.Option(name, help=help, parser=_path(name), metavar="PATH")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What text is read, and how."""

    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCES...",
            help="What to read, in this order. Each: a file, a directory, a glob pattern, - for "
            "standard input, builtin:python-docs.",
        ),
    ]
    format: Annotated[str | None, _of_recipe("format")] = None
    text_field: Annotated[str | None, _of_recipe("text_field")] = None
    separator: Annotated[str | None, _of_recipe("separator")] = None
    on_error: Annotated[str | None, _of_recipe("on_error")] = None
    min_characters: Annotated[int | None, _of_recipe("min_characters")] = None
    max_characters: Annotated[int | None, _of_recipe("max_characters")] = None

    def build(self, **more: Any) -> BuildSection:
        """The section of a recipe that says the same."""
        names = (field.name for field in fields(self) if field.name in BuildSection.model_fields)
        given = {n: value for n in names if (value := getattr(self, n)) is not None} | more
        for name, value in given.items():
            for text in value if isinstance(value, list) else [value]:
                _check_text(name, text)
        try:
            return BuildSection.model_validate(given)
        except ValidationError as error:
            # One sentence for each option, whatever the number of types that it might have had.
            problems = {e["loc"][0]: e for e in reversed(error.errors())}
            raise_together(map(_explained, problems.values()))
            raise


def _check_text(name: str, text: object) -> None:
    where = "SOURCES" if name == "source" else _flag(name)
    names_files = name in ("source", "val_source")
    if isinstance(text, str) and text != in_utf8(text):
        hint = "give the directory that holds it, or rename it" if names_files else ""
        raise UserError(where, f"'{in_utf8(text)}' is not UTF-8", "text in UTF-8", hint)
    if names_files and not text:
        what, expected = "an empty name is given", "a file, a directory or a pattern"
        raise UserError(where, what, expected, _UNSET)


def _explained(problem: Any) -> UserError:
    name = str(problem["loc"][0])
    what, expected = f"{problem['input']!r} is not allowed", problem["msg"]
    return UserError(_flag(name), what, expected.removeprefix("Input should be "), _help(name))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """The order of the documents on disk."""

    shuffle_seed: Annotated[
        int | None, typer.Option(help="Seed of the document order on disk. Default: 0.")
    ] = None
    keep_order: Annotated[
        bool, typer.Option(help="Keep the documents in the order in which they are given.")
    ] = False
    drop_duplicates: Annotated[bool, _of_recipe("drop_duplicates", "--drop-duplicates")] = False

    @property
    def order_seed(self) -> int | None:
        """The seed of the order; None keeps that in which they are given."""
        if self.keep_order and self.shuffle_seed is not None:
            what = f"{self.shuffle_seed} has no effect: --keep-order leaves the order as it is"
            raise UserError("--shuffle-seed", what, "one of the two")
        return None if self.keep_order else self.shuffle_seed or 0


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(OrderOptions, TextOptions):
    """The command line of ``dualtrain data convert``."""

    out: Annotated[str, typer.Option(help="Directory to make, or a URL such as s3://bucket/name.")]
    tokenizer: Annotated[str | None, _of_recipe("tokenizer")] = None
    tokenizer_pattern: Annotated[str | None, _of_recipe("tokenizer_pattern")] = None
    vocab_size: Annotated[int | None, _of_recipe("vocab_size")] = None
    val_source: Annotated[
        list[str] | None, _of_recipe("val_source", metavar="PATH", show_default=False)
    ] = None
    val_fraction: Annotated[float | None, _of_recipe("val_fraction")] = None
    val_tokens: Annotated[int | None, _of_recipe("val_tokens")] = None
    max_tokens: Annotated[int | None, _of_recipe("max_tokens")] = None
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that encode; default: one for each core.")
    ] = None
    local: Annotated[
        Path | None,
        _path_option("--local", "With a URL: where the dataset is made first, and stays."),
    ] = None


def convert(options: ConvertOptions) -> None:
    """Convert text into a dataset: MDS shards, tokenizer, dataset.json."""
    from data_tools.remote import convert_remote, is_remote

    out = _path("--out")(options.out)
    if options.tokenizer is not None and options.vocab_size is not None:
        what = f"{options.vocab_size} has no effect: {options.tokenizer} has its own vocabulary"
        raise UserError("--vocab-size", what, "one of --vocab-size and --tokenizer")
    if options.tokenizer is None and options.tokenizer_pattern is not None:
        what, hint = "has no effect: a tokenizer is trained", "name the rank file with --tokenizer"
        raise UserError("--tokenizer-pattern", what, "a rank file", hint)
    build = options.build(shuffle_seed=options.order_seed)
    if is_remote(options.out):
        convert_remote(build, options.out, options.local, workers=options.workers)
        return
    if options.local is not None:
        raise UserError("--local", "goes with a URL as --out only", "leave it out")
    if not build_with_view(build, out, workers=options.workers):
        say(f"{out} is there already, made with the same settings")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(OrderOptions):
    """The command line of ``dualtrain data merge``."""

    datasets: Annotated[list[Path], _argument("Datasets of the same tokenizer.")]
    out: Annotated[Path, _path_option("--out", "Directory to make.")]


def merge(options: MergeOptions) -> None:
    """Put several datasets together into one; each document stays in its split."""
    from data_tools.merge import merge_datasets

    with ConversionView() as view:
        info = merge_datasets(
            options.datasets,
            options.out,
            shuffle_seed=options.order_seed,
            drop_duplicates=options.drop_duplicates,
            report=view,
        )
    print_facts(options.out, info)


def verify(path: Annotated[Path, _argument("Directory of the dataset.")]) -> None:
    """Check every shard's size and hash, and every document's tokens."""
    from data_tools.verify import verify_dataset

    with ConversionView() as view:
        info = verify_dataset(path, report=view)
    print_facts(path, info)
    say("every shard and every document is as it should be")


def inspect(
    path: Annotated[Path, _argument("Directory of the dataset.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents of each split to show.")] = 2,
    characters: Annotated[int, typer.Option(min=1, help="Characters of each.")] = 300,
) -> None:
    """Show what a dataset holds: totals, document lengths, the beginnings of some documents."""
    import numpy as np

    from data_tools.inspection import length_histogram, sample
    from data_tools.tokenizers.tokenizer import Tokenizer
    from dualtrain.data.dataset import DatasetInfo, TokenDataset

    info = DatasetInfo.load(path)
    print_facts(path, info)
    say(f"  tokenizer sha256 {info.tokenizer_sha256}")
    named, more = [file.path for file in info.sources[:5]], len(info.sources) - 5
    say(f"  sources: {', '.join(named) or 'none named'}{f' and {more:,} more' * (more > 0)}")
    tokenizer = Tokenizer.load(path / info.tokenizer_file, special_tokens=info.special_tokens)
    for split in info.splits:
        dataset = TokenDataset.open(path, split)
        lengths = np.asarray(dataset.lengths)
        say(
            f"\n{split}: documents of {lengths.min():,} to {lengths.max():,} tokens, "
            f"median {int(np.median(lengths)):,}, mean {lengths.mean():,.1f}"
        )
        print_histogram(length_histogram(lengths))
        for document in range(min(documents, dataset.documents)):
            say(f"\n{split} document {document}, {lengths[document]:,} tokens, as it is packed:")
            say(sample(dataset, tokenizer, document, characters))


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TextOptions):
    """The command line of ``dualtrain data tokenizer train``."""

    vocab_size: Annotated[int, _of_recipe("vocab_size", show_default=False)]
    out: Annotated[Path, _path_option("--out", "The tokenizer.json to write.")]


def train(options: TrainOptions) -> None:
    """Train a byte-level BPE tokenizer with the special tokens <unk> <s> </s> <pad> <mask>."""
    from data_tools.train_tokenizer import train_tokenizer

    with ConversionView() as view:
        trained = train_tokenizer(options.build(), options.out, report=view)
    say(
        f"{options.out}: vocabulary {trained.vocab_size:,}, {trained.bytes_per_token:.3f} "
        f"bytes/token on {trained.measured_bytes / 1e6:,.1f} MB of its text, encodes through "
        f"{trained.backend}"
    )


for function in (convert, merge, verify, inspect):
    app.command()(as_command(function))
tokenizer_app.command()(as_command(train))
