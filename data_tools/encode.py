"""Blocks of a source to token ids: in this process, or in several at once.

The reader walks the source in this process and only cuts it into blocks; parsing, filtering and
tokenizing, which take the time, are done by whoever gets the block. Results come back in the order
of the blocks, so that nothing of the output depends on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import pickle
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from data_tools.sources import BadInput, Block, Document
from data_tools.tokenizers.tokenizer import Backend, Tokenizer
from dualtrain.common.errors import UserError
from dualtrain.recipe.schema import BuildSection

EMPTY = "empty"
TOO_SHORT = "too short"
TOO_LONG = "too long"

_AHEAD = 2
"""Blocks that wait for each worker: enough that none ever waits for the reader."""
_DOCUMENT_BYTES = 1 << 31


class WorkerDiedError(UserError):
    """Not a fault of the input: the same command can go on."""


DOCUMENT_ROW = np.dtype(
    [("length", "<i8"), ("hash", "<u8"), ("bytes", "<i8"), ("words", "<i8"), ("is_val", "?")]
)
"""What is known of an encoded document: tokens, :func:`text_hash`, and of its text UTF-8 bytes and
words, which white space divides; and whether its source is held out."""


@dataclass
class EncodedBlock:
    """The documents of a block that passed the filters, in order."""

    tokens: bytes
    """Of all documents, one after another, in the dataset's dtype."""
    table: np.ndarray
    """(documents,) of :data:`DOCUMENT_ROW`."""
    filtered: Counter[str]
    """Documents left out by reason; no fault of the input."""
    problems: list[BadInput]
    """What could not be read or used, in order."""
    position: int
    """As :attr:`Block.position`."""


