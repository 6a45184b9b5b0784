"""Sources of text: files of many kinds, standard input and the embedded corpus.

:func:`open_sources` finds them; a :class:`Corpus` delivers blocks, which deliver documents.
"""

from data_tools.sources.documents import BadInput, Block, Corpus, CorpusFile, Document
from data_tools.sources.files import BUILTIN, PYTHON_DOCS
from data_tools.sources.find import open_sources

__all__ = [
    "BUILTIN",
    "PYTHON_DOCS",
    "Block",
    "Document",
    "CorpusFile",
    "BadInput",
    "Corpus",
    "open_sources",
]
