"""Interaction tables in CSV, TSV and Parquet, and what can be wrong with them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlmrec.data import table
from lvlmrec.data.interactions import Interactions
from lvlmrec.errors import InputError

GOOD = "".join(f"u{n},i{n % 7},{n}\n" for n in range(200))


def write(tmp_path: Path, text: str | bytes, name: str = "t.csv") -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def items(found: Interactions, user: int = 0) -> list[str]:
    return found.item_ids[found.items[found.offsets[user] : found.offsets[user + 1]]].tolist()


def test_csv_keeps_ids_as_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffitem_id, rating ,user_id,timestamp\r\n007,5,NA,2\r\n\r\n7,4,NA,1\r\nnull,3,NA,3\r\n")
    found = table.read(path)
    assert found.user_ids.tolist() == ["NA"]
    assert items(found) == ["7", "007", "null"]
    assert found.report == {"malformed_lines": 0, "duplicate_interactions": 0}


def test_quoted_cells(tmp_path: Path) -> None:
    path = write(tmp_path, 'user_id,title,item_id\n1,"a, b\nc","x,1"\n1,plain, y \n')
    assert items(table.read(path)) == ["x,1", "y"]


def test_tsv(tmp_path: Path) -> None:
    assert items(table.read(write(tmp_path, "user_id\titem_id\n1\tb\n1\ta\n", "t.tsv"))) == ["b", "a"]


@pytest.mark.parametrize(
    "times",
    [
        ["2024-01-03", "2024-01-01", "2024-01-02"],
        ["2024-01-01T00:00:03Z", "2024-01-01T00:00:01Z", "2024-01-01T00:00:02Z"],
        ["1.5", "-1", "1.25"],
        ["1600000000000000003", "1600000000000000001", "1600000000000000002"],  # apart only as integers
    ],
)
def test_timestamps_of_any_kind(tmp_path: Path, times: list[str]) -> None:
    rows = "".join(f"u,{item},{time}\n" for item, time in zip("cab", times, strict=True))
    assert items(table.read(write(tmp_path, "user_id,item_id,timestamp\n" + rows))) == ["a", "b", "c"]


def test_nanoseconds_survive_an_unreadable_neighbour(tmp_path: Path) -> None:
    rows = "u,b,1600000000000000002\nu,a,1600000000000000001\nv,a,soon\n"
    found = table.read(write(tmp_path, "user_id,item_id,timestamp\n" + rows + GOOD))
    assert items(found, found.user_ids.tolist().index("u")) == ["a", "b"]
    assert found.report["malformed_lines"] == 1


@pytest.mark.parametrize(
    "column", [pa.array([3, 1, 2]), pa.array([3.0, 1, 2]), pa.array([3, 1, 2], pa.timestamp("ms"))]
)
@pytest.mark.parametrize("ids", [pa.array([30, 10, 20]), pa.array(["30", "10", "20"]).dictionary_encode()])
def test_parquet(tmp_path: Path, column: pa.Array, ids: pa.Array) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"user_id": pa.array([1, 1, 1]), "item_id": ids, "timestamp": column}), path)
    assert items(table.read(str(path))) == ["10", "20", "30"]


def test_parquet_and_csv_say_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({name: rng.integers(30, size=500) for name in ("user_id", "item_id", "timestamp")})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    one, other = table.read(str(tmp_path / "t.csv")), table.read(str(tmp_path / "t.parquet"))
    assert one.user_ids.tolist() == other.user_ids.tolist()
    assert one.items.tolist() == other.items.tolist()
    assert one.report == other.report
    assert one.report["duplicate_interactions"] > 0


def test_the_columns_found_are_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column user_id and no column item_id; columns found: user, item, rating"):
        table.read(write(tmp_path, "user,item,rating\n1,2,3\n"))


def test_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column item_id occurs twice"):
        table.read(write(tmp_path, "user_id,item_id,item_id\n1,2,3\n"))


@pytest.mark.parametrize("bad", ["only_one_cell", "a,b,1,2", ",i,1", "u,,1", "u,i,", "u,i,inf", "u,i,yesterday"])
def test_few_malformed_rows_are_counted(tmp_path: Path, bad: str) -> None:
    found = table.read(write(tmp_path, f"user_id,item_id,timestamp\n{GOOD}{bad}\n"))
    assert found.report["malformed_lines"] == 1
    assert len(found.user_ids) == 200


@pytest.mark.parametrize(("bad", "shown"), [("x,1\n", "row 201: 'x,1'"), ("x,,1\n", "row 201")])
def test_many_malformed_rows_are_an_error(tmp_path: Path, bad: str, shown: str) -> None:
    with pytest.raises(InputError, match=f"3 of 203 lines malformed, such as {shown}"):
        table.read(write(tmp_path, "user_id,item_id,timestamp\n" + GOOD + 3 * bad))


def test_only_a_header(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no line of data"):
        table.read(write(tmp_path, "user_id,item_id\n"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.parquet", b"not parquet at all", "not readable as Parquet"),
        ("t.csv", b"user_id,item_id\n1,\xff\n", "not readable as a table"),
        ("t.csv", b"user_\xff,item_id\n1,2\n", "line 1: byte 0xff"),
        ("t.csv", b"\n\n", "empty file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    with pytest.raises(InputError, match=match):
        table.load(write(tmp_path, content, name))


def test_float_ids_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1.0], "item_id": [1]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="column user_id holds double"):
        table.read(str(tmp_path / "t.parquet"))


def test_a_folder_with_titles(tmp_path: Path) -> None:
    write(tmp_path, "user_id,item_id\n1,2\n")
    write(tmp_path, "item,title\n2,two\n", "t_titles.csv")
    assert table.load(str(tmp_path)).titles == {"2": "two"}
    write(tmp_path, "user_id,item_id\n1,2\n", "s.csv")
    with pytest.raises(InputError, match=r"several files to choose from: s.csv, t.csv"):
        table.load(str(tmp_path))


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \*.csv or \*.tsv or \*.parquet"):
        table.load(write(tmp_path, "{}", "t.json"))


@pytest.mark.data
def test_movielens_with_its_ties(real_data: Path, tmp_path: Path) -> None:
    rows = (real_data / "ml_100k/ml-100k.inter").read_text().split("\n", 1)[1]
    found = table.read(write(tmp_path, "user_id\titem_id\trating\ttimestamp\n" + rows, "t.tsv"))
    assert (len(found.user_ids), len(found.item_ids), len(found.items)) == (943, 1682, 100_000)
    expected = sorted(
        (line.split("\t") for line in rows.splitlines() if line.startswith("196\t")), key=lambda row: float(row[3])
    )
    assert items(found, found.user_ids.tolist().index("196")) == [row[1] for row in expected]
