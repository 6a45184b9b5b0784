"""``dualtrain data``: make, check and look at datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bars

from dualtrain.errors import UserError, UserErrors
from dualtrain.recipe.schema import BuildSection

if TYPE_CHECKING:
    from dualtrain.data.dataset import DatasetInfo

app = typer.Typer(
    help="Make, check and look at datasets.", no_args_is_help=True, rich_markup_mode=None
)

_console = Console(highlight=False)


def _help(field: str) -> str:
    return BuildSection.model_fields[field].description or ""


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=_help("source"))],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    text_field: Annotated[str, typer.Option(help=_help("text_field"))] = "text",
    tokenizer: Annotated[str | None, typer.Option(help=_help("tokenizer"))] = None,
    vocab_size: Annotated[int, typer.Option(help=_help("vocab_size"))] = 4096,
    val_fraction: Annotated[float, typer.Option(help=_help("val_fraction"))] = 0.05,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the document order on disk.")] = 0,
    keep_order: Annotated[bool, typer.Option(help="Keep the source's document order.")] = False,
) -> None:
    """Convert text into a dataset: MDS shards, tokenizer, dataset.json."""
    there = (out / "dataset.json").exists()
    build = _build_section(
        source=source,
        text_field=text_field,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        shuffle_seed=None if keep_order else shuffle_seed,
    )
    build_with_bar(build, out)
    if there:
        _say(f"{out} is there already, made with the same settings")


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="Directory of the dataset.")]) -> None:
    """Check every shard's hash and every document's tokens."""
    from data_tools.verify import verify_dataset

    with _Bar() as bar:
        info = verify_dataset(path, progress=bar.show)
    _print(path, info)
    _say("every shard and every document is as it should be")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Directory of the dataset.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents of each split to show.")] = 2,
    characters: Annotated[int, typer.Option(min=1, help="Characters of each.")] = 300,
) -> None:
    """Show what a dataset holds, and the beginnings of some documents."""
    from data_tools.tokenizer import Tokenizer
    from dualtrain.data.dataset import DatasetInfo, TokenDataset

    info = DatasetInfo.load(path)
    _print(path, info)
    tokenizer = Tokenizer.load(path / info.tokenizer_file)
    for split in info.splits:
        dataset = TokenDataset.open(path, split)
        for document in range(min(documents, dataset.documents)):
            # Every token is at least a byte, but some take several to make one character.
            text = tokenizer.decode(dataset.read(document, 0, 4 * characters).tolist())
            _say(f"\n{split} document {document}, {dataset.lengths[document]:,} tokens:")
            _say(text[:characters])


def build_with_bar(build: BuildSection, path: Path) -> None:
    """Make a dataset unless it is there, showing how far it is, then what it holds.

    Raises:
        UserError: As :func:`data_tools.convert.build_dataset`.
    """
    from data_tools.convert import build_dataset
    from dualtrain.data.dataset import DATASET_FILE

    there = (path / DATASET_FILE).exists()
    with _Bar() as bar:
        info = build_dataset(build, path, progress=bar.show)
    if not there:
        _print(path, info)


def _build_section(**values: str | int | float | None) -> BuildSection:
    try:
        return BuildSection.model_validate(values)
    except ValidationError as error:
        problems = [
            UserError(
                "--" + str(e["loc"][0]).replace("_", "-"),
                f"{e['input']!r} is not allowed: {e['msg']}",
            )
            for e in error.errors()
        ]
        raise UserErrors(problems) from None


def _say(text: str) -> None:
    _console.print(text, soft_wrap=True, markup=False)


def _print(path: Path, info: DatasetInfo) -> None:
    _say(f"{path}: vocabulary {info.vocab_size:,}, tokens as {info.dtype}")
    for name, split in info.splits.items():
        _say(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.bytes:,} bytes of text ({split.bytes / split.tokens:.2f} bytes a token)"
        )
    if info.skipped_documents:
        _say(f"  {info.skipped_documents:,} empty documents left out")


class _Bar(Bars):
    """One line on stderr that follows a conversion's stages; silent where there is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("starting", total=None)

    def show(self, stage: str, done: int, total: int) -> None:
        self.update(self._task, description=stage, completed=done, total=total or None)
