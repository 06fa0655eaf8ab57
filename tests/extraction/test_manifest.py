import os
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
    assert report == {"not_videos": 2, "not_videos_tables": 1, "not_videos_texts": 1}


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


FOLDERS = {
    "a phone's": (
        ["IMG_1.HEIC", "IMG_1.MOV", "IMG_2.MOV", "IMG_2.AAE", "IMG_3.DNG", "Thumbs.db"],
        ["IMG_1.MOV", "IMG_2.MOV"],
        {"images": 2, "texts": 1, "system_files": 1},
    ),
    "of downloads": (
        [
            *("a.mp4", "a.webp", "a.description", "a.info.json", "a.live_chat.json", "a.en.vtt", "a.m4a", "b.zip"),
            *("b.webm", "c.mp4.part", "c.mp4.ytdl", "d.mp4.part-Frag12", "e.mkv.crdownload"),
        ],
        ["a.mp4", "b.webm"],
        {"images": 1, "texts": 4, "sound": 1, "archives": 1, "unfinished_downloads": 4},
    ),
    "of a Mac": (
        ["a.mp4", "._a.mp4", ".DS_Store", "__MACOSX/a.mp4", "__MACOSX/._a.mp4", ".Trashes/501/a.mp4", "x/.DS_Store"],
        ["a.mp4"],
        {"system_files": 2},
    ),
    "of a network drive": (
        ["a.MP4", "@eaDir/a.mp4/SYNOVIDEO.mp4", "$RECYCLE.BIN/a.mp4", "desktop.ini", "a.nfo", "a.jpeg"],
        ["a.MP4"],
        {"system_files": 3, "texts": 1, "images": 1},
    ),
    "of unknown files": (["a.gif", "b.ogg", "c.xyz", "d"], ["a.gif", "b.ogg", "c.xyz", "d"], {}),  # tried, as ever
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_as_people_have_it(tmp_path: Path, name: str) -> None:
    files, videos, others = FOLDERS[name]
    touch(tmp_path, *files)
    table, report = read_manifest(str(tmp_path))
    assert table["uri"].to_pylist() == [f"{tmp_path}/{video}" for video in sorted(videos)]
    total = {"not_videos": sum(others.values())} if others else {}
    assert report == total | {f"not_videos_{kind}": count for kind, count in others.items()}


@pytest.mark.parametrize("beside", ["LRF", "LRV", "md5", "torrent", "m3u8", "bak", "prproj", "idx", "mks", "ifo"])
def test_what_stands_beside_a_video_is_no_second_one(tmp_path: Path, beside: str) -> None:
    touch(tmp_path, "a.MP4", f"a.{beside}")
    table, report = read_manifest(str(tmp_path))
    assert table["uri"].to_pylist() == [f"{tmp_path}/a.MP4"] and report["not_videos"] == 1


def test_a_prefix_as_people_have_it(bucket: str) -> None:
    for name in FOLDERS["of a Mac"][0] + FOLDERS["of downloads"][0]:
        storage.write_bytes(f"{bucket}/.all/v/{name}", b"x")  # what is hidden above the prefix does not count
    table, report = read_manifest(f"{bucket}/.all/v/")
    assert table["item_id"].to_pylist() == ["a", "b"]
    assert report["not_videos"] == 2 + 11


@pytest.mark.parametrize("names", [("a.mp4", "a.mov"), ("x/a.mp4", "y/a.mp4"), ("a.mp4", "x/a.xyz")])
def test_a_clash_of_stems_names_the_way_out(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *names, "a.jpg")
    with pytest.raises(InputError, match=r"'a' has several values of uri .* in a manifest, .* with item_id and uri"):
        read_manifest(str(tmp_path))


def test_a_name_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    for name in (b"caf\xe9.mp4", b"folder\xff/b.mp4"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    table, report = read_manifest(str(tmp_path))
    assert table["item_id"].to_pylist() == ["a"]
    assert report == {"names_not_utf8": 2}
    with pytest.raises(InputError, match="holds no items; left out: 1 names not utf8"):
        read_manifest(os.fsdecode(os.fsencode(tmp_path) + b"/folder\xff"))


def test_numbered_files_without_a_suffix_are_tried(tmp_path: Path) -> None:
    touch(tmp_path, "2", "3")
    (tmp_path / "1").symlink_to(tmp_path / "gone")
    assert read_manifest(str(tmp_path))[0]["item_id"].to_pylist() == ["1", "2", "3"]


def test_a_folder_without_videos_says_what_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.part")
    with pytest.raises(
        InputError, match=r"holds no items; left out: 3 not videos \(2 images, 1 unfinished downloads\)"
    ):
        read_manifest(str(tmp_path))
