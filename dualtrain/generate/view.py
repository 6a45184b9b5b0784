"""What generating shows: text as it is generated, masks as they are filled, or lines.

On a terminal, text from left to right is printed as it comes: of several texts the first, and those
behind it once it has ended, each as far as it is by then. Diffusion is redrawn in place after each
step; :func:`frame` lays out one such picture and is a pure function, so that it can be tested
without a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text as Line
from tokenizers import Tokenizer

from dualtrain.common.formatting import printable
from dualtrain.generate.decode import TextStream, label_pieces
from dualtrain.generate.diffusion import Filled
from dualtrain.generate.texts import Text, TextJob, Watcher
from dualtrain.progress.report import AR_STYLE, DIFFUSION_STYLE

FRAME_S = 0.05
"""A picture stays so long at least: a small model would be done before anybody had seen it."""

Kind = Literal["given", "filled", "fresh", "masked"]
_MASK_CELL = " \u2592\u2592\u2592"
_STYLES: dict[Kind, str] = {
    "given": "",
    "filled": DIFFUSION_STYLE,
    "fresh": f"bold reverse {DIFFUSION_STYLE}",
    "masked": "bright_black",
}


class TextView(Watcher):
    """A watcher that also shows finished texts, in order.

    Args:
        with_headings: Whether several texts are made, so that each is headed by what it is.
        mask_id: The model's, where masks are filled.

    Attributes:
        paused_s: Time spent for the eyes only.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Tokenizer,
        *,
        with_headings: bool = False,
        mask_id: int | None = None,
    ) -> None:
        self.console, self.tokenizer, self.mask_id = console, tokenizer, mask_id
        self.with_headings = with_headings
        self.paused_s = 0.0

    def show(self, text: Text) -> None:
        """Show a text that is done."""

    def close(self) -> None:
        """Give back the terminal."""

    def head(self, job: TextJob) -> None:
        """Say which text follows."""
        if self.with_headings:
            self.console.out(f"--- {describe(job)} ---", style="dim", highlight=False)

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr)


class PlainTextView(TextView):
    """Finished texts as they are; for a pipe or a file."""

    def show(self, text: Text) -> None:
        self.head(text.job)
        self._write("".join(piece.text for piece in text.pieces(self.tokenizer)))

    def _write(self, line: str) -> None:
        self.console.file.write(line + "\n")
        self.console.file.flush()


class TraceView(PlainTextView):
    """Also a line for each step of diffusion, with ``_`` for each mask."""

    def begin(self, jobs: Sequence[TextJob]) -> None:
        self._rows = [_PartialText.of(job, self.mask_id) for job in jobs]

    def step(self, done: list[Filled]) -> None:
        for filled in done:
            row = self._rows[filled.row]
            row.take(filled)
            which = f"{describe(row.job)}, " if self.with_headings else ""
            text = "".join(text for text, _ in row.pieces(self.tokenizer, " _"))
            self._write(f"{which}step {row.steps} | {' '.join(text.splitlines()).strip()}")


class CountView(TextView):
    """How many texts are done; for those that go to a file.

    Args:
        total: Texts that are to be made.
    """

    def __init__(self, console: Console, tokenizer: Tokenizer, *, total: int) -> None:
        super().__init__(console, tokenizer)
        self._total, self._done = total, 0
        self._status = console.status(self._line())
        self._status.start()

    def show(self, text: Text) -> None:
        self._done += 1
        self._status.update(self._line())

    def close(self) -> None:
        self._status.stop()

    def _line(self) -> str:
        return f"{self._done} of {self._total} texts"


