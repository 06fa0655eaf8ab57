"""Names of files and objects are literal in every function of storage."""

import unicodedata
from pathlib import Path

import pytest

from lvlmrec import storage
from lvlmrec.extraction.manifest import read_manifest

NAMES = [
    "a::b.mp4",
    "simplecache::b.mp4",
    "::",
    "a*.mp4",
    "[ab].mp4",
    "a?.mp4",
    "a?versions.mp4",
    "a#t=3.mp4",
    "100%.mp4",
    "a%03d.mp4",
    "a%20b.mp4",
    "a+b c.mp4",
    " a .mp4",
    "~a.mp4",
    "{a}.mp4",
    "a\\b.mp4",
    "s3:a.mp4",
    unicodedata.normalize("NFD", "é.mp4"),
    "x" * 251 + ".mp4",
]
names = pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))


@pytest.fixture(params=["local", "s3", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, a prefix of a bucket on a real S3 server, and one of fsspec's other filesystems."""
    if request.param == "memory":
        return f"memory://{tmp_path}"
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('bucket')}/prefix"


@names
def test_every_function_takes_every_name(root: str, name: str) -> None:
    folder, uri = storage.join(root, name), storage.join(root, "folder", name)
    inner = storage.join(folder, name)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.create_bytes(inner, b"third") and not storage.create_bytes(inner, b"fourth")
    assert storage.read_bytes(uri) == b"second" and storage.read_bytes(inner) == b"third"
    assert storage.exists(uri) and storage.is_dir(folder) and not storage.is_dir(inner)
    assert storage.version(uri) != storage.version(inner)
    assert [file.uri for file in storage.iter_files(root, recursive=True)] == sorted([uri, inner])
    assert [file.uri for file in storage.iter_files(folder)] == [inner]
    with storage.local_copy(uri) as path:
        assert path.read_bytes() == b"second" and path.name == name
    storage.remove(uri)
    assert not storage.exists(uri) and storage.exists(inner)
    storage.remove(folder)
    assert storage.list_files(root, recursive=True) == []


@pytest.mark.parametrize(("name", "others"), [("a*", ["ab", "a"]), ("[ab]", ["a", "b"]), ("a?", ["ab"]), ("**", ["x"])])
def test_a_name_is_no_pattern_of_what_is_removed(root: str, name: str, others: list[str]) -> None:
    for other in others:
        storage.write_bytes(storage.join(root, other, "file"), b"")
    storage.write_bytes(storage.join(root, name, "file"), b"")
    storage.remove(storage.join(root, name))
    assert [file.uri for file in storage.iter_files(root, recursive=True)] == sorted(
        storage.join(root, other, "file") for other in others
    )


def test_a_prefix_goes_with_the_marks_that_consoles_put_there(bucket: str, s3_server: str) -> None:
    """Markers left behind would keep the removed folder listed."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3_server)
    for key in ("folder/", "folder/deep/", "folder/deep/file", "folder-2/file"):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key)
    storage.remove(f"{bucket}/folder")
    found = client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    assert [item["Key"] for item in found] == ["folder-2/file"]


@pytest.mark.parametrize("name", ["é" * 300 + ".mp4", "x" * 900 + ".mkv", "::" * 200 + ".mp4"])
def test_a_key_longer_than_a_files_name_is_copied(bucket: str, name: str) -> None:
    storage.write_bytes(f"{bucket}/{name}", b"frames")
    with storage.local_copy(f"{bucket}/{name}") as path:
        assert path.read_bytes() == b"frames"
        assert path.suffix == Path(name).suffix and name.endswith(path.name)


@names
def test_a_file_uri_is_what_a_path_writes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"frames")
    for uri in (path.as_uri(), path.as_uri().replace("file://", "file:"), path.as_uri().replace("///", "//localhost/")):
        assert not storage.is_remote(uri) and storage.is_absolute(uri)
        assert storage.absolute(uri) == str(path)
        assert storage.read_bytes(uri) == b"frames"
        with storage.local_copy(uri) as copy:
            assert copy == path


def test_a_file_uri_without_percent_signs_is_a_path_as_well(tmp_path: Path) -> None:
    """A percent sign that begins no code, a question mark and a hash stay as they are."""
    for name in ("a b?c#d.mp4", "100%.mp4"):
        (tmp_path / name).write_bytes(b"frames")
        assert storage.read_bytes(f"file://{tmp_path}/{name}") == b"frames"


def test_what_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("~/a.mp4") == "/home/ann/a.mp4"
    assert storage.absolute("~nobody-of-this-name.mp4") == f"{tmp_path}/~nobody-of-this-name.mp4"
    assert storage.absolute("a.mp4") == f"{tmp_path}/a.mp4"
    assert not storage.is_remote("/videos/https://host/a.mp4") and storage.is_remote("s3://bucket/a")


def test_relative_uris_of_a_manifest(tmp_path: Path) -> None:
    video = tmp_path / "~a::b [1]?.mp4"
    video.write_bytes(b"")
    uris = [video.name, video.as_uri(), str(video), f"file:{video}", "s3://bucket/a::b.mp4"]
    (tmp_path / "items.csv").write_text("item_id,uri\n" + "".join(f"{i},{uri}\n" for i, uri in enumerate(uris)))
    table, _ = read_manifest(str(tmp_path / "items.csv"))
    local = [storage.absolute(uri) for uri in table["uri"].to_pylist()[:4]]
    assert local == [str(video)] * 4
    assert table["uri"][4].as_py() == "s3://bucket/a::b.mp4"
