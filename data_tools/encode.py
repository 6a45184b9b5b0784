"""Blocks of a source to token ids: in this process, or in several at once.

The reader walks the source in this process and only cuts it into blocks; parsing, filtering and
tokenizing, which take the time, are done by whoever gets the block. Results come back in the order
of the blocks, so that nothing of the output depends on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from data_tools.sources import BadInput, Block, Document
from data_tools.tokenizers.tokenizer import Backend, Tokenizer
from dualtrain.common.errors import UserError

EMPTY = "empty"
TOO_SHORT = "too short"
TOO_LONG = "too long"

_AHEAD = 2
"""Blocks that wait for each worker: enough that none ever waits for the reader."""
_DOCUMENT_BYTES = 1 << 31


class WorkerDiedError(UserError):
    """Not a fault of the input: the same command can go on."""


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens; travels to the workers."""

    tokenizer_json: str
    tokenizer_where: str
    special_tokens: Mapping[str, int]
    """Ids by role."""
    backend: Backend
    dtype: str
    min_characters: int = 0
    max_characters: int | None = None


@dataclass
class EncodedBlock:
    """The documents of a block that passed the filters, in order."""

    tokens: bytes
    """Of all documents, one after another, in the dataset's dtype."""
    lengths: np.ndarray
    """(documents,) int64: tokens of each."""
    hashes: np.ndarray
    """(documents,) uint64: :func:`text_hash` of each."""
    sizes: np.ndarray
    """(documents,) int64: UTF-8 bytes of each text."""
    filtered: Counter[str]
    """Documents left out by reason; no fault of the input."""
    problems: list[BadInput]
    """What could not be read or used, in order."""
    position: int
    """As :attr:`Block.position`."""


def text_hash(text: bytes) -> int:
    """The 64-bit hash of a document's UTF-8 bytes, which decides its split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def wanted(
    document: Document, *, min_characters: int = 0, max_characters: int | None = None
) -> str | None:
    """Why a document is left out: :data:`EMPTY`, :data:`TOO_SHORT`, :data:`TOO_LONG`, or None."""
    if not document.text or document.text.isspace():
        return EMPTY
    if len(document.text) < min_characters:
        return TOO_SHORT
    if max_characters is not None and len(document.text) > max_characters:
        return TOO_LONG
    return None


class Encoder:
    """Encodes blocks; one in each process."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._dtype = np.dtype(encoding.dtype)
        self._tokenizer = Tokenizer(
            encoding.tokenizer_json,
            where=encoding.tokenizer_where,
            backend=encoding.backend,
            special_tokens=encoding.special_tokens,
        )
        self._reserved = np.zeros(self._tokenizer.vocab_size, dtype=bool)
        self._reserved[list(self._tokenizer.special_ids)] = True
        self._reserved[self._tokenizer.special_tokens["<unk>"]] = False

    def encode(self, block: Block) -> EncodedBlock:
        """Encode a block; what is wrong with the input is in its result, never raised."""
        lengths: list[int] = []
        hashes: list[int] = []
        sizes: list[int] = []
        parts: list[bytes] = []
        problems: list[BadInput] = []
        filtered: Counter[str] = Counter()
        for document in block.documents():
            if isinstance(document, BadInput):
                problems.append(document)
                continue
            reason = wanted(
                document,
                min_characters=self._encoding.min_characters,
                max_characters=self._encoding.max_characters,
            )
            if reason is not None:
                filtered[reason] += 1
                continue
            tokens = self._tokens(document)
            if isinstance(tokens, BadInput):
                problems.append(tokens)
                continue
            text = document.text.encode()
            lengths.append(len(tokens))
            hashes.append(text_hash(text))
            sizes.append(len(text))
            parts.append(tokens.tobytes())
        return EncodedBlock(
            tokens=b"".join(parts),
            lengths=np.array(lengths, dtype=np.int64),
            hashes=np.array(hashes, dtype=np.uint64),
            sizes=np.array(sizes, dtype=np.int64),
            filtered=filtered,
            problems=problems,
            position=block.position,
        )

    def _tokens(self, document: Document) -> np.ndarray | BadInput:
        try:
            tokens = self._tokenizer.encode_array(document.text)
        except UserError as error:
            error = UserError(document.where, error.what, error.expected, error.hint)
            return BadInput("cannot be tokenized", error)
        most = _DOCUMENT_BYTES // self._dtype.itemsize
        if len(tokens) >= most:
            error = UserError(
                document.where,
                f"the document has {len(tokens):,} tokens",
                f"fewer than {most:,}: offsets in a shard have 32 bits",
                "divide it",
            )
            return BadInput("too many tokens", error)
        if self._reserved[tokens].any():
            error = UserError(
                document.where,
                "the tokenizer makes special tokens of this text",
                "ordinary tokens only",
                "use a byte-level tokenizer, or leave the tokenizer out to have one trained",
            )
            return BadInput("special tokens in the text", error)
        return tokens.astype(self._dtype)


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

    def encode(self, blocks: Iterable[Block], encoding: Encoding) -> Iterator[EncodedBlock]:
        """Encode blocks, in their order.

        Args:
            blocks: Read one by one, a few ahead of the results: memory does not grow with their
                number.

        Raises:
            WorkerDiedError: A worker process died.
        """
        if self._count == 1:
            yield from map(Encoder(encoding).encode, blocks)
            return
        waiting: deque[Future[EncodedBlock]] = deque()
        for block in blocks:
            waiting.append(self._threads.submit(self._encode, block, encoding))
            if len(waiting) > self._count * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _encode(self, block: Block, encoding: Encoding) -> EncodedBlock:
        worker = self._idle.get()
        try:
            return worker.encode(block, encoding)
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
        self._is_told = False

    def encode(self, block: Block, encoding: Encoding) -> EncodedBlock:
        try:
            if not self._is_told:
                self._pipe.send(encoding)
                self._is_told = True
            self._pipe.send(block)
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
        encoder = Encoder(pipe.recv())
        while True:
            block = pipe.recv()
            try:
                result: EncodedBlock | str = encoder.encode(block)
            except Exception:  # a defect of ours: shown where it is seen
                result = traceback.format_exc()
            pipe.send(result)