class StreamView(TextView):
    """Text from left to right on a terminal, as it comes."""

    def begin(self, jobs: Sequence[TextJob]) -> None:
        self._jobs = jobs
        self._streams = [TextStream(self.tokenizer) for _ in jobs]
        self._prompts = [
            stream.add(job.prompt.ids) for stream, job in zip(self._streams, jobs, strict=True)
        ]
        self._waiting, self._ended = [""] * len(jobs), [False] * len(jobs)
        self._front = 0
        self._open()

    def token(self, row: int, token: int | None) -> None:
        stream = self._streams[row]
        self._waiting[row] += stream.rest() if token is None else stream.add([token])
        self._ended[row] |= token is None
        if row != self._front:
            return
        self._print_waiting()
        while self._front < len(self._jobs) and self._ended[self._front]:
            self.console.out("")
            self._front += 1
            self._open()

    def _open(self) -> None:
        """Begin the text in front, as far as it is there."""
        if self._front < len(self._jobs):
            self.head(self._jobs[self._front])
            self._print(self._prompts[self._front], "")
            self._print_waiting()

    def _print_waiting(self) -> None:
        self._print(self._waiting[self._front], AR_STYLE)
        self._waiting[self._front] = ""

    def _print(self, text: str, style: str) -> None:
        if text:
            self.console.out(printable(text), style=style, end="", highlight=False)


class UnmaskView(TextView):
    """Diffusion on a terminal: the texts redrawn after each step, finished ones left behind."""

    _live: Live | None = None
    _drawn = 0.0

    def begin(self, jobs: Sequence[TextJob]) -> None:
        self.close()
        self._rows = [_PartialText.of(job, self.mask_id) for job in jobs]
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        self._draw()

    def step(self, done: list[Filled]) -> None:
        for filled in done:
            self._rows[filled.row].take(filled)
        self._draw()

    def show(self, text: Text) -> None:
        self.close()
        self.head(text.job)
        for piece in text.pieces(self.tokenizer):
            style = _STYLES["filled" if piece.label else "given"]
            self.console.out(printable(piece.text), style=style, end="", highlight=False)
        self.console.out("")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        assert self._live is not None  # begin has made it
        pause = max(0.0, self._drawn + FRAME_S - time.monotonic())
        time.sleep(pause)
        self.paused_s += pause
        size = self.console.size
        lines = frame(
            self._rows,
            self.tokenizer,
            width=size.width,
            height=size.height,
            with_headings=self.with_headings,
        )
        self._live.update(Line("\n").join(lines), refresh=True)
        self._drawn = time.monotonic()


@dataclass
class _PartialText:
    """One text as far as it is unmasked."""

    job: TextJob
    ids: list[int]
    kinds: list[Kind]
    steps: int = 0

    @classmethod
    def of(cls, job: TextJob, mask_id: int | None) -> _PartialText:
        ids = list(job.prompt.ids)
        return cls(job, ids, ["masked" if token == mask_id else "given" for token in ids])

    def take(self, filled: Filled) -> None:
        """Take what a step did."""
        self.kinds = ["filled" if kind == "fresh" else kind for kind in self.kinds]
        self.ids = filled.ids
        self.steps += 1
        for position in filled.fresh:
            self.kinds[position] = "fresh"

    def pieces(self, tokenizer: Tokenizer, cell: str) -> list[tuple[str, Kind]]:
        """The text in order, with a cell for each mask."""
        return [
            (cell * piece.tokens if piece.label == "masked" else piece.text, piece.label)
            for piece in label_pieces(self.ids, self.kinds, tokenizer)
        ]


def frame(
    rows: Sequence[_PartialText],
    tokenizer: Tokenizer,
    *,
    width: int,
    height: int,
    with_headings: bool,
) -> list[Line]:
    """Lay out texts in the making, in at most ``height - 1`` lines of at most ``width`` columns.

    Where there is not room for all, it is the part with what was filled last.
    """
    console = Console(width=width, file=None, color_system=None)
    lines: list[Line] = []
    fresh = 0
    for row in rows:
        left = row.kinds.count("masked")
        which = f"{describe(row.job)}, " if with_headings else ""
        lines.append(Line(f"{which}step {row.steps}, {left} masked", style="dim"))
        text = Line()
        for piece, kind in row.pieces(tokenizer, _MASK_CELL):
            text.append(printable(piece), _STYLES[kind])
        for line in text.wrap(console, width):
            lines.append(line)
            if any(span.style == _STYLES["fresh"] for span in line.spans):
                fresh = len(lines) - 1
    room = max(1, height - 1)
    first = max(0, min(fresh - room // 2, len(lines) - room))
    return lines[first : first + room]


def describe(job: TextJob) -> str:
    """Name a text for people, counting from 1."""
    return f"prompt {job.prompt.number + 1}, sample {job.sample + 1}"
