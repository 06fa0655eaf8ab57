"""Timestamps of every type are put in order, and a mixture of units is refused."""

from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvlmrec.data import DatasetConfig, load, table
from lvlmrec.data.interactions import Interactions
from lvlmrec.errors import InputError

SECOND = 1_600_000_000


def items(found: Interactions) -> list[str]:
    return found.item_ids[found.items].tolist()


def of_parquet(tmp_path: Path, times: pa.Array) -> Interactions:
    rows = {"user_id": ["u"] * len(times), "item_id": [f"i{n}" for n in range(len(times))], "timestamp": times}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    return table.read(str(tmp_path / "t.parquet"))


def of_csv(tmp_path: Path, times: list[object]) -> Interactions:
    rows = "".join(f"u,i{row},{time}\n" for row, time in enumerate(times))
    (tmp_path / "t.csv").write_text("user_id,item_id,timestamp\n" + rows)
    return table.read(str(tmp_path / "t.csv"))


NANOSECONDS = [SECOND * 10**9 + n for n in (3, 1, 2)]  # equal in microseconds, and as float64


@pytest.mark.parametrize(
    "times",
    [
        pa.array(NANOSECONDS, pa.timestamp("ns")),
        pa.array(NANOSECONDS, pa.timestamp("ns", tz="Europe/Berlin")),
        pa.array([10**12 + n for n in (3, 1, 2)], pa.timestamp("s")),  # out of the range of microseconds
        pa.array([3, 1, 2], pa.duration("ns")),
        pa.array([3, 1, 2], pa.duration("s")),
        pa.array([3, 1, 2], pa.time64("ns")),
        pa.array([3, 1, 2], pa.time32("ms")),
        pa.array([3, 1, 2], pa.date32()),
        pa.array([each * 86_400_000 for each in (3, 1, 2)], pa.date64()),
        pa.array(NANOSECONDS).dictionary_encode(),
        pa.array([*map(str, NANOSECONDS)]).dictionary_encode(),
        pa.array([str(time).encode() for time in NANOSECONDS], pa.binary()),
        pa.array([*map(str, NANOSECONDS)], pa.string_view()),
        pa.array(["2024-01-03", "2024-01-01", "2024-01-02"]).dictionary_encode(),
        pa.array([Decimal(time) for time in NANOSECONDS], pa.decimal128(20, 0)),
        pa.array([Decimal("1.3"), Decimal("1.1"), Decimal("1.2")], pa.decimal128(20, 3)),
        pa.array([2**63 + n for n in (3, 1, 2)], pa.uint64()),
        pa.array([3.0, 1.0, 2.0], pa.float16()),
    ],
    ids=lambda times: str(times.type),
)
def test_every_type_of_time(tmp_path: Path, times: pa.Array) -> None:
    assert items(of_parquet(tmp_path, times)) == ["i1", "i2", "i0"]


def test_nanoseconds_survive_a_missing_neighbour(tmp_path: Path) -> None:
    few = pa.array([*NANOSECONDS, None])
    times = pa.chunked_array([few, *[pa.array(range(1, 100))] * 2]).combine_chunks()
    found = of_parquet(tmp_path, times)
    assert items(found)[-3:] == ["i1", "i2", "i0"]
    assert found.report["malformed_lines"] == 1


