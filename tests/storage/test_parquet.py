"""Reading Parquet over object storage: right values, and bytes and requests within bounds."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from lvlmrec import storage, tables
from lvlmrec.storage import parquet
from lvlmrec.storage.parquet import GAP, TAIL, joined
from tests.faults import Faults, Proxy, faulty

ITEMS, WIDTH = 448, 128  # [ITEMS, WIDTH] values of float16 per feature: 114,688 bytes
FEATURES = [f"describe/llm.{layer}/visual_mean" for layer in range(29)]
TEXTS = ["item_id", "source"]
VECTORS = ["a/llm.1/mean", "a/llm.1/mean.sizes"]


@pytest.fixture(scope="module")
def part() -> pa.Table:
    """Two columns of texts and 29 of vectors, as a part of a feature set has them: 3.3 MB."""
    values = np.random.default_rng(0).standard_normal((len(FEATURES), ITEMS * WIDTH)).astype(np.float16)
    texts = {name: pa.array([f"{name}-{row:09d}" for row in range(ITEMS)]) for name in TEXTS}
    vectors = [pa.FixedSizeListArray.from_arrays(pa.array(row), WIDTH) for row in values]
    return pa.table(texts | dict(zip(FEATURES, vectors, strict=True)))


@contextmanager
def counted(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Within the block storage reaches its bucket through a proxy that counts bytes and requests."""
    with faulty(s3_server, Faults()) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


def write(uri: str, table: pa.Table, **options: Any) -> pq.FileMetaData:
    """Write `table` as parts are written, and give its footer."""
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False} | options
    parquet.write(table, buffer := io.BytesIO(), **options)
    storage.write_bytes(uri, buffer.getbuffer())
    return pq.read_metadata(buffer)


def size_of(footer: pq.FileMetaData, names: list[str]) -> int:
    """Bytes of the columns in the file, and of its footer."""
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(footer.num_columns)]
    chosen = [chunk for chunk in chunks if chunk.path_in_schema.removesuffix(".list.element") in names]
    return sum(chunk.total_compressed_size for chunk in chosen) + footer.serialized_size + 8


@pytest.mark.thorough
@pytest.mark.parametrize("rows_per_group", [None, 100])
@pytest.mark.parametrize(
    "names",
    [["item_id"], TEXTS, FEATURES[:1], FEATURES[7:8], FEATURES[-1:], FEATURES[3:6], FEATURES[::7], FEATURES, None],
    ids=lambda names: f"{len(names)}_from_{names[0]}" if names else "all",
)
def test_no_more_is_fetched_than_the_chosen_columns_hold(
    bucket: str,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
    part: pa.Table,
    names: list[str] | None,
    rows_per_group: int | None,
) -> None:
    footer = write(uri := f"{bucket}/part.parquet", part, row_group_size=rows_per_group)
    with counted(s3_server, monkeypatch) as proxy:
        assert storage.read_table(uri, names) == part.select(names or part.column_names)
    assert proxy.body_bytes <= 1.2 * size_of(footer, names or part.column_names)
    assert proxy.counts["GET"] <= 2 + len(names or [""]) * footer.num_row_groups


