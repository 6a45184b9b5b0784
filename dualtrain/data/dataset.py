"""A dataset on disk: ``dataset.json``, ``tokenizer.json``, and MDS shards by split.

One MDS sample is one document: its field ``tokens`` is an array of uint16 or uint32, without
``<s>`` and ``</s>``, so that the sequence length stays the recipe's choice. ``data_tools`` writes
these directories; ``batches`` reads them; preflight opens them with checks. A directory without
``dataset.json`` is not a dataset: that file is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, Literal, Protocol

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from dualtrain.common.errors import UserError, raise_together
from dualtrain.common.file_kinds import find_foreign, refuse_foreign
from dualtrain.common.files import user_path
from dualtrain.common.vocabulary import Vocabulary
from dualtrain.data.token_bytes import token_bytes

FORMAT = 1
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
"""The roles of special tokens; the tokens in these roles may have other names."""
DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
LENGTHS_FILE = "lengths.npy"
TEXT_BYTES_FILE = "text_bytes.npy"
"""(documents,) int64, UTF-8 bytes of each document's text: for merging, not for training."""
INDEX_FILE = "index.json"
LEFT_OUT_FILE = "left_out.jsonl"
"""What of the sources could not be read, one JSON object (kind, where, what) a line; not needed."""
TOKENS_FIELD = "tokens"

NOT_AN_ARRAY = (ValueError, EOFError, TokenError, SyntaxError, OverflowError, MemoryError)
"""What numpy raises for a damaged ``.npy`` file, whose header it parses as Python."""

_OPEN_FILES = 128
_HEADERS = (6, 7, 9, 13)
"""Bytes before the tokens of a sample: their size, number of dimensions, and 1, 2, 4 or 8 bytes."""
_CHECKED_DOCUMENTS = 16
_SHOWN_SHARDS = 10
_REMAKE = "make it again with `dualtrain data convert`, or restore the file"

Split = Literal["train", "val"]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitInfo(_Facts):
    """Totals of one split."""

    documents: int
    tokens: int
    """Tokens of all documents, without ``<s>`` and ``</s>``."""
    bytes: int
    """UTF-8 bytes of the text of all documents."""
    words: int | None = None
    """What white space divides in the text of all documents; None if nobody counted."""

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, int]:
        """Leave out words that nobody counted, so that files of earlier versions stay the same."""
        return {name: value for name, value in handler(self).items() if value is not None}


class SourceFile(_Facts):
    """One file that the text came from."""

    path: str
    bytes: int
    sha256: str | None = None
    """Of its content; None for large corpora."""


class DatasetInfo(_Facts):
    """``dataset.json``: what a dataset holds and how it was made."""

    format: Literal[1]
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    special_tokens: dict[str, int]
    """Ids by role, from :data:`SPECIAL_TOKENS`; ``<s>`` and ``</s>`` may be one."""
    special_ids: tuple[int, ...]
    """Every reserved id: never masked, never in a document (but ``<unk>``)."""
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, SplitInfo]
    skipped_documents: int
    """Documents of the sources that are not in the dataset."""
    left_out: dict[str, int] = {}
    """The same by reason, with the files that could not be read."""
    sources: tuple[SourceFile, ...]
    arguments: dict[str, bool | int | float | str | list[str] | None]
    """The settings that the dataset was made with."""

    @model_validator(mode="after")
    def _check(self) -> DatasetInfo:
        if "train" not in self.splits:
            raise ValueError("splits lacks train")
        if missing := [name for name in SPECIAL_TOKENS if name not in self.special_tokens]:
            raise ValueError(f"special_tokens lacks {', '.join(missing)}")
        for name, token in self.special_tokens.items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"special_tokens: {name} is {token}, outside the vocabulary of"
                    f" {self.vocab_size:,} tokens"
                )
            if token not in self.special_ids:
                raise ValueError(f"special_ids lacks {token}, the id of {name}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> DatasetInfo:
        """Read the facts of the dataset in directory `path`; opens no shard, imports no torch.

        Raises:
            UserError: There is no dataset there, or only a part of one.
        """
        file = user_path(path) / DATASET_FILE
        try:
            return cls.model_validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise _absent(file.parent) from None
        except OSError as error:
            raise UserError(str(file), f"cannot be read: {error.strerror}") from None
        except ValidationError as error:
            refuse_foreign(file, "the facts of a dataset")
            problems = "; ".join(
                ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")])
                for e in error.errors()[:3]
            )
            what = f"is not a dataset of format {FORMAT}: {problems}"
            raise UserError(str(file), what, hint=_REMAKE) from None

    @property
    def fingerprint(self) -> str:
        """A short hash of all these facts: datasets that differ in any have different ones.

        But for words, which follow from the text, and which earlier versions did not count.
        """
        facts = self.model_dump_json(exclude={"splits": {"__all__": {"words"}}})
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            size=self.vocab_size,
            special_ids=self.special_ids,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            mask=self.mask_id,
            stop_ids=(self.bos_id, self.eos_id),
        )

    @property
    def bos_id(self) -> int:
        return self.special_tokens["<s>"]

    @property
    def eos_id(self) -> int:
        return self.special_tokens["</s>"]

    @property
    def pad_id(self) -> int:
        return self.special_tokens["<pad>"]

    @property
    def mask_id(self) -> int:
        return self.special_tokens["<mask>"]


