"""Tables of users as manifests, interactions and lists of ids read them: exact ids, all rows or none, one line."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlmrec import storage
from lvlmrec.data import table
from lvlmrec.errors import InputError
from lvlmrec.extraction.manifest import read_manifest
from lvlmrec.features import imported

LONG = [7123456789012345677, 7123456789012345679]  # equal as float64
MANY = 200  # rows, of which one may be malformed


def manifest(path: Path, rows: int) -> list[str]:
    return read_manifest(str(path))[0]["item_id"].to_pylist()


def interactions(path: Path, rows: int) -> list[str]:
    return table.read(str(path)).item_ids.tolist()


def id_list(path: Path, rows: int) -> list[str]:
    return imported.read_item_ids(str(path), rows)


Reader = Callable[[Path, int], list[str]]
every_reader = pytest.mark.parametrize("read", [manifest, interactions, id_list])
with_gaps = pytest.mark.parametrize("read", [manifest, interactions])


def columns(ids: pa.Array) -> pa.Table:
    """A table that is a manifest and interactions."""
    uris = [f"{row}.mp4" for row in range(len(ids))]
    return pa.table({"item_id": ids, "user_id": ["u"] * len(ids), "uri": uris})


def write(path: Path, ids: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns(ids), path)
    return path


def csv(path: Path, rows: list[str], head: str = "user_id,item_id,uri,title") -> Path:
    path.write_bytes("\n".join([head, *rows, ""]).encode())
    return path


def good(first: int = 0, last: int = MANY) -> list[str]:
    return [f"u{n},i{n},{n}.mp4,t" for n in range(first, last)]


def refuses(read: Reader, path: Path, match: str, rows: int = MANY) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read(path, rows)
    assert "\n" not in str(caught.value)


TYPES = {
    "integers": pa.array(LONG),
    "unsigned": pa.array(LONG, pa.uint64()),
    "dictionary": pa.array(LONG).dictionary_encode(),
    "categories": pa.array([*map(str, LONG)]).dictionary_encode(),
    "binary": pa.array([str(each).encode() for each in LONG], pa.binary()),
    "binary_view": pa.array([str(each).encode() for each in LONG], pa.binary_view()),
    "fixed_size": pa.array([str(each).encode() for each in LONG], pa.binary(19)),
    "decimal": pa.array([Decimal(each) for each in LONG], pa.decimal128(20, 0)),
    "decimal_of_whole": pa.array([Decimal(each) for each in LONG], pa.decimal128(38, 9)),
    "large_string": pa.array([*map(str, LONG)], pa.large_string()),
    "string_view": pa.array([*map(str, LONG)], pa.string_view()),
}


@with_gaps
@pytest.mark.parametrize("kind", TYPES)
def test_ids_of_every_type_keep_their_digits_beside_a_missing_one(tmp_path: Path, read: Reader, kind: str) -> None:
    few = TYPES[kind]
    ids = pa.chunked_array([few, pa.nulls(1, few.type)]).combine_chunks()
    if read is interactions:  # of which so many may have no item
        ids = pa.chunked_array([*[few] * MANY, ids]).combine_chunks()
        path = write(tmp_path / "t.parquet", ids)
        assert table.read(str(path)).report["malformed_lines"] == 1
    else:
        path = write(tmp_path / "t.parquet", ids)
        assert read_manifest(str(path))[1] == {"incomplete_rows": 1}
    assert read(path, 2) == [str(each) for each in LONG]


@pytest.mark.parametrize("kind", ["dictionary", "binary", "decimal_of_whole", "categories"])
def test_a_list_of_ids_keeps_their_digits(tmp_path: Path, kind: str) -> None:
    assert id_list(write(tmp_path / "t.parquet", TYPES[kind]), 2) == [str(each) for each in LONG]


def test_a_list_of_ids_with_a_missing_one_is_refused(tmp_path: Path) -> None:
    for ids in (pa.array([1, None]), pa.array(["a", None])):
        refuses(id_list, write(tmp_path / "t.parquet", ids), "has an empty id", 2)


def test_nullable_integers_of_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame({"item_id": pd.array([LONG[0], None], "Int64"), "uri": ["a", "b"], "title": ["x", None]})
    frame.to_parquet(tmp_path / "t.parquet")
    found, report = read_manifest(str(tmp_path / "t.parquet"), ["uri", "title"])
    assert found["item_id"].to_pylist() == [str(LONG[0])] and report == {"incomplete_rows": 1}


def test_texts_of_every_type(tmp_path: Path) -> None:
    texts = {
        "title": pa.array(["a", None, "c"]).dictionary_encode(),
        "year": pa.array([1999, None, 2001]),
        "score": pa.array([4.0, 4.5, None]),
        "text": pa.array([b"\xc3\xa9", None, b""], pa.binary()),
    }
    pq.write_table(pa.table({"item_id": ["1", "2", "3"], **texts}), tmp_path / "t.parquet")
    found, _ = read_manifest(str(tmp_path / "t.parquet"), [*texts])
    assert [found[name].to_pylist() for name in texts] == [
        ["a", "", "c"],
        ["1999", "", "2001"],
        ["4.0", "4.5", ""],
        ["é", "", ""],
    ]


@every_reader
@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (pa.array([1.0, 2.0]), "column item_id holds double; ids are strings or integers"),
        (pa.array([Decimal("1.5"), Decimal("2.5")]), r"column item_id holds decimal128\(2, 1\) with fractions"),
        (pa.array([b"\xff", b"a"]), "column item_id holds binary that is not UTF-8"),
        (pa.array([[1], [2]]), "column item_id holds list"),
        (pa.array([True, False]), "column item_id holds bool"),
        (pa.array([1, 2], pa.timestamp("s")), "column item_id holds timestamp"),
    ],
)
def test_ids_without_exact_digits_are_refused(tmp_path: Path, read: Reader, ids: pa.Array, match: str) -> None:
    refuses(read, write(tmp_path / "t.parquet", ids), match, 2)


@every_reader
def test_strings_of_a_file_that_are_not_utf8_are_refused(tmp_path: Path, read: Reader) -> None:
    content = pa.py_buffer(b"\xffa")
    wrong = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), content])
    refuses(read, write(tmp_path / "t.parquet", wrong), "not readable as Parquet: .*Invalid UTF8", 2)


@every_reader
@pytest.mark.parametrize("index", ["named", "range", "several"])
def test_the_index_of_a_frame_is_a_column(tmp_path: Path, read: Reader, index: str) -> None:
    frame = columns(pa.array([5, 6])).to_pandas()
    if index == "range":  # not a column in the file, but described by three numbers
        frame = frame.drop(columns="item_id").set_index(pd.RangeIndex(5, 7, name="item_id"))
    else:
        frame = frame.set_index("item_id" if index == "named" else ["user_id", "item_id"])
    frame.to_parquet(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", 2) == ["5", "6"]


@with_gaps
def test_an_index_that_other_rows_had_is_refused(tmp_path: Path, read: Reader) -> None:
    frame = columns(pa.array([5, 6, 7])).to_pandas().drop(columns="item_id")
    frame.set_index(pd.RangeIndex(3, name="item_id")).to_parquet(tmp_path / "t.parquet")
    pq.write_table(pq.read_table(tmp_path / "t.parquet").slice(1), tmp_path / "t.parquet")
    refuses(read, tmp_path / "t.parquet", "2 rows, but its pandas index item_id has 3")


LAYOUTS = {
    "spark.parquet": ["part-00000-ab1-c000.snappy.parquet", "part-00001-ab1-c000.snappy.parquet"],
    "hive": ["000000_0", "000001_0_copy_1"],
    "duckdb": ["data_0.parquet", "data_1.parquet"],
    "any.parquet": ["b.parquet", "later/a.parquet"],
    "marked": ["b.parquet", "c.parquet"],
}


def write_parts(folder: Path, names: list[str]) -> Path:
    for part, name in enumerate(names):
        write(folder / name, pa.array([10 + part, 20 + part]))
    for beside in ("_metadata", f".{names[0]}.crc", "_temporary/0/part-0.parquet"):
        (folder / beside).parent.mkdir(parents=True, exist_ok=True)
        (folder / beside).write_bytes(b"x")
    if folder.name in ("spark.parquet", "marked"):
        (folder / "_SUCCESS").write_bytes(b"")
    return folder


@every_reader
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_parts_is_one_table(tmp_path: Path, read: Reader, layout: str) -> None:
    folder = write_parts(tmp_path / layout, LAYOUTS[layout])
    found = read(folder, 4)
    assert found == (["10", "11", "20", "21"] if read is interactions else ["10", "20", "11", "21"])


def test_the_table_dataset_finds_parts_and_titles(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        write_parts(tmp_path / layout, LAYOUTS[layout])
        name = layout.removesuffix(".parquet")
        (tmp_path / f"{name}_titles.csv").write_text("item,title\n10,ten\n")
        found = table.load(f"{tmp_path}/{layout}/")
        assert found.titles == {"10": "ten"} and len(found.interactions.items) == 4


def test_uris_of_a_folder_of_parts_count_from_the_folder_that_holds_it(tmp_path: Path) -> None:
    found, _ = read_manifest(str(write_parts(tmp_path / "hive", LAYOUTS["hive"])))
    assert found["uri"].to_pylist()[0] == str(tmp_path / "0.mp4")


def test_tables_that_are_not_parts_of_one_are_not_joined(tmp_path: Path) -> None:
    for name in ("ml_100k.parquet", "ml_1m.parquet"):
        write(tmp_path / name, pa.array([1]))
    with pytest.raises(InputError, match=r"several files to choose from: ml_100k\.parquet, ml_1m\.parquet"):
        table.load(str(tmp_path))


@every_reader
@pytest.mark.parametrize(
    ("names", "beside", "match"),
    [
        (["day=1/part-0.parquet", "day=2/part-0.parquet"], "_SUCCESS", r"partitioned \(day=1/part-0\.parquet\)"),
        (["part-0.parquet", "part-1.parquet"], "_delta_log/0.json", "a Delta table, which is not read"),
        (["part-0.parquet"], ".hoodie/hoodie.properties", "a Hudi table, which is not read"),
    ],
)
def test_folders_of_other_tables_are_refused(
    tmp_path: Path, read: Reader, names: list[str], beside: str, match: str
) -> None:
    folder = write_parts(tmp_path / "t.parquet", names)
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_bytes(b"{}")
    refuses(read, folder, match)


@every_reader
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path, read: Reader) -> None:
    folder = tmp_path / "t.parquet"
    write(folder / "part-0.parquet", pa.array([1, 2]))
    (folder / "part-1.parquet").write_bytes(b"PAR1 and no more")
    refuses(read, folder, r"part-1\.parquet: not readable as Parquet")
    pq.write_table(pa.table({"id": [1]}), folder / "part-1.parquet")
    refuses(read, folder, "no column '?(item|user)_id")


@every_reader
def test_parts_in_object_storage(tmp_path: Path, bucket: str, read: Reader) -> None:
    for file in sorted(write_parts(tmp_path / "spark.parquet", LAYOUTS["spark.parquet"]).rglob("*")):
        if file.is_file():
            storage.write_bytes(f"{bucket}/{file.relative_to(tmp_path)}", file.read_bytes())
    uri = f"{bucket}/spark.parquet"
    found = {
        manifest: lambda: read_manifest(uri)[0]["item_id"].to_pylist(),
        interactions: lambda: table.load(uri).interactions.item_ids.tolist(),
        id_list: lambda: imported.read_item_ids(uri, 4),
    }[read]()
    assert sorted(found) == ["10", "11", "20", "21"]


@every_reader
@pytest.mark.parametrize(
    "rows",
    [
        ["u,1,a.mp4,Hello, world", "u,2,b.mp4,Bye, moon"],  # a first column too many is no index
        ["u,1,a.mp4,Hello, world", "u,2,b.mp4,Bye"],
        ["u,1,a.mp4,Hello, world,", "u,2,b.mp4,t,"],
        ["u,1,a.mp4", "u,2,b.mp4,t"],
    ],
)
def test_rows_with_another_number_of_cells_are_refused(tmp_path: Path, read: Reader, rows: list[str]) -> None:
    refuses(read, csv(tmp_path / "t.csv", rows), "malformed, such as row 1: 'u,1,a", 2)


@with_gaps
def test_few_rows_with_another_number_of_cells_are_counted(tmp_path: Path, read: Reader) -> None:
    path = csv(tmp_path / "t.csv", [*good(), "u,x,x.mp4,a, b", "u,y,y.mp4", *good(MANY, 2 * MANY)])
    assert set(read(path, 0)) == {f"i{n}" for n in range(2 * MANY)}
    report = read_manifest(str(path))[1] if read is manifest else table.read(str(path)).report
    assert report["malformed_lines"] == 2


@every_reader
@pytest.mark.parametrize(
    "broken",
    [
        ['u,x,x.mp4,"12 inch'],  # to the end of the file
        ['u,"x,x.mp4,t'],
        ['"u,x,x.mp4,t', *good(MANY, 2 * MANY), 'u,"y,y.mp4,t'],  # to the next quote, in the middle of a field
        ['u,"x,x.mp4,t', *good(MANY, 2 * MANY), 'u,y",y.mp4,t'],  # which may even be where a field ends
    ],
)
def test_what_a_quote_swallows_is_malformed(tmp_path: Path, read: Reader, broken: list[str]) -> None:
    path = csv(tmp_path / "t.csv", [*good(), *broken, *good(2 * MANY, 3 * MANY)])
    where = r"row 201 with item_id 'x,x\.mp4" if broken[-1] == 'u,y",y.mp4,t' else r"line 202: .*x\.mp4,.*takes in 20"
    refuses(read, path, f"malformed, such as {where}", 3 * MANY)


@with_gaps
def test_lines_that_a_quote_swallows_are_counted_one_by_one(tmp_path: Path, read: Reader) -> None:
    rows = [*good(0, 500), 'u,"x,x.mp4,t', "u,y,y.mp4,t", 'u,z,"z".mp4,t', *good(500, 1000)]
    path = csv(tmp_path / "t.csv", rows)
    assert set(read(path, 0)) == {f"i{n}" for n in range(1000)}
    report = read_manifest(str(path))[1] if read is manifest else table.read(str(path)).report
    assert report["malformed_lines"] == 3


@every_reader
def test_quotes_that_are_characters(tmp_path: Path, read: Reader) -> None:
    path = csv(tmp_path / "t.csv", ['u,1,1.mp4,12" vinyl', 'u,2,2.mp4,"say ""hi"", you\nthere"', 'u,3,3.mp4,a "b" c'])
    assert read(path, 3) == ["1", "2", "3"]
    assert read_manifest(str(path), ["title"])[0]["title"].to_pylist() == [
        '12" vinyl',
        'say "hi", you\nthere',
        'a "b" c',
    ]


@every_reader
@pytest.mark.parametrize("quoted", [False, True])
def test_every_line_may_end_in_a_delimiter_and_a_carriage_return(tmp_path: Path, read: Reader, quoted: bool) -> None:
    rows = ["user_id,item_id,uri,", 'u,"1",1.mp4,' if quoted else "u,1,1.mp4,", "u,2,2.mp4,", ""]
    (tmp_path / "t.csv").write_bytes("\r".join(rows).encode())
    assert read(tmp_path / "t.csv", 2) == ["1", "2"]


@every_reader
@pytest.mark.parametrize("second", ["user_id,item_id,uri,title", "\ufeffuser_id, item_id,uri,title"])
@pytest.mark.parametrize("quote", ["", 'u,9,9.mp4,a "quote"'])
def test_a_header_that_occurs_twice_is_no_row(tmp_path: Path, read: Reader, second: str, quote: str) -> None:
    rows = [*good(), *([quote] if quote else []), second, *good(MANY, 2 * MANY)]
    path = csv(tmp_path / "t.csv", rows)
    if read is id_list:
        refuses(read, path, r"malformed, such as row 20[12]: the header once more")
    else:
        assert "item_id" not in read(path, 0)
        report = read_manifest(str(path))[1] if read is manifest else table.read(str(path)).report
        assert report["malformed_lines"] == 1


@every_reader
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("user_id,item_id,uri\nu,1,a\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("user_id,item_id,uri\nu,1,a\n".encode("utf-16-le"), "line 1: a zero byte"),
        (b"user_id,item_id,uri\nu,1,a\nu,\0\0\0,b\n", "line 3: a zero byte"),
        (b"user_id,item_id,uri\nu,1,a\nu,\xff,b\n", "line 3: byte 0xff is not UTF-8"),
        (b'user_id,item_id,uri\nu,"1" ,a"\nu,\xff,b\n', "line 3: byte 0xff is not UTF-8"),
        (b'user_id,"item_id,uri\nu,1,a\n', "a quote in the first line is not closed"),
        (b"user_id,item_id,uri,item_id\nu,1,a,2\n", "column item_id occurs twice"),
        (b"", "empty file"),
    ],
)
def test_unreadable_text_is_refused_with_the_line(tmp_path: Path, read: Reader, content: bytes, match: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    refuses(read, tmp_path / "t.csv", match)


def test_a_text_longer_than_a_block_of_the_parser(tmp_path: Path) -> None:
    text = "word " * 300_000
    path = csv(tmp_path / "t.csv", [f'u,1,1.mp4,"{text}\n{text}"', "u,2,2.mp4,t"])
    assert read_manifest(str(path), ["title"])[0]["title"].to_pylist() == [f"{text}\n{text}", "t"]


def test_a_text_file_of_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes("a\rb\u2028c\r".encode())
    assert imported.read_item_ids(str(path), 2) == ["a", "b\u2028c"]
    path.write_bytes("a\nb\n".encode("utf-16"))
    refuses(id_list, path, "UTF-16", 2)


@pytest.mark.parametrize("value", [{"bytes": b"x", "path": "x.mp4"}, ["x.mp4"]], ids=["struct", "list"])
def test_texts_of_several_parts_are_refused(tmp_path: Path, value: object) -> None:
    pq.write_table(pa.table({"item_id": ["a"], "uri": pa.array([value])}), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=r"column uri holds (struct|list)"):
        read_manifest(str(tmp_path / "m.parquet"))


def test_a_long_cell_is_a_cell_beside_loose_quotes(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f'item_id,uri,title\n1,a.mp4,"{"x" * 200_000}"\n2,b.mp4,y "z" w\n')
    found, report = read_manifest(str(tmp_path / "m.csv"), ("uri", "title"))
    assert [len(title) for title in found["title"].to_pylist()] == [200_000, 7] and not report


@every_reader
def test_quotes_behind_a_blank_are_no_part_of_an_id(tmp_path: Path, read: Reader) -> None:
    rows = [f'"u{n}", "i{n}", "{n}.mp4", t' for n in range(MANY)]
    refuses(read, csv(tmp_path / "t.csv", rows, "user_id, item_id, uri, title"), "blank before quote", MANY)
