"""What parts were made with: it stands in their files and in the index, and a set that mixes says so."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lvlmrec.features import index, lease, provenance, store, vacuum
from lvlmrec.features.compact import choose_columns, compact
from lvlmrec.features.provenance import KEY, differences, to_json
from lvlmrec.features.vacuum import VacuumConfig
from tests.feature_sets import recipe_of, vectors

MakeSet = Callable[..., str]
H200 = {"device": "NVIDIA H200", "attention": "sdpa", "torch": "2.9", "batch_size": 4}


def write(uri: str, item: str, generation: int, *made_with: dict[str, object]) -> str:
    recipe = recipe_of()
    rows = store.feature_table(recipe, [item], [8], vectors(recipe, [item]))
    return store.write_part(uri, recipe, rows, generation, map(to_json, made_with))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], ""),
        ([H200], ""),
        ([H200 | {"device": "cpu AVX2"}], "device: NVIDIA H200 | cpu AVX2"),
        (
            [H200 | {"batch_size": 2}, H200 | {"batch_size": 1, "torch": "2.8"}],
            "batch_size: 1 | 2 | 4; torch: 2.8 | 2.9",
        ),
        ([H200 | {"compile": True}], "compile: True | none"),
    ],
)
def test_keys_and_values_that_differ(others: list[dict[str, object]], expected: str) -> None:
    assert differences([to_json(each) for each in (H200, *others)]) == expected


def test_a_part_says_what_it_was_made_with_to_any_reader(make_set: MakeSet) -> None:
    uri = make_set([])
    name = write(uri, "a", 1, H200, H200 | {"batch_size": 2}, H200)
    metadata = pq.read_metadata(f"{uri}/parts/{name}").metadata
    assert sorted(each["batch_size"] for each in json.loads(metadata[KEY])) == ["2", "4"]
    assert not pq.read_metadata(f"{uri}/parts/{write(uri, 'b', 1)}").metadata.get(KEY)


def test_a_set_of_parts_alike_says_nothing(make_set: MakeSet, capsys: pytest.CaptureFixture[str]) -> None:
    uri = make_set([["a"]])  # of an earlier release, which does not say
    for item in "bc":
        write(uri, item, 1, H200)
        store.adopt(uri, 1)
    assert store.read(uri).mixed == "" and capsys.readouterr().err == ""
    assert index.read(uri).made_with == (to_json(H200),)


def test_a_set_that_mixes_says_so_once_also_when_it_was_adopted_and_merged(
    make_set: MakeSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = make_set([])
    for generation, torch in enumerate(("2.9", "2.8"), 1):
        write(uri, f"item{generation}", generation, H200 | {"torch": torch})
    store.adopt(uri, 2)
    found = [store.read(uri), store.read(uri)]
    assert [each.mixed for each in found] == ["torch: 2.8 | 2.9"] * 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": torch: 2.8 | 2.9") and uri in line
    write(uri, "item3", 3, H200 | {"attention": "eager"})
    vacuum.run(VacuumConfig(features=uri))
    merged = store.read(uri)
    assert len(merged.segments) == 1 and merged.mixed == "attention: eager | sdpa; torch: 2.8 | 2.9"
    columns = choose_columns(merged, [], "many")
    array = compact([(merged, columns)], ["item1", "item3"], str(tmp_path / "cache"))
    assert array.mixed == merged.mixed


def test_a_commit_lists_what_its_blocks_were_made_with(make_set: MakeSet) -> None:
    import pyarrow as pa

    from lvlmrec.extraction import stages
    from lvlmrec.extraction.commits import Commits

    uri = make_set([])
    blocks = [
        {"item_id": f"item{k}", "source": "", "part": f"part-000001-{k}.parquet", "row": 0, "made_with": to_json(known)}
        for k, known in enumerate((H200, H200, H200 | {"batch_size": 2}))
    ]
    rejected = {"item_id": "broken", "stage": "decode", "error": "no_frames", "message": ""}
    with lease.hold(uri) as held, Commits(uri, held) as commits:
        for block in (*blocks, rejected):
            commits.add(pa.Table.from_pylist([block], schema=stages.WRITTEN))
    assert provenance.differences(index.read(uri).made_with) == "batch_size: 2 | 4"
