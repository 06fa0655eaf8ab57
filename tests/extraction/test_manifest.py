from pathlib import Path

import pandas as pd
import pytest

from lvlmrec import storage
from lvlmrec.errors import InputError
from lvlmrec.extraction.manifest import read_manifest


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_a_folder_is_a_manifest(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.MKV", "deep/c.mov", "INDEX.csv", "notes.txt", ".hidden.mp4", "no_suffix")
    table, report = read_manifest(str(tmp_path))
    assert table["item_id"].to_pylist() == ["a", "b", "c", "no_suffix"]
    assert table["uri"].to_pylist()[2] == str(tmp_path / "deep" / "c.mov")
    assert report == {"not_videos": 2}


def test_a_bucket_prefix_is_a_manifest(bucket: str) -> None:
    for name in ("videos/1.mp4", "videos/2.mp4", "other/3.mp4"):
        storage.write_bytes(f"{bucket}/{name}", b"x")
    table, _ = read_manifest(f"{bucket}/videos")
    assert table.to_pylist() == [{"item_id": str(i), "uri": f"{bucket}/videos/{i}.mp4"} for i in (1, 2)]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_a_manifest(tmp_path: Path, suffix: str) -> None:
    rows = [
        ("007", "007.mp4", "a, title"),
        ("x", "/abs/x.mp4", ""),
        ("y", "s3://bucket/y.mp4", "t"),
        ("x", "/abs/x.mp4", ""),
    ]
    frame = pd.DataFrame([*rows, ("", "z.mp4", ""), ("w", None, "")], columns=["item_id", "uri", "title"])
    frame = frame.assign(ignored=1)
    path = tmp_path / f"items.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    table, report = read_manifest(str(path), ["uri", "title"])
    assert table.column_names == ["item_id", "uri", "title"]
    assert table["item_id"].to_pylist() == ["007", "x", "y"]
    assert table["uri"].to_pylist() == [str(tmp_path / "007.mp4"), "/abs/x.mp4", "s3://bucket/y.mp4"]
    assert report == {"duplicate_rows": 1, "incomplete_rows": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("items.csv", b"item_id,url\n1,a.mp4\n", "no column 'uri'; its columns: item_id, url"),
        (
            "items.csv",
            b"item_id,uri\n1,a.mp4\n1,b.mp4\n",
            r"item_id '1' has several values of uri \(.*a\.mp4, .*b\.mp4\)",
        ),
        ("items.csv", b"item_id,uri\n", "holds no items"),
        ("items.csv", b"\xff\xfe\x00bad", "unreadable manifest"),
        ("items.parquet", b"not parquet", "unreadable manifest"),
        ("items.json", b"{}", r"a manifest is a \.csv or \.parquet file, a folder, a prefix or a feature set"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_folder_an_empty_one_and_colliding_stems(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such manifest, folder, prefix or feature set"):
        read_manifest(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no items"):
        read_manifest(str(tmp_path / "empty"))
    touch(tmp_path, "same.mp4", "same.mkv")
    with pytest.raises(InputError, match="'same' has several values of uri"):
        read_manifest(str(tmp_path))