@pytest.mark.parametrize(
    "times", [pa.array([[1], [2]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([True, False]), pa.array([b"\xff", b"1"])]
)
def test_what_is_no_time_is_refused(tmp_path: Path, times: pa.Array) -> None:
    with pytest.raises(InputError, match="column timestamp holds") as caught:
        of_parquet(tmp_path, times)
    assert "\n" not in str(caught.value)


MIXTURES = {
    "one in milliseconds": [*range(SECOND, SECOND + 99), SECOND * 1000],
    "halves": [*range(SECOND, SECOND + 50), *range(SECOND * 1000, SECOND * 1000 + 50)],
    "three units": [SECOND, SECOND * 10**3, SECOND * 10**6],
    "nanoseconds": [SECOND * 10**6, SECOND * 10**9],
    "with some unknown": [0, 0, -1, SECOND, SECOND * 1000],
    "decades apart": [700_000_000, 1_900_000_000_000],
}


@pytest.mark.parametrize("times", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("kind", ["csv", "integers", "floats", "decimals"])
def test_a_mixture_of_units_is_refused(tmp_path: Path, times: list[int], kind: str) -> None:
    columns = {
        "integers": lambda: pa.array(times),
        "floats": lambda: pa.array([*map(float, times)]),
        "decimals": lambda: pa.array(
            [Decimal(time) + (time > 0) * Decimal("0.5") for time in times], pa.decimal128(25, 1)
        ),
    }
    with pytest.raises(InputError, match=r"column timestamp mixes dates in .*; write all in one unit") as caught:
        of_csv(tmp_path, [*times]) if kind == "csv" else of_parquet(tmp_path, columns[kind]())
    assert "\n" not in str(caught.value)


NO_MIXTURES = {
    "ranks": [*range(100)],
    "few ranks": [1, 1000],
    "seconds": [631_152_000, SECOND, 4_102_444_799],
    "milliseconds": [631_152_000_000, 4_102_444_799_000],
    "seconds from 1970 on": [1, 10**6, 10**9, 2 * 10**9],
    "large numbers": [10**n for n in range(16)],
    "uniform": np.random.default_rng(0).uniform(0, 2e12, 1000).tolist(),
    "log-uniform": (10 ** np.random.default_rng(0).uniform(0, 18, 1000)).tolist(),
    "a time that never comes": [SECOND, SECOND + 1, 253_402_300_799],
    "negative": [-SECOND * 1000, -SECOND, -1],
    "floats": [0.001, 1.0, 1000.0],
    "floats of seconds": [SECOND + 0.25, SECOND + 0.5],
}


@pytest.mark.parametrize("times", NO_MIXTURES.values(), ids=NO_MIXTURES.keys())
def test_numbers_that_are_no_mixture_are_read(tmp_path: Path, times: list[float]) -> None:
    """What the check of units must let pass."""
    expected = [f"i{row}" for row in np.argsort(times, kind="stable")]
    assert items(of_csv(tmp_path, [*times])) == expected
    assert items(of_parquet(tmp_path, pa.array(times))) == expected


@pytest.mark.parametrize("name", ["ninerec", "microlens", "recbole", "amazon_reviews_2023"])
def test_every_dataset_with_times_refuses_a_mixture(tmp_path: Path, name: str) -> None:
    times = [SECOND, SECOND * 1000]
    head, file, line = {
        "ninerec": ("", "X_pair.csv", "u1,v{row},{time}"),
        "microlens": ("user,item,timestamp\n", "A_pairs.csv", "1,{row},{time}"),
        "recbole": ("user_id:token\titem_id:token\ttimestamp:float\n", "x.inter", "1\t{row}\t{time}"),
        "amazon_reviews_2023": (
            "",
            "B.jsonl",
            '{{"user_id": "u", "parent_asin": "{row}", "timestamp": {time}}}',
        ),
    }[name]
    lines = "".join(line.format(row=row, time=time) + "\n" for row, time in enumerate(times))
    (tmp_path / file).write_text(head + lines)
    with pytest.raises(InputError, match=r"mixes dates in seconds .* and milliseconds"):
        load(DatasetConfig(name=name, path=str(tmp_path)))


def test_nanoseconds_of_ninerec(tmp_path: Path) -> None:
    rows = "".join(f"u1,v{row},{time}\n" for row, time in enumerate(NANOSECONDS))
    (tmp_path / "X_pair.csv").write_text(rows)
    found = load(DatasetConfig(name="ninerec", path=str(tmp_path))).interactions
    assert items(found) == ["v1", "v2", "v0"]


def test_a_mixture_is_seen_beside_a_few_other_numbers(tmp_path: Path) -> None:
    times = [(SECOND + n) * 1000 for n in range(10)] + [SECOND + n for n in range(88)] + [1, 1]
    with pytest.raises(InputError, match="mixes dates in seconds"):
        of_parquet(tmp_path, pa.array(times))


def test_numbers_of_both_signs_and_of_64_bits_are_ordered(tmp_path: Path) -> None:
    assert items(of_csv(tmp_path, [18446744073709551615, -1, 3])) == ["i1", "i2", "i0"]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([10**9, 1200 * 10**9, 3600 * 10**9], pa.duration("ns")),  # 1 s, 20 minutes, 1 hour
        pa.array([10**9, 1200 * 10**9, 3600 * 10**9], pa.time64("ns")),
        pa.array([3600 * 10**9, SECOND * 10**9, (SECOND + 1) * 10**9], pa.timestamp("ns")),  # 1970 beside 2020
        pa.array(["1970-01-01 01:00:00", "2020-01-01 00:00:00", "2021-01-01 00:00:00"]),
    ],
    ids=["durations", "times of day", "dates", "texts"],
)
def test_times_with_a_unit_of_their_own_are_no_mixture(tmp_path: Path, times: pa.Array) -> None:
    assert items(of_parquet(tmp_path, times)) == ["i0", "i1", "i2"]
