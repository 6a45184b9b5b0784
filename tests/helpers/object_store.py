"""A local S3 server, and datasets on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch
from uuid import uuid4

from helpers.datasets import distinct_documents, write_dataset

LENGTHS = [50, 7, 120, 33, 90, 64, 18, 101, 76, 5, 140, 58, 22, 87, 39, 110] * 2
SHARD_BYTES = 1000


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the server, with the environment that finds it, and give its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": host,
        "no_proxy": host,
    }
    with patch.dict(os.environ, environment):
        yield environment["S3_ENDPOINT_URL"]
    server.stop()


def s3_client():
    """A client of the server."""
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])


def new_bucket() -> str:
    """The URL of a directory in a new bucket."""
    name = f"bucket-{uuid4().hex[:8]}"
    s3_client().create_bucket(Bucket=name)
    return f"s3://{name}/some/where"


def hashed_dataset(path: Path) -> Path:
    """A dataset of many small shards, with their hashes in the index as the converter writes it."""
    train = distinct_documents(LENGTHS)
    val = distinct_documents([40, 60, 30])
    write_dataset(path, train, val, vocab_size=5000, shard_bytes=SHARD_BYTES)
    for index in path.glob("*/index.json"):
        content = json.loads(index.read_text())
        for entry in content["shards"]:
            raw = entry["raw_data"]
            raw["hashes"] = {
                "sha256": sha256((index.parent / raw["basename"]).read_bytes()).hexdigest()
            }
        index.write_text(json.dumps(content))
    return path
