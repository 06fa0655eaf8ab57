"""S3 requests: which errors are temporary, pages of a listing, deletion. `fs` is an s3fs filesystem."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError, FlexibleChecksumError, IncompleteReadError, ResponseStreamingError
from botocore.parsers import ResponseParserError

# Some stores deny access under load. An error of a HEAD request has no code but its status.
PASSING_CODES = {"AccessDenied", "403", "RequestTimeout", "ConditionalRequestConflict"}
PASSING_STATUS = {429, 500, 502, 503, 504}
GARBLED = (FlexibleChecksumError, IncompleteReadError, ResponseParserError)  # answers that were damaged on the way


def is_passing(error: BaseException) -> bool:
    """Whether the error may be temporary, so that the request is worth a retry."""
    if not isinstance(error, ClientError):
        return isinstance(error, (ResponseStreamingError, *GARBLED))
    return error.response["Error"].get("Code") in PASSING_CODES or http_status(error) in PASSING_STATUS


def http_status(error: BaseException | None) -> int:
    """The HTTP status of the answer that led to `error`, 0 without an answer."""
    while error is not None:
        if isinstance(error, ClientError):
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        error = error.__cause__
    return 0


def list_pages(fs: Any, path: str, recursive: bool, **options: Any) -> Iterator[list[dict[str, Any]]]:
    """The entries of S3's listing under a prefix, up to 1000 at a time, in the order of their keys."""
    bucket, key, _ = fs.split_path(path)
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "Delimiter": "" if recursive else "/"} | options
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        yield page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def delete_all(fs: Any, path: str) -> None:
    """Delete an object and all objects under it as a prefix; failures of single deletions are not raised."""
    bucket, key, _ = fs.split_path(path)
    for page in list_pages(fs, path, recursive=True):
        if page:
            keys = [{"Key": item["Key"]} for item in page]
            fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
    fs.call_s3("delete_object", Bucket=bucket, Key=key)
