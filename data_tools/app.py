"""``dualtrain data``: make, check and look at datasets."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from data_tools.reporting import StageProgress
from data_tools.view import ConversionView, print_facts, print_histogram, say
from dualtrain.common.errors import UserError, UserErrors
from dualtrain.common.files import in_utf8
from dualtrain.recipe.schema import BuildSection

app = typer.Typer(
    help="Make, check and look at datasets.", no_args_is_help=True, rich_markup_mode=None
)
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")


def _option(field: str, *names: str, default: str = "") -> Any:
    """An option of a conversion; None is what it is without, and so tells whether it was given."""
    about = BuildSection.model_fields[field].description
    return typer.Option(*names, help=about, show_default=default or True)


def _path(name: str) -> Callable[[str], Path]:
    """How a path is read: an empty one would be the current directory."""

    def path(text: str) -> Path:
        if not text:
            hint = "perhaps a variable of the shell is not set"
            raise UserError(name, "the path is empty", "a file or a directory", hint)
        return Path(text)

    return path


def _argument(help: str) -> Any:
    return typer.Argument(help=help, parser=_path("path"), metavar="PATH")


def _path_option(name: str, help: str) -> Any:
    return typer.Option(name, help=help, parser=_path(name), metavar="PATH")


_Sources = Annotated[
    list[str],
    typer.Argument(
        help="What to read, in this order. Each: a file, a directory, a glob pattern, - for "
        "standard input, builtin:python-docs."
    ),
]
_Format = Annotated[str | None, _option("format")]
_TextField = Annotated[str | None, _option("text_field", default="text")]
_Separator = Annotated[str | None, _option("separator")]
_OnError = Annotated[str | None, _option("on_error", default="stop")]
_MinCharacters = Annotated[int | None, _option("min_characters")]
_MaxCharacters = Annotated[int | None, _option("max_characters")]
_Seed = Annotated[
    int | None, typer.Option(help="Seed of the document order on disk.", show_default="0")
]
_KeepOrder = Annotated[bool, typer.Option(help="Keep the documents in the order of the sources.")]
_DropDuplicates = Annotated[bool, _option("drop_duplicates", "--drop-duplicates")]


@app.command()
def convert(
    sources: _Sources,
    out: Annotated[str, typer.Option(help="Directory to make, or a URL such as s3://bucket/name.")],
    format: _Format = None,
    text_field: _TextField = None,
    separator: _Separator = None,
    on_error: _OnError = None,
    min_characters: _MinCharacters = None,
    max_characters: _MaxCharacters = None,
    drop_duplicates: _DropDuplicates = False,
    tokenizer: Annotated[str | None, _option("tokenizer")] = None,
    tokenizer_pattern: Annotated[str | None, _option("tokenizer_pattern")] = None,
    vocab_size: Annotated[int | None, _option("vocab_size", default="4096")] = None,
    val_fraction: Annotated[float | None, _option("val_fraction")] = None,
    val_tokens: Annotated[int | None, _option("val_tokens")] = None,
    max_tokens: Annotated[int | None, _option("max_tokens")] = None,
    shuffle_seed: _Seed = None,
    keep_order: _KeepOrder = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that encode; default: one for each core.")
    ] = None,
    local: Annotated[
        Path | None,
        _path_option("--local", "With a URL: where the dataset is made first, and stays."),
    ] = None,
) -> None:
    """Convert text into a dataset: MDS shards, tokenizer, dataset.json."""
    _path("--out")(out)
    if tokenizer is not None and vocab_size is not None:
        what = f"{vocab_size} has no effect: {tokenizer} has a vocabulary of its own"
        raise UserError("--vocab-size", what, "one of --vocab-size and --tokenizer")
    if tokenizer is None and tokenizer_pattern is not None:
        what, hint = "has no effect: a tokenizer is trained", "name the rank file with --tokenizer"
        raise UserError("--tokenizer-pattern", what, "a rank file", hint)
    build = _build_section(
        source=sources,
        format=format,
        text_field=text_field,
        separator=separator,
        on_error=on_error,
        min_characters=min_characters,
        max_characters=max_characters,
        drop_duplicates=drop_duplicates,
        tokenizer=tokenizer,
        tokenizer_pattern=tokenizer_pattern,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        val_tokens=val_tokens,
        max_tokens=max_tokens,
        shuffle_seed=_order(shuffle_seed, keep_order),
    )
    from data_tools.remote import is_remote

    if is_remote(out):
        _convert_remote(build, out, local, workers)
        return
    if local is not None:
        raise UserError("--local", "goes with a URL as --out only", "leave it out")
    if not build_with_view(build, Path(out), workers=workers):
        say(f"{out} is there already, made with the same settings")


@app.command()
def merge(
    datasets: Annotated[list[Path], _argument("Datasets of the same tokenizer.")],
    out: Annotated[Path, _path_option("--out", "Directory to make.")],
    shuffle_seed: _Seed = None,
    keep_order: Annotated[bool, typer.Option(help="One dataset after another.")] = False,
    drop_duplicates: _DropDuplicates = False,
) -> None:
    """Put several datasets together into one; each document stays in its split."""
    from data_tools.merge import merge_datasets

    with ConversionView() as view:
        info = merge_datasets(
            datasets,
            out,
            shuffle_seed=_order(shuffle_seed, keep_order),
            drop_duplicates=drop_duplicates,
            report=view,
        )
    print_facts(out, info)


@app.command()
def verify(path: Annotated[Path, _argument("Directory of the dataset.")]) -> None:
    """Check every shard's size and hash, and every document's tokens."""
    from data_tools.verify import verify_dataset

    with ConversionView() as view:
        info = verify_dataset(path, report=view)
    print_facts(path, info)
    say("every shard and every document is as it should be")


@app.command()
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
    say(
        "  sources: "
        + (", ".join(file.path for file in info.sources[:5]) or "none named")
        + (f" and {len(info.sources) - 5:,} more" if len(info.sources) > 5 else "")
    )
    tokenizer = Tokenizer.load(path / info.tokenizer_file, special_tokens=info.special_tokens)
    for split in info.splits:
        dataset = TokenDataset.open(path, split)
        lengths = np.asarray(dataset.lengths)
        middle = int(np.median(lengths))
        say(
            f"\n{split}: documents of {lengths.min():,} to {lengths.max():,} tokens, "
            f"median {middle:,}, mean {lengths.mean():,.1f}"
        )
        print_histogram(length_histogram(lengths))
        for document in range(min(documents, dataset.documents)):
            say(f"\n{split} document {document}, {lengths[document]:,} tokens, as it is packed:")
            say(sample(dataset, tokenizer, document, characters))


@tokenizer_app.command()
def train(
    sources: _Sources,
    vocab_size: Annotated[int, _option("vocab_size")],
    out: Annotated[Path, _path_option("--out", "The tokenizer.json to write.")],
    format: _Format = None,
    text_field: _TextField = None,
    separator: _Separator = None,
    on_error: _OnError = None,
    min_characters: _MinCharacters = None,
    max_characters: _MaxCharacters = None,
) -> None:
    """Train a byte-level BPE tokenizer with the special tokens <unk> <s> </s> <pad> <mask>."""
    from data_tools.train_tokenizer import train_tokenizer

    build = _build_section(
        source=sources,
        format=format,
        text_field=text_field,
        separator=separator,
        on_error=on_error,
        min_characters=min_characters,
        max_characters=max_characters,
        vocab_size=vocab_size,
    )
    with ConversionView() as view:
        trained = train_tokenizer(build, out, report=view)
    say(
        f"{out}: vocabulary {trained.vocab_size:,}, {trained.bytes_per_token:.3f} bytes/token on "
        f"{trained.measured_bytes / 1e6:,.1f} MB of its text, encodes through {trained.backend}"
    )


def build_with_view(build: BuildSection, path: Path, *, workers: int | None = None) -> bool:
    """Make a dataset unless it is there, showing how far it is, then what it holds.

    Returns:
        Whether it was made now.

    Raises:
        UserError: As :func:`data_tools.convert.build_dataset`.
    """
    from data_tools.convert import build_dataset
    from dualtrain.data.dataset import LEFT_OUT_FILE

    began = time.monotonic()
    with ConversionView() as view:
        info = build_dataset(build, path, workers=workers, report=view)
    if not view.made:
        return False
    print_facts(path, info)
    encoded = f"; {view.encoded}" if view.encoded else ""
    say(f"  made in {time.monotonic() - began:.1f} s{encoded}")
    if (path / LEFT_OUT_FILE).exists():
        say(f"  what could not be read is listed in {path / LEFT_OUT_FILE}")
    return True


def _convert_remote(build: BuildSection, url: str, local: Path | None, workers: int | None) -> None:
    """Make a dataset on this machine and upload it, unless it is there."""
    from data_tools.accept import check_made_alike
    from data_tools.remote import check_destination, fetch_info, upload_dataset
    from dualtrain.common.files import writing
    from dualtrain.common.locks import locked

    there = fetch_info(url)
    if there is not None:
        check_made_alike(url, there, build)
        print_facts(url, there)
        say(f"{url} is there already, made with the same settings")
        return
    check_destination(url)  # before hours of work
    path = local or _upload_directory(url)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / f".{path.name}.upload.lock", remove=True):
        if local is None and _holds_another(path, build):
            say(f"{path}, left by an unfinished upload of something else, is removed")
            shutil.rmtree(path)
        build_with_view(build, path, workers=workers)
        with ConversionView() as view:
            upload_dataset(
                path,
                url,
                progress=lambda done, total: view.show(
                    StageProgress("uploading", done, total, "bytes")
                ),
            )
        if local is None:
            shutil.rmtree(path)
    say(f"uploaded to {url}")


def _holds_another(path: Path, build: BuildSection) -> bool:
    """Whether there is a dataset that was made differently."""
    from data_tools.accept import check_made_alike
    from dualtrain.data.dataset import DatasetInfo

    if not path.exists():
        return False
    try:
        check_made_alike(str(path), DatasetInfo.load(path), build)
    except UserError:
        return True
    return False


def _upload_directory(url: str) -> Path:
    """Where the dataset for a URL is made: the same place each time, to go on after a failure."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return cache / "dualtrain" / "uploads" / digest