def test_a_footer_that_is_longer_than_expected_is_fetched_once(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({f"column {i}": [1.0, 2.0] for i in range(900)})
    footer = write(uri := f"{bucket}/wide.parquet", table)
    assert footer.serialized_size > 3 * TAIL
    with counted(s3_server, monkeypatch) as proxy:
        assert storage.read_table(uri, ["column 7"]) == table.select(["column 7"])
    assert proxy.body_bytes <= 1.2 * size_of(footer, ["column 7"])
    assert proxy.counts["GET"] == 3


@pytest.mark.parametrize("written", [{"compression": "zstd"}, {"data_page_version": "2.0"}, {"use_dictionary": False}])
def test_any_parquet_file_is_read_as_pyarrow_reads_it(bucket: str, tmp_path: Path, written: dict[str, object]) -> None:
    table = pa.table(
        {
            "a": ["x", None, "x", "z"] * 3000,
            "a.b": pa.array([{"c": i, "d": [i] * (i % 3)} for i in range(12_000)]),
            "list": pa.array([[1.5], None, [], [2.5, None]] * 3000),
            "nothing": pa.nulls(12_000),
            "kind": pa.array(["p", "q"] * 6000).dictionary_encode(),
        }
    ).replace_schema_metadata({"key": "value"})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=5000, **written)
    storage.write_bytes(f"{bucket}/t.parquet", (tmp_path / "t.parquet").read_bytes())
    for uri in (str(tmp_path / "t.parquet"), f"{bucket}/t.parquet"):
        for names in (None, ["a"], ["a.b", "a"], ["list", "kind"], ["nothing"], []):
            expected = pq.read_table(tmp_path / "t.parquet", columns=names)
            found = storage.read_table(uri, names)
            assert found == expected and found.schema.equals(expected.schema, check_metadata=True)
        with pytest.raises(pa.ArrowInvalid, match=r"no column 'c'; columns: a, a.b, list, nothing, kind"):
            storage.read_table(uri, ["a", "c"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"item_id\n1\n", b"PAR1" + b"\xff" * 40 + b"PAR1", b"x" * 100_000])
def test_what_is_no_parquet_file_is_said_to_be_none(bucket: str, content: bytes) -> None:
    storage.write_bytes(f"{bucket}/t.parquet", content)
    with pytest.raises(pa.ArrowInvalid):
        storage.read_table(f"{bucket}/t.parquet")