@contextmanager
def _reading(file: Path, expected: str) -> Iterator[None]:
    """Name a file that cannot be read, or is not what it is taken for."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(str(file), f"cannot be read: {error.strerror}", hint=_REMAKE) from None
    except (KeyError, TypeError, *NOT_AN_ARRAY) as error:
        refuse_foreign(file, expected)
        raise UserError(str(file), f"is damaged: {error!r}", expected, _REMAKE) from None


def _absent(path: Path) -> UserError:
    if not path.exists():
        return UserError(
            str(path),
            "there is no dataset",
            "a directory made by `dualtrain data convert`",
            "give data.build to have it made, or correct data.path",
        )
    if (path / INDEX_FILE).exists() or any(path.glob(f"*/{INDEX_FILE}")):
        return UserError(
            str(path),
            f"has shards but no {DATASET_FILE}: it is half-written, or made by another tool",
            "a directory made by `dualtrain data convert`",
            "remove it and make it again",
        )
    return UserError(
        str(path),
        f"is not a dataset: it has no {DATASET_FILE}",
        "a directory made by `dualtrain data convert`",
    )


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard file, as ``index.json`` describes it."""

    name: str
    bytes: int
    documents: int
    hashes: dict[str, str]
    zip_name: str | None


class ShardSource(Protocol):
    """Where shards come from that need not be on disk: ``shard_cache.ShardCache``."""

    def is_local(self, split: Split, shard: Shard) -> bool: ...

    def require(self, split: Split, shard: Shard) -> None: ...

    def fetch_ahead(self, split: Split, shards: Sequence[Shard]) -> None: ...

    def fetch_all(self, split: Split, shards: Sequence[Shard]) -> None: ...

    def close(self) -> None: ...