def text_hash(text: bytes) -> int:
    """The 64-bit hash of a document's UTF-8 bytes, which decides its split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def reason_to_leave_out(document: Document, build: BuildSection) -> str | None:
    """:data:`EMPTY`, :data:`TOO_SHORT` or :data:`TOO_LONG`; None for a document that is wanted."""
    if not document.text or document.text.isspace():
        return EMPTY
    if len(document.text) < build.min_characters:
        return TOO_SHORT
    if build.max_characters is not None and len(document.text) > build.max_characters:
        return TOO_LONG
    return None


@dataclass(frozen=True)
class Encoder:
    """Encodes blocks; travels to the workers, where it makes a tokenizer of its own."""

    build: BuildSection
    tokenizer_json: str
    special_tokens: Mapping[str, int]
    """Ids by role."""
    backend: Backend
    dtype: str

    def encode(self, block: Block) -> EncodedBlock:
        """Encode a block; what is wrong with the input is in its result, never raised."""
        rows: list[tuple[int, int, int, int, bool]] = []
        parts: list[bytes] = []
        problems: list[BadInput] = []
        filtered: Counter[str] = Counter()
        for document in map(self._with_text, block.documents()):
            if isinstance(document, BadInput):
                problems.append(document)
            elif reason := reason_to_leave_out(document, self.build):
                filtered[reason] += 1
            elif isinstance(tokens := self._tokens(document), BadInput):
                problems.append(tokens)
            else:
                text = document.text.encode()
                words = len(document.text.split())
                rows.append((len(tokens), text_hash(text), len(text), words, block.is_val))
                parts.append(tokens.tobytes())
        table = np.array(rows, dtype=DOCUMENT_ROW)
        return EncodedBlock(b"".join(parts), table, filtered, problems, block.position)

    def _with_text(self, document: Document | BadInput) -> Document | BadInput:
        """The text of a document that comes as token ids."""
        if isinstance(document, BadInput) or document.ids is None:
            return document
        ids = document.ids
        text_ids = len(self._reserved)
        wrong = ids[(ids < 0) | (ids >= text_ids)]
        if not len(wrong):
            wrong = ids[self._reserved[ids]]
        if len(wrong):
            return BadInput.at(
                "ids that are no text",
                document.where,
                f"holds the id {wrong[0]}, which is no text in this tokenizer",
                f"ids of text, below {text_ids:,}",
                "name the tokenizer that made them; --separator is the id between documents",
            )
        return replace(document, text=self._tokenizer.decode_array(ids))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(
            self.tokenizer_json,
            where=self.build.tokenizer or "trained tokenizer",
            backend=self.backend,
            special_tokens=self.special_tokens,
        )

    @cached_property
    def _reserved(self) -> np.ndarray:
        """(vocabulary,) bool: ids that no text may have."""
        reserved = np.zeros(self._tokenizer.vocab_size, dtype=bool)
        reserved[list(self._tokenizer.special_ids)] = True
        reserved[self._tokenizer.special_tokens["<unk>"]] = False
        return reserved

    def _tokens(self, document: Document) -> np.ndarray | BadInput:
        try:
            tokens = document.ids
            if tokens is None:
                tokens = self._tokenizer.encode_array(document.text)
        except UserError as error:
            error = UserError(document.where, error.what, error.expected, error.hint)
            return BadInput("cannot be tokenized", error)
        most = _DOCUMENT_BYTES // np.dtype(self.dtype).itemsize
        if len(tokens) >= most:
            return BadInput.at(
                "too many tokens",
                document.where,
                f"the document has {len(tokens):,} tokens",
                f"fewer than {most:,}: offsets in a shard have 32 bits",
                "divide it",
            )
        if self._reserved[tokens].any():
            return BadInput.at(
                "special tokens in the text",
                document.where,
                "the tokenizer makes special tokens of this text",
                "ordinary tokens only",
                "use a byte-level tokenizer, or leave the tokenizer out to have one trained",
            )
        return tokens.astype(self.dtype)


class Workers:
    """Processes that encode blocks; they start at once, to be ready when the tokenizer is.

    Use it as a context manager. (A ``ProcessPoolExecutor`` hangs, in Python before 3.12, when a
    worker dies while a large task is on its way to it.)

    Args:
        count: How many; 1 encodes in this process.
    """

    def __init__(self, count: int) -> None:
        self.are_processes = count > 1
        self._count = count
        self._workers = [_Worker() for _ in range(count)] if count > 1 else []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encode")

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def encode(self, blocks: Iterable[Block], encoder: Encoder) -> Iterator[EncodedBlock]:
        """Encode blocks, in their order.

        Args:
            blocks: Read one by one, a few ahead of the results: memory does not grow with their
                number.

        Raises:
            WorkerDiedError: A worker process died.
        """
        if self._count == 1:
            yield from map(encoder.encode, blocks)
            return
        waiting: deque[Future[EncodedBlock]] = deque()
        for block in blocks:
            waiting.append(self._threads.submit(self._encode, block, encoder))
            if len(waiting) > self._count * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, block: Block, encoder: Encoder) -> EncodedBlock:
        worker = self._idle.get()
        try:
            return worker.encode(block, encoder)
        finally:
            self._idle.put(worker)  # a dead one as well: there are as many as there are threads


class _Worker:
    """One process, and our end of the pipe to it; one block at a time."""

    def __init__(self) -> None:
        # Not by fork: this process has threads (the tokenizer's, perhaps torch's).
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._has_encoder = False

    def encode(self, block: Block, encoder: Encoder) -> EncodedBlock:
        try:
            if not self._has_encoder:
                _send(self._pipe, encoder)
                self._has_encoder = True
            _send(self._pipe, block)
            result = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerDiedError(
                "data convert",
                "a worker process died, perhaps for want of memory",
                hint="give fewer --workers; what is done is kept, and the same command goes on",
            ) from None
        if isinstance(result, str):
            raise RuntimeError(f"in a worker process:\n{result}")
        return result

    def end(self) -> None:
        """Whatever it is doing: it has nothing to lose."""
        self._process.kill()
        self._process.join()
        # The pipe stays open: a thread may still read its end.


def _serve(pipe: Connection) -> None:
    """What a worker does: blocks in, encoded blocks out, until its parent ends it, or ends."""
    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import tiktoken  # noqa: F401  (takes a moment, like the rest of starting: before it is needed)

    with contextlib.suppress(EOFError, OSError):
        encoder: Encoder = pipe.recv()
        while True:
            block = pipe.recv()
            try:
                result: EncodedBlock | str = encoder.encode(block)
            except Exception:  # a defect of ours: shown where it is seen
                result = traceback.format_exc()
            _send(pipe, result)


def _send(pipe: Connection, value: object) -> None:
    """As ``pipe.send``, which keeps a view of its buffer in the traceback of its errors.

    When Python 3.12 clears such a view away, the process ends with a segmentation fault.
    """
    pipe.send_bytes(pickle.dumps(value))