def _order(seed: int | None, keep_order: bool) -> int | None:
    """The seed of the order on disk; None keeps that of the sources."""
    if keep_order and seed is not None:
        what = f"{seed} has no effect: --keep-order leaves the documents in their order"
        raise UserError("--shuffle-seed", what, "one of the two")
    return None if keep_order else seed or 0


def _build_section(**values: Any) -> BuildSection:
    """The settings of a conversion; None is an option that was not given."""
    given = {
        name: value
        for name, value in values.items()
        if value is not None or name == "shuffle_seed"  # of which None means something
    }
    for name, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not _is_unicode(text):
                where = "SOURCES" if name == "source" else "--" + name.replace("_", "-")
                hint = "give the directory that holds it, or rename it" if name == "source" else ""
                raise UserError(where, f"'{in_utf8(text)}' is not UTF-8", "text in UTF-8", hint)
    try:
        return BuildSection.model_validate(given)
    except ValidationError as error:
        raise UserErrors([_as_user_error(e) for e in error.errors()]) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_user_error(error: Any) -> UserError:
    field = str(error["loc"][0])
    expected = error["msg"].removeprefix("Input should be ")
    description = BuildSection.model_fields[field].description or ""
    return UserError(
        "--" + field.replace("_", "-"), f"{error['input']!r} is not allowed", expected, description
    )
