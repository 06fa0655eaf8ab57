from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from lvlmrec import storage
from lvlmrec.errors import InputError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and a prefix of a bucket on a real S3 server: every test here runs on both."""
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('bucket')}/prefix"


def test_what_is_written_is_read(root: str) -> None:
    uri = storage.join(root, "folder", "file.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.exists(uri)
    assert storage.is_dir(storage.join(root, "folder"))
    assert not storage.is_dir(uri)


def test_a_listing_is_sorted_and_fresh(root: str) -> None:
    assert storage.list_files(root) == []
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden"):
        storage.write_bytes(storage.join(root, name), b"12345")
    assert [f.uri for f in storage.list_files(root)] == [f"{root}/a.txt", f"{root}/b.txt"]
    assert [f.uri for f in storage.list_files(root, recursive=True)][-1] == f"{root}/deep/c.txt"
    assert {f.size for f in storage.list_files(root)} == {5}
    assert all(f.modified > 1e9 for f in storage.list_files(root))


def test_missing_files_raise_file_not_found(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    with pytest.raises(FileNotFoundError):
        storage.read_table(storage.join(root, "nothing.parquet"))


def test_a_file_is_created_once(root: str) -> None:
    uri = storage.join(root, "folder", "lease")
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    storage.remove(uri)
    assert storage.create_bytes(uri, b"third")


def test_of_many_creators_one_wins(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "exists", lambda uri: False)  # all come between each other's look and write
    uri = storage.join(root, "lease")
    storage.list_files(root)  # connects
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(uri, b"%d" % i), range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert [f.uri for f in storage.list_files(root)] == [uri]


def test_tables_and_columns(root: str) -> None:
    uri = storage.join(root, "table.parquet")
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    storage.write_table(uri, table)
    assert storage.read_table(uri) == table
    assert storage.read_table(uri, ["b"]).column_names == ["b"]


def test_local_copy_has_the_content_and_the_name(root: str) -> None:
    uri = storage.join(root, "video.mp4")
    storage.write_bytes(uri, b"frames")
    with storage.local_copy(uri) as path:
        assert path.read_bytes() == b"frames"
        assert path.name == "video.mp4"
    assert path.exists() == (not storage.is_remote(uri))


def test_remove(root: str) -> None:
    storage.write_bytes(storage.join(root, "folder", "file"), b"")
    storage.remove(storage.join(root, "folder"))
    storage.remove(storage.join(root, "folder"))
    assert not storage.exists(storage.join(root, "folder", "file"))


def test_a_failed_local_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(uri, "not bytes")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert storage.read_bytes(uri) == b"old"


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(InputError, match="nowhere://"):
        storage.exists("nowhere://bucket/key")


def test_absolute_keeps_remote_uris() -> None:
    assert storage.absolute("s3://bucket/key/") == "s3://bucket/key"
    assert storage.absolute("file:///a/b") == "/a/b"
    assert Path(storage.absolute("relative")).is_absolute()
