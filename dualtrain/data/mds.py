"""All that is used of mosaicml-streaming: its writer of shards, its downloaders and its uploaders.

Reading shards is our own (``dataset``). To import this takes seconds, as it brings torch and
transformers: so it is imported where it is called. ``CloudDownloader.get`` and
``CloudUploader.get`` take the URL of a directory; ``download`` and ``upload_file`` one file in it.
"""

from streaming import MDSWriter
from streaming.base.storage import CloudDownloader
from streaming.base.storage.upload import UPLOADERS, CloudUploader

__all__ = ["UPLOADERS", "CloudDownloader", "CloudUploader", "MDSWriter"]