def test_long_ranges_are_fetched_in_pieces(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, part: pa.Table
) -> None:
    monkeypatch.setattr(parquet, "PIECE", 100_000)
    footer = write(uri := f"{bucket}/part.parquet", part)
    with counted(s3_server, monkeypatch) as proxy:
        assert storage.read_table(uri) == part
    assert proxy.body_bytes <= 1.02 * size_of(footer, part.column_names)
    assert proxy.counts["GET"] == 1 + -(-size_of(footer, part.column_names) // 100_000)


@pytest.mark.parametrize(
    ("items", "dtype", "split"),
    [
        (70, np.float16, False),
        pytest.param(448, np.float16, False, marks=pytest.mark.thorough),  # 53 MB
        (70, np.float32, False),
        pytest.param(140, np.float32, True, marks=pytest.mark.thorough),  # 33 MB
    ],
)
def test_of_one_item_little_more_is_fetched_than_it_holds(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, items: int, dtype: type[np.floating], split: bool
) -> None:
    """Of parts of 8 MB and more: 29 features of 2048 values, which make 119 KB an item in float16."""
    width = 2048
    values = np.random.default_rng(0).standard_normal((29, items * width), np.float32).astype(dtype)
    vectors = [pa.FixedSizeListArray.from_arrays(pa.array(row), width) for row in values]
    table = pa.table(dict(zip(FEATURES, vectors, strict=True)))
    footer = write(uri := f"{bucket}/part.parquet", table, use_byte_stream_split=split, one_page=True)
    item_bytes = 29 * width * np.dtype(dtype).itemsize
    for row in (0, 40, items - 1):
        with counted(s3_server, monkeypatch) as proxy:
            assert storage.read_table(uri, rows=[row]) == table.slice(row, 1)
        assert proxy.body_bytes <= 1.2 * (item_bytes + footer.serialized_size)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
@pytest.mark.parametrize("written", [{}, {"compression": "zstd"}, {"row_group_size": 100}, {"use_dictionary": True}])
def test_rows_are_those_of_the_whole_table(bucket: str, tmp_path: Path, dtype: str, written: dict[str, Any]) -> None:
    values, vectors = np.arange(300 * 24).astype(dtype), [f"{name}.list.element" for name in VECTORS]
    table = pa.table(
        {
            "item_id": [f"{row}" for row in range(300)],
            VECTORS[0]: pa.FixedSizeListArray.from_arrays(pa.array(values), 24),
            VECTORS[1]: pa.FixedSizeListArray.from_arrays(pa.array(values[::-1].copy()), 24),
        }
    )
    for pages in ({"one_page": "row_group_size" not in written}, {"data_page_size": 1000}):
        for root in (bucket, str(tmp_path)):
            for split in ([], [] if dtype == "uint8" or written.get("use_dictionary") else vectors):
                write(uri := f"{root}/t.parquet", table, **written | pages | {"use_byte_stream_split": split or False})
                for rows in ([7], [299, 0, 0, 131], [*range(300)], []):
                    assert storage.read_table(uri, rows=rows) == table.take(pa.array(rows, pa.int64()))
                for row in (-1, 300):
                    with pytest.raises(IndexError, match=f"row {row} of 300"):
                        storage.read_table(uri, VECTORS, [0, row])
                names = [VECTORS[1], "item_id"]
                assert storage.read_table(uri, names, [5, 4]) == table.select(names).take([5, 4])


def test_metadata_copied_to_a_file_with_other_pages_mislead_nobody(bucket: str) -> None:
    """What read and wrote a part with its metadata, and without compression, made pages of its own."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(500 * 64, dtype=np.float32)), 64)
    footer = write(uri := f"{bucket}/t.parquet", table := pa.table({"v": vectors}), one_page=True)
    copied = table.replace_schema_metadata(footer.metadata)
    write(uri, copied, data_page_size=1000)
    assert parquet.PAGES_KEY.encode() in pq.read_metadata(io.BytesIO(storage.read_bytes(uri))).metadata
    assert storage.read_table(uri, rows=[400, 3]) == table.take([400, 3])


def test_a_missing_vector_has_no_place() -> None:
    table = pa.table({"v": pa.array([[1.0], None], pa.list_(pa.float32(), 1))})
    with pytest.raises(ValueError, match="column 'v' has rows without a vector"):
        parquet.write(table, io.BytesIO(), one_page=True)


@pytest.mark.parametrize("rows", [None, [7, 3]])
def test_a_file_replaced_between_footer_and_columns_is_read_anew(
    bucket: str, monkeypatch: pytest.MonkeyPatch, rows: list[int] | None
) -> None:
    values = [pa.FixedSizeListArray.from_arrays(pa.array(np.full(100 * 200, i, np.float16)), 200) for i in range(2)]
    tables = [pa.table({"a": vectors, "b": vectors}) for vectors in values]
    write(uri := f"{bucket}/t.parquet", tables[0], one_page=True)
    opened, footers = parquet.open_parquet, []

    def open_then_replace(file: BinaryIO) -> pq.ParquetFile:
        footers.append(opened(file))
        if len(footers) == 1:
            storage.write_table(uri, tables[1].slice(0, 50))
        return footers[-1]

    monkeypatch.setattr(parquet, "open_parquet", open_then_replace)
    expected = tables[1].slice(0, 50).select(["a"])
    assert storage.read_table(uri, ["a"], rows) == (expected.take(rows) if rows else expected)
    assert len(footers) == 2


def test_a_users_table_is_read_by_columns_too(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, part: pa.Table
) -> None:
    footer = write(uri := f"{bucket}/items.parquet", part)
    with counted(s3_server, monkeypatch) as proxy:
        rows = tables.read_parquet([uri], "input", lambda found: ["item_id"], ["item_id"])
        assert rows.table["item_id"].to_pylist() == part["item_id"].to_pylist()
        assert tables.parquet_files(uri) == [uri]
    assert proxy.body_bytes <= 1.2 * size_of(footer, ["item_id"]) + 10_000  # and answers to what is listed


def test_ranges_that_lie_close_together_are_one() -> None:
    assert joined([(30, 40), (0, 10), (10, 20)]) == [(0, 40)]
    assert joined([(0, 10), (10 + GAP, 20 + GAP)]) == [(0, 20 + GAP)]
    assert joined([(0, 10), (11 + GAP, 20 + GAP)]) == [(0, 10), (11 + GAP, 20 + GAP)]
    assert joined([(0, 100), (5, 10)]) == [(0, 100)]
    assert joined([]) == []
