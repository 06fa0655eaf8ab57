"""NineRec, Amazon Reviews 2023, Amazon Beauty, RecBole and TikTok in their published formats, and what can be wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmrec.baselines import BASELINES
from lvlmrec.data import DatasetConfig, load, load_split
from lvlmrec.data.interactions import Dataset, Interactions, from_columns
from lvlmrec.data.split import published_split
from lvlmrec.errors import InputError
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_from_scores


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        folder.joinpath(name.replace("__", ".")).write_text(text)
    return folder


def read(name: str, path: Path) -> Dataset:
    return load(DatasetConfig(name=name, path=str(path)))


def histories(found: Interactions) -> dict[str, list[str]]:
    bounds = zip(found.user_ids, found.offsets[:-1], found.offsets[1:], strict=True)
    return {user: found.item_ids[found.items[first:last]].tolist() for user, first, last in bounds}


NINEREC = {"u14500": ["v17551", "v165612"], "u2": ["v3"]}


@pytest.mark.parametrize(
    "files",
    [
        {"QB_behaviour__tsv": "u14500\tv17551 v165612\nu2\tv3\n", "QB_pair__csv": "u9,v9,1\n"},
        {"X_pair__csv": "u14500,v165612,20\nu2,v3,5\nu14500,v17551,10\n"},
        {"Bili_2M_pair__csv": "v165612,u14500,20\nv3,u2,5\nv17551,u14500,10\n"},
        {"TN_pair__csv": "u14500,v17551\nu14500,v165612\nu2,v3\n"},
    ],
    ids=lambda files: next(iter(files)),
)
def test_ninerec(tmp_path: Path, files: dict[str, str]) -> None:
    found = read("ninerec", write(tmp_path, **files)).interactions
    assert histories(found) == NINEREC
    assert (found.timestamps is not None) == ("_pair" in next(iter(files)) and "TN" not in next(iter(files)))


def test_ninerec_titles_are_english_else_chinese(tmp_path: Path) -> None:
    items = 'v17551,韩国电影，《女教师》,"Korean Movie, The Governess"\nv3,只有中文,\nv9,x,y\n'
    found = read("ninerec", write(tmp_path, QB_behaviour__tsv="u1\tv17551 v3 v4\n", QB_item__csv=items))
    assert found.titles == {"v17551": "Korean Movie, The Governess", "v3": "只有中文", "v9": "y"}
    assert found.report["items_without_title"] == 1


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            {"X_pair__csv": "u1,v1,5\nu1,v2,\n"},
            r"1 of 2 lines malformed, such as \['u1', 'v2', ''\]; expected user,item,ti",
        ),
        ({"X_behaviour__tsv": "u1 v1 v2\n"}, r"such as line 1: 'u1 v1 v2'; expected user<TAB>"),
        ({"X_behaviour__tsv": "u1\tv1\n", "X_item__csv": "v1,one\n"}, r"X_item\.csv: 1 of 1 lines malformed"),
        ({"X_item__csv": "v1,one,one\n"}, r"no \*_behaviour\.tsv or \*_pair\.csv"),
    ],
)
def test_ninerec_that_is_wrong(tmp_path: Path, files: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        read("ninerec", write(tmp_path, **files))


def review(user: str, item: str, time: int, **more: Any) -> str:
    return json.dumps({"rating": 5.0, "text": "good", "user_id": user, "parent_asin": item, "timestamp": time} | more)


def write_reviews(folder: Path, lines: list[str], meta: list[str] | None, packed: bool = True) -> Path:
    for name, content in {"Baby": lines, "meta_Baby": meta}.items():
        if content is not None:
            data = "".join(f"{line}\n" for line in content).encode()
            path = folder / f"{name}.jsonl{'.gz' * packed}"
            path.write_bytes(gzip.compress(data) if packed else data)
    return folder


REVIEWS = [review("u", "B2", 20), review("u", "B1", 10), review("v", "B1", 1), review("u", "B2", 5)]


@pytest.mark.parametrize("packed", [True, False])
def test_amazon_reviews(tmp_path: Path, packed: bool) -> None:
    titles = [
        {"parent_asin": "B1", "title": "One"},
        {"parent_asin": "B2", "title": None},
        {"parent_asin": "B3", "title": "x"},
    ]
    folder = write_reviews(tmp_path, REVIEWS, [json.dumps(row) for row in titles], packed)
    found = read("amazon_reviews_2023", folder)
    assert histories(found.interactions) == {"u": ["B2", "B1"], "v": ["B1"]}  # the first review of B2 counts
    assert found.interactions.timestamps.tolist() == [5, 10, 1]
    assert found.titles == {"B1": "One"}
    nonzero = {reason: count for reason, count in found.report.items() if count}
    assert nonzero == {"duplicate_interactions": 1, "items_without_title": 1}


def test_amazon_reviews_that_are_malformed(tmp_path: Path) -> None:
    good = [review(f"u{n}", "B1", n) for n in range(300)]
    bad = ["{", review("u", "B1", "yesterday"), '["u"]']  # type: ignore[arg-type]
    assert read("amazon_reviews_2023", write_reviews(tmp_path, good + bad, None)).report["malformed_lines"] == 3
    with pytest.raises(
        InputError, match=r"3 of 53 lines malformed, such as line 51: b'{.*expected user_id, parent_asin"
    ):
        read("amazon_reviews_2023", write_reviews(tmp_path, good[:50] + bad, None))
    (tmp_path / "Baby.jsonl.gz").write_bytes(gzip.compress(b"x" * 9999)[:-20])
    with pytest.raises(InputError, match=r"Baby\.jsonl\.gz: cannot be read"):
        read("amazon_reviews_2023", tmp_path)


def test_amazon_metadata_are_no_reviews(tmp_path: Path) -> None:
    (tmp_path / "meta_Baby.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"no \*\.jsonl\.gz or \*\.jsonl; the folder holds: meta_Baby\.jsonl"):
        read("amazon_reviews_2023", tmp_path)


def test_amazon_beauty_lines(tmp_path: Path) -> None:
    assert histories(read("amazon_beauty", write(tmp_path, B__txt="1 5 3\n2 4\n")).interactions) == {
        "1": ["5", "3"],
        "2": ["4"],
    }
    with pytest.raises(InputError, match="1 of 1 lines malformed, such as line 1: '7'; expected user item item"):
        read("amazon_beauty", write(tmp_path, B__txt="7\n"))


def test_recbole_lines(tmp_path: Path) -> None:
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    found = read("recbole", write(tmp_path, x__inter=head + "u\tb\t3\t20\nu\ta\t1\t10.5\n")).interactions
    assert histories(found) == {"u": ["a", "b"]}
    with pytest.raises(InputError, match="no column user_id:token"):
        read("recbole", write(tmp_path, x__inter="user_id\titem_id:token\nu\ta\n"))


def test_tiktok_parts_and_the_order_of_the_rows(tmp_path: Path) -> None:
    head = "user_id\titem_id\n"
    training = "".join(f"0\t{item}\n" for item in range(30))
    write(tmp_path, train__tsv=head + training, validation__tsv=head + "0\t31\n", test__tsv=head + "0\t32\n1\t33\n")
    found = read("tiktok", tmp_path).interactions
    order = histories(found)["0"]
    assert sorted(order[:30], key=int) == [str(item) for item in range(30)] != order[:30]
    assert order[30:] == ["31", "32"]
    assert histories(read("tiktok", tmp_path).interactions)["0"] == order
    (tmp_path / "test.tsv").unlink()
    with pytest.raises(InputError, match=r"test\.tsv: cannot be read"):
        read("tiktok", tmp_path)
    with pytest.raises(InputError, match=r"expected the folder that holds train\.tsv"):
        read("tiktok", tmp_path / "train.tsv")


def test_ninerec_rows_without_a_time_and_broken_quotes(tmp_path: Path) -> None:
    good = "".join(f"u{n},{n},{n}\n" for n in range(1, 301))
    found = read("ninerec", write(tmp_path, X_pair__csv=good + 'u9,"8"x,3\nu9,7\n'))
    assert found.report["malformed_lines"] == 2 and len(found.interactions.items) == 300
    with pytest.raises(
        InputError, match=r"301 of 601 lines malformed, such as line 301: 'u8,\"8,3', whose quote takes"
    ):
        read("ninerec", write(tmp_path, X_pair__csv=good + 'u8,"8,3\n' + good))


def test_ninerec_titles_with_broken_quotes_and_line_separators(tmp_path: Path) -> None:
    items = "".join(f'v{n},zh,"one\u2028two, {n}"\n' for n in range(300))
    behaviour = "u1\tv1 v2\n"
    found = read("ninerec", write(tmp_path, X_behaviour__tsv=behaviour, X_item__csv=items + 'v9,zh,"broken" x\n'))
    assert found.titles["v299"] == "one\u2028two, 299"
    assert found.report["titles_malformed_lines"] == 1
    with pytest.raises(
        InputError, match=r"301 of 301 lines malformed, such as line 1: .*whose quote takes in 301 lines"
    ):
        read("ninerec", write(tmp_path, X_behaviour__tsv=behaviour, X_item__csv='v,"z,e\n' + items.replace('"', "")))


def test_amazon_beauty_reads_tabs_as_spaces(tmp_path: Path) -> None:
    for line in ("1\t5 3\n2\t4\n", "1\t5\t3\n2 4\n", " 1  5 \t3 \r\n2\t4\r\n", "1 5 3\r2\t4\r"):
        (tmp_path / "B.txt").write_bytes(line.encode())
        assert histories(read("amazon_beauty", tmp_path).interactions) == {"1": ["5", "3"], "2": ["4"]}


@pytest.mark.parametrize("quote", ['"', '"1"', 'a "b'])
def test_quotes_of_formats_without_quoting_are_characters(tmp_path: Path, quote: str) -> None:
    lines = "".join(f"u{n}\t{n}\n" for n in range(3))
    files = {
        "recbole": {"x__inter": f"user_id:token\titem_id:token\nx\t{quote}\n{lines}"},
        "tiktok": {
            "train__tsv": f"user_id\titem_id\nx\t{quote}\n{lines}",
            "validation__tsv": "user_id\titem_id\nu1\t2\n",
            "test__tsv": "user_id\titem_id\nu1\t0\n",
        },
    }
    for name, content in files.items():
        (tmp_path / name).mkdir()
        found = read(name, write(tmp_path / name, **content)).interactions
        assert quote in histories(found)["x"] and len(found.user_ids) == 4


def test_times_of_amazon_reviews_beyond_64_bits_are_malformed(tmp_path: Path) -> None:
    lines = [review(f"u{n}", "B1", n) for n in range(300)]
    found = read("amazon_reviews_2023", write_reviews(tmp_path, [*lines, review("u", "B1", 10**30)], None))
    assert found.report["malformed_lines"] == 1


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("microlens", "A_pairs.tsv", "u\t1 2\n"),
        ("ninerec", "X_behaviour.tsv", "u\t1 2\n"),
        ("amazon_beauty", "B.txt", "u 1 2\n"),
        ("ninerec", "X_pair.csv", "u,1,1\n"),
    ],
)
def test_every_text_format_refuses_utf16_and_zero_bytes_and_reads_old_line_ends(
    tmp_path: Path, name: str, file: str, content: str
) -> None:
    path = tmp_path / file
    for data, match in [
        (content.encode("utf-16"), "UTF-16; save it as UTF-8"),
        (content.encode() + b"\0\0", "line 2: a zero byte"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=match):
            read(name, tmp_path)
    path.write_bytes((content + content.replace("u", "v")).replace("\n", "\r").encode())
    assert len(read(name, tmp_path).interactions.user_ids) == 2


@pytest.mark.data
def test_the_real_tiktok(real_data: Path) -> None:
    config = DatasetConfig(name="tiktok", path=str(real_data / "tiktok"), split="given", min_interactions=1)
    found, report = load_split(config)
    assert found.item_ids.tolist() == [str(item) for item in range(6710)]  # rows of the feature arrays
    assert (found.num_users, found.train_counts().sum()) == (9298, 59_541)
    assert (len(found.validation().targets), len(found.test().targets)) == (3051 - 5, 6130 - 5)
    nonzero = {reason: count for reason, count in report.items() if count}
    assert nonzero == {
        "users_without_training": 10,
        "validation_targets_without_history": 5,
        "users_without_validation_target": 9308 - 3046,
        "test_targets_without_history": 5,
        "users_without_test_target": 9308 - 6125,
    }
    test = found.test()
    assert (test.histories > 0).sum(1).max() == 603
    assert (test.targets > test.histories.max(1)).all()  # why the order of the file tells of the split


@pytest.mark.data
def test_the_order_of_tiktoks_file_tells_of_the_split(real_data: Path) -> None:
    config = DatasetConfig(name="tiktok", path=str(real_data / "tiktok"), split="given", min_interactions=1)
    drawn = load(config).interactions
    order = np.lexsort((drawn.items, drawn.parts, drawn.owners))  # items are in natural order, as in the file
    users, items = drawn.user_ids[drawn.owners[order]], drawn.item_ids[drawn.items[order]]
    in_file = from_columns(users, items, parts=drawn.parts[order])
    found = []
    for data in (drawn, in_file):
        split = published_split(data, min_interactions=1)
        test = split.test()
        markov = BASELINES["markov"]().fit(split.training(), len(split.item_ids))
        ranks = [
            rank_from_scores(markov.score(test.inputs[s]), test.targets[s], test.histories[s]) for s in halves(test)
        ]
        found.append(metrics(np.concatenate(ranks))["hr@10"])
    assert found[1] > 1.7 * found[0]


def halves(holdout: Any) -> list[slice]:
    return [slice(start, start + 1024) for start in range(0, len(holdout.targets), 1024)]