class TokenDataset:
    """One split: random access to the tokens of its documents.

    Made by :meth:`open`. Safe to use from several threads.
    """

    def __init__(
        self,
        path: str | Path,
        split: Split,
        info: DatasetInfo,
        source: ShardSource | None = None,
    ) -> None:
        self.path = user_path(path)
        self.split: Split = split
        self.info = info
        self._source = source
        self.directory = self.path / split
        if split not in info.splits:
            where, splits = str(self.path / DATASET_FILE), ", ".join(sorted(info.splits))
            raise UserError(where, f"has no split '{split}'", f"one of {splits}")
        self.shards = self._read_index()
        self.lengths = self._read_lengths()
        self._shard_ends = list(accumulate(shard.documents for shard in self.shards))
        self._shard_begins = [0, *self._shard_ends]
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: Split = "train",
        *,
        check: bool = True,
        source: ShardSource | None = None,
    ) -> TokenDataset:
        """Open a split of the dataset in directory `path`.

        Args:
            path: Directory that holds ``dataset.json``.
            split: ``train`` or ``val``.
            check: Also check the tokenizer's hash, the presence and size of every shard, and some
                documents: cheap, whatever the size of the corpus.
            source: Where shards come from when they are read, checked on their way; only documents
                whose shards are here are then looked at. None: all shards must be here.

        Raises:
            UserError: Missing, half-written or damaged dataset; names the shard or the file.
        """
        dataset = cls(path, split, DatasetInfo.load(path), source)
        if check:
            dataset.check_tokenizer()
            if source is None:
                dataset.check_shards()
            dataset.check_documents()
        return dataset

    @property
    def facts(self) -> SplitInfo:
        return self.info.splits[self.split]

    @property
    def documents(self) -> int:
        return self.facts.documents

    @property
    def tokens(self) -> int:
        """Tokens of all documents, without ``<s>`` and ``</s>``."""
        return self.facts.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, without ``<s>`` and ``</s>``."""
        return self.facts.bytes / self.facts.tokens

    @property
    def tokenizer_path(self) -> Path:
        return self.path / self.info.tokenizer_file

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocabulary,) int64: bytes of text that each token stands for."""
        return token_bytes(self.tokenizer_path, self.info.special_ids)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, as (stop - start,) of the dataset's dtype.

        Only they are read from the disk: sequences come from all over the corpus, and a document
        may be a whole library.
        """
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        shard = self._shard(document)
        try:
            with self._lock:
                if self._source is not None:
                    self._source.require(self.split, shard)
                return self._read_tokens(self._file(shard), document, start, max(start, stop))
        except FileNotFoundError:
            what = "shard is missing"
        except OSError as error:
            what = f"document {document} cannot be read: {error.strerror}"
        raise UserError(str(self.shard_of(document)), what, hint=_REMAKE)

    def prepare(self, documents: Iterable[int]) -> None:
        """Have the shards of documents fetched at once that will be read one after another."""
        if self._source is None:
            return
        self._source.fetch_ahead(self.split, [self._shard(document) for document in documents])

    def prepare_all(self, documents: int) -> None:
        """Have the shards of the first documents fetched in the background, if there is room."""
        if self._source is not None:
            last = bisect_right(self._shard_ends, documents - 1)
            self._source.fetch_all(self.split, self.shards[: last + 1])

    def close(self) -> None:
        """Close all files, and fetch no shards any more."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()
        if self._source is not None:
            self._source.close()

    def shard_of(self, document: int) -> Path:
        """The shard file that holds a document."""
        return self.directory / self._shard(document).name

    def check_tokenizer(self) -> None:
        """Raise UserError if ``tokenizer.json`` is not the one the documents were encoded with."""
        with _reading(self.tokenizer_path, "a tokenizer.json"):
            found = hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()
        if found != self.info.tokenizer_sha256:
            refuse_foreign(self.tokenizer_path, "a tokenizer.json")
            raise UserError(
                str(self.tokenizer_path),
                f"is not the tokenizer of these shards: its sha256 is {found[:12]}…",
                f"{self.info.tokenizer_sha256[:12]}… as in {DATASET_FILE}",
                _REMAKE,
            )

    def check_shards(self) -> None:
        """Raise UserError naming each shard that is missing or has another size."""
        errors = [error for shard in self.shards if (error := self.shard_error(shard))]
        if more := len(errors[_SHOWN_SHARDS:]):
            last = UserError(str(self.directory), f"{more} more shards are damaged")
            errors = [*errors[:_SHOWN_SHARDS], last]
        raise_together(errors)

    def check_documents(self) -> None:
        """Raise UserError if documents spread over the split do not fit dtype and vocabulary."""
        picked = np.linspace(0, self.documents - 1, _CHECKED_DOCUMENTS).astype(np.int64)
        for document in np.unique(picked).tolist():
            if self._source is None or self._source.is_local(self.split, self._shard(document)):
                self.check_document(document)

    def check_document(self, document: int) -> None:
        """Raise UserError if a document has an id outside the vocabulary, or a reserved one."""
        tokens = self.read(document)
        reserved = set(self.info.special_ids) - {self.info.special_tokens["<unk>"]}
        wrong = int(tokens.max()) >= self.info.vocab_size
        if wrong or not reserved.isdisjoint(np.unique(tokens).tolist()):
            raise UserError(
                str(self.shard_of(document)),
                f"document {document} has "
                + (f"token id {tokens.max()}" if wrong else "reserved token ids"),
                f"ordinary ids below {self.info.vocab_size}, the tokenizer's vocabulary",
                _REMAKE,
            )

    def _read_index(self) -> tuple[Shard, ...]:
        file = self.directory / INDEX_FILE
        column = [[TOKENS_FIELD], [f"ndarray:{self.info.dtype}"]]
        shards = []
        with _reading(file, "an MDS index"):
            for entry in json.loads(file.read_bytes())["shards"]:
                if [entry["column_names"], entry["column_encodings"]] != column:
                    raise UserError(
                        str(file),
                        f"holds {entry['column_names']} as {entry['column_encodings']}",
                        f"only '{TOKENS_FIELD}' as ndarray:{self.info.dtype}",
                        _REMAKE,
                    )
                raw, packed = entry["raw_data"], entry["zip_data"]
                shards.append(
                    Shard(
                        name=raw["basename"],
                        bytes=raw["bytes"],
                        documents=entry["samples"],
                        hashes=raw["hashes"],
                        zip_name=packed["basename"] if packed else None,
                    )
                )
        if (found := sum(shard.documents for shard in shards)) != self.documents:
            raise UserError(
                str(file), f"counts {found} documents", f"{self.documents} as in {DATASET_FILE}"
            )
        return tuple(shards)

    def _read_lengths(self) -> np.ndarray:
        file = self.directory / LENGTHS_FILE
        with _reading(file, "the lengths of documents"):
            lengths = np.load(file, mmap_mode="r", allow_pickle=False)
        if lengths.dtype != np.int64 or lengths.shape != (self.documents,):
            raise UserError(
                str(file),
                f"holds {lengths.shape} {lengths.dtype}",
                f"({self.documents},) int64: the tokens of each document",
                _REMAKE,
            )
        return np.asarray(lengths)  # still mapped, but quicker to take single numbers from

    def shard_error(self, shard: Shard) -> UserError | None:
        """What is wrong with the presence or the size of a shard, if anything."""
        file = self.directory / shard.name
        expected = f"{shard.bytes:,} bytes as in {INDEX_FILE}"
        if not file.exists():
            packed = shard.zip_name is not None and (self.directory / shard.zip_name).exists()
            hint = f"only {shard.zip_name} is there: decompress it" if packed else _REMAKE
            return UserError(str(file), "shard is missing", expected, hint)
        if (size := file.stat().st_size) != shard.bytes:
            other = find_foreign(file, expected)
            return other or UserError(str(file), f"shard has {size:,} bytes", expected, _REMAKE)
        return None

    def _shard(self, document: int) -> Shard:
        return self.shards[bisect_right(self._shard_ends, document)]

    def _file(self, shard: Shard) -> BinaryIO:
        """A shard's file; those that were read last stay open."""
        file = self._files.get(shard.name)
        if file is None:
            file = self._files[shard.name] = (self.directory / shard.name).open("rb", 0)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(shard.name)
        return file

    def _read_tokens(self, file: BinaryIO, document: int, start: int, stop: int) -> np.ndarray:
        """Read from an MDS shard: a count, where each sample begins and ends, then the samples.

        A sample is here its size in four bytes, the number of tokens in two to nine, the tokens.
        """
        number = document - self._shard_begins[bisect_right(self._shard_ends, document)]
        begin, end = np.frombuffer(self._bytes_at(file, 4 + 4 * number, 8, document), np.uint32)
        dtype, length = np.dtype(self.info.dtype), int(self.lengths[document])
        header = int(end) - int(begin) - length * dtype.itemsize
        if header not in _HEADERS:
            raise UserError(
                str(self.shard_of(document)),
                f"document {document} does not have the {length} tokens of {LENGTHS_FILE}",
                hint=_REMAKE,
            )
        first = int(begin) + header + start * dtype.itemsize
        return np.frombuffer(
            self._bytes_at(file, first, (stop - start) * dtype.itemsize, document), dtype
        )

    def _bytes_at(self, file: BinaryIO, offset: int, size: int, document: int) -> bytes:
        found = os.pread(file.fileno(), size, offset)
        if len(found) != size:
            raise UserError(
                str(self.shard_of(document)),
                f"document {document} cannot be read: the shard ends before it",
                hint=_REMAKE,
            )
        return found


def check_held_out(dataset: TokenDataset, sequence_length: int, *, append_eos: bool) -> int:
    """The sequences of a held-out split."""
    tokens = dataset.tokens + (dataset.documents if append_eos else 0)
    if tokens < sequence_length:
        raise UserError(
            str(dataset.directory),
            f"the held-out split has {tokens:,} tokens",
            f"at least one sequence, {sequence_length:,}",
            "hold out more (data.build.val_fraction) or lower sequence_length",
        )
    return tokens // sequence_length
