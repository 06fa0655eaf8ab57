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


def test_a_listing_is_in_the_order_of_uris_page_by_page(root: str) -> None:
    names = ["a.b/x", "a/x", "a/é", "a/z/1", "aa", "b", "é", "\U0001f600"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"")
    listed = [file.uri.removeprefix(f"{root}/") for file in storage.iter_files(root, recursive=True)]
    assert listed == sorted(names)
    assert next(storage.iter_files(root, recursive=True)).uri == f"{root}/a.b/x"


def test_a_listing_of_several_pages(bucket: str) -> None:
    for i in range(5):
        storage.write_bytes(f"{bucket}/many/{i}", b"")
    with storage._filesystem(f"{bucket}/many") as (fs, path):
        pages = list(storage._pages(fs, path, recursive=True, MaxKeys=2))
    assert [[file.uri for file in page] for page in pages] == [
        [f"{bucket}/many/{i}" for i in page] for page in ((0, 1), (2, 3), (4,))
    ]


def test_a_prefix_is_a_folder_of_its_own_name(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/videos-old/1.mp4", b"")
    assert not storage.is_dir(f"{bucket}/videos")
    assert storage.list_files(f"{bucket}/videos", recursive=True) == []
    assert storage.is_dir(bucket) and storage.list_files(bucket, recursive=True)
    assert not storage.is_dir("s3://no-such-bucket/videos") and not storage.exists("s3://no-such-bucket/videos")


def test_links_of_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_bytes(b"123")
    (folder / "link").symlink_to(folder / "deep" / "file")
    (folder / "broken").symlink_to(folder / "nothing")
    (folder / "deep" / "loop").symlink_to(folder)
    files = {f.uri.removeprefix(f"{folder}/"): f.size for f in storage.iter_files(str(folder), recursive=True)}
    assert files["deep/file"] == files["link"] == 3
    assert files.keys() == {"deep/file", "link", "broken"}  # a broken one is an item that will be rejected


def test_missing_files_raise_file_not_found(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    with pytest.raises(FileNotFoundError):
        storage.read_table(storage.join(root, "nothing.parquet"))


def test_a_version_changes_with_the_file(root: str) -> None:
    uri = storage.join(root, "file.bin")
    storage.write_bytes(uri, b"first")
    first = storage.version(uri)
    assert storage.version(uri) == first
    storage.write_bytes(uri, b"other")
    assert storage.version(uri) != first
    with pytest.raises(FileNotFoundError):
        storage.version(storage.join(root, "nowhere"))


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


def test_a_folder_that_can_be_written_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "missing"):
        storage.check_writable(str(tmp_path / name))
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
