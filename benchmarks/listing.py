"""Cost of listing a million keys of a bucket, or 100,000 files of a folder: time and peak memory.

    python benchmarks/listing.py [--keys 1000000] [--files 100000] [--save]

The bucket is a server in a process of its own that answers ListObjectsV2 alone, 1000 keys a page, from a numbering: no
real server's time is in the figures. Each way runs in a process of its own; its memory is the peak resident size above
that of a process that lists nothing. fsspec's `find` is what storage.py did before. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from record import markdown_table, save

from lvlmrec import storage

PAGE = 1000
ITEM = (
    "<Contents><Key>videos/{:09d}.mp4</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    '<ETag>"0123456789abcdef0123456789abcdef"</ETag><Size>1000000</Size><StorageClass>STANDARD</StorageClass></Contents>'
)


class Lister(BaseHTTPRequestHandler):
    """A bucket of `keys` objects that can be listed and nothing else."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    keys = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("continuation-token", ["0"])[0])
        stop = min(start + min(int(query.get("max-keys", [PAGE])[0]), PAGE), self.keys)
        is_truncated = stop < self.keys
        token = f"<NextContinuationToken>{stop}</NextContinuationToken>" if is_truncated else ""
        items = "".join(ITEM.format(i) for i in range(start, stop))
        body = (
            f"<ListBucketResult><Name>b</Name><KeyCount>{stop - start}</KeyCount>"
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{token}{items}</ListBucketResult>"
        ).encode()
        self.send_response_only(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(keys: int, port: Connection) -> None:
    Lister.keys = keys
    server = ThreadingHTTPServer(("127.0.0.1", 0), Lister)
    port.send(server.server_address[1])
    server.serve_forever()


def nothing(uri: str) -> int:
    return int(storage.is_dir(uri)) - 1  # what a listing needs is imported and connected


def streamed(uri: str) -> int:
    return sum(1 for _ in storage.iter_files(uri, recursive=True))


def listed(uri: str) -> int:
    return len(storage.list_files(uri, recursive=True))


def found(uri: str) -> int:
    with storage._filesystem(uri) as (fs, path):
        return len(sorted(fs.find(path, detail=True).items()))


WAYS: dict[str, Callable[[str], int]] = {
    "nothing": nothing,
    "iter_files": streamed,
    "list_files": listed,
    "fsspec find": found,
}


def measure(way: str, uri: str, result: Connection) -> None:
    started = time.perf_counter()
    count = WAYS[way](uri)
    seconds = time.perf_counter() - started
    result.send((count, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measured(way: str, uri: str) -> tuple[int, float, float]:
    """Files, seconds and peak MB of one way of listing, in a new process."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(way, uri, there))
    process.start()
    result: tuple[int, float, float] = here.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(arguments.keys, there), daemon=True)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_REGION": "us-east-1",
    }
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.files):
            file = Path(folder, f"{i // 1000:03d}", f"{i:09d}.mp4")
            file.parent.mkdir(exist_ok=True)
            file.touch()
        for name, uri in (("bucket", "s3://b/videos"), ("folder", folder)):
            base = measured("nothing", uri)[2]
            for way in ("iter_files", "list_files", "fsspec find"):
                count, seconds, peak_mb = measured(way, uri)
                rows.append([name, way, count, f"{seconds:.1f}", f"{peak_mb - base:.0f}"])
    server.kill()
    text = markdown_table(["listed", "way", "files", "seconds", "peak MB above nothing"], rows)
    print(text)
    if arguments.save:
        print(save("listing", __doc__ or "", text))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
