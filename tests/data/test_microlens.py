"""Both MicroLens formats of interactions and of titles, and what can be wrong with them."""

from pathlib import Path

import pytest

from lvlmrec.data import DATASETS, DatasetConfig, load, microlens
from lvlmrec.errors import InputError

PAIRS = "u1\t3 1 2\r\nu2\t2 3\r\n"
GOOD = "".join(f"{n}\t1 2 3\n" for n in range(200))


def write(folder: Path, **files: str) -> str:
    for name, text in files.items():
        folder.joinpath(name.replace("__", ".")).write_bytes(text.encode())
    return str(folder)


def history(path: str, user: str) -> list[str]:
    found = microlens.load(path).interactions
    u = found.user_ids.tolist().index(user)
    return found.item_ids[found.items[found.offsets[u] : found.offsets[u + 1]]].tolist()


def test_tsv(tmp_path: Path) -> None:
    path = write(tmp_path, A_pairs__tsv="\ufeff" + PAIRS + "\r\n")
    dataset = load(DatasetConfig(name="microlens", path=path))
    assert dataset.interactions.user_ids.tolist() == ["u1", "u2"]
    assert history(path, "u1") == ["3", "1", "2"]
    assert dataset.titles == {}
    assert dataset.report == {"malformed_lines": 0, "duplicate_users": 0, "duplicate_interactions": 0}


def test_csv_is_sorted_by_time_and_says_the_same(tmp_path: Path) -> None:
    rows = [("u2", 3, 30), ("u1", 2, 9), ("u1", 3, 1), ("u2", 2, 20), ("u1", 1, 5)]
    text = "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)
    csv, tsv = tmp_path / "csv", tmp_path / "tsv"
    csv.mkdir(), tsv.mkdir()
    one = microlens.load(write(csv, A_pairs__csv=text)).interactions
    other = microlens.load(write(tsv, A_pairs__tsv=PAIRS)).interactions
    assert one.user_ids.tolist() == other.user_ids.tolist()
    assert one.offsets.tolist() == other.offsets.tolist()
    assert one.item_ids[one.items].tolist() == other.item_ids[other.items].tolist()


def test_quoted_titles(tmp_path: Path) -> None:
    titles = '\ufeffitem,title\r\n1,"one, ""two"" # three"\r\n\r\n2,plain\r\n2,again\r\n9,\r\n'
    dataset = microlens.load(write(tmp_path, A_pairs__tsv=PAIRS, A_titles__csv=titles))
    assert dataset.titles == {"1": 'one, "two" # three', "2": "plain"}
    assert dataset.report["titles_duplicate_items"] == 1
    assert dataset.report["titles_empty"] == 1
    assert dataset.report["items_without_title"] == 1


def test_unquoted_titles_split_at_the_first_comma(tmp_path: Path) -> None:
    titles = '1, one, two, three\r\n2, say "hi\r\n3, x\r\n'
    dataset = microlens.load(write(tmp_path, A_pairs__tsv=PAIRS, A_title_en__csv=titles))
    assert dataset.titles == {"1": "one, two, three", "2": 'say "hi', "3": "x"}


def test_titles_of_another_dataset_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path, A_pairs__tsv=PAIRS, B_pairs__tsv=PAIRS, B_titles__csv="item,title\n1,b\n")
    assert microlens.load(f"{path}/A_pairs.tsv").titles == {}
    assert microlens.load(f"{path}/B_pairs.tsv").titles == {"1": "b"}


def test_a_user_on_two_lines_gets_all_items(tmp_path: Path) -> None:
    path = write(tmp_path, A_pairs__tsv="u\t1 2\nv\t3\nu\t2 4\n")
    assert history(path, "u") == ["1", "2", "4"]
    report = microlens.load(path).report
    assert (report["duplicate_users"], report["duplicate_interactions"]) == (1, 1)


@pytest.mark.parametrize("bad", ["no tab here", "\t1 2", "u\t", "u\t1\t2"])
def test_few_malformed_lines_are_counted(tmp_path: Path, bad: str) -> None:
    dataset = microlens.load(write(tmp_path, A_pairs__tsv=GOOD + bad + "\n"))
    assert dataset.report["malformed_lines"] == 1
    assert len(dataset.interactions.user_ids) == 200


def test_many_malformed_lines_are_an_error_that_shows_one(tmp_path: Path) -> None:
    path = write(tmp_path, A_pairs__tsv=GOOD + "\n1 2 3\n1 2 3\n1 2 3\n")
    with pytest.raises(InputError, match=r"3 of 203 lines malformed, such as line 202: '1 2 3'; expected user<TAB>"):
        microlens.load(path)


@pytest.mark.parametrize("text", ["", "\r\n \n", "\ufeff"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"A_pairs\.tsv: empty file"):
        microlens.load(write(tmp_path, A_pairs__tsv=text))


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "A_pairs.tsv").write_bytes(b"u\t1 2\nv\t3 \xff\n")
    with pytest.raises(InputError, match="line 2: byte 0xff"):
        microlens.load(str(tmp_path))


def test_titles_that_are_something_else(tmp_path: Path) -> None:
    path = write(tmp_path, A_pairs__tsv=PAIRS, A_titles__csv="item,title\n1,a,b\n2,c\n")
    with pytest.raises(InputError, match=r"A_titles\.csv: 1 of 2 lines malformed"):
        microlens.load(path)


MANY_TITLES = "".join(f'{n},"title, of {n}"\n' for n in range(300))


@pytest.mark.parametrize("broken", ['x,"unclosed', 'x,"closed" and more', 'x,"a"",b'])
def test_titles_that_a_quote_swallows_are_malformed(tmp_path: Path, broken: str) -> None:
    path = write(tmp_path, A_pairs__tsv=PAIRS, A_titles__csv=f"item,title\n{MANY_TITLES}{broken}\n")
    dataset = microlens.load(path)
    assert dataset.report["titles_malformed_lines"] == 1 and len(dataset.titles) == 300
    if broken != 'x,"closed" and more':
        write(tmp_path, A_titles__csv=f"item,title\n{broken}\n" + MANY_TITLES.replace('"', "").replace(", of", ""))
        with pytest.raises(InputError, match=r"301 of 301 lines malformed, such as line 2: .*whose quote takes in 301"):
            microlens.load(path)


@pytest.mark.parametrize(
    "titles",
    [
        'item,title,\r\n1,"one, two",\r\n2,plain,\r\n',  # every line ends in a comma
        '"item","title"\n"1","one, two"\n"2","plain"\n',
        'item,title\r1,"one, two"\r2,plain\r',
    ],
)
def test_titles_as_programs_write_them(tmp_path: Path, titles: str) -> None:
    dataset = microlens.load(write(tmp_path, A_pairs__tsv=PAIRS, A_titles__csv=titles))
    assert dataset.titles == {"1": "one, two", "2": "plain"}


def test_a_header_of_titles_that_occurs_twice_is_no_title(tmp_path: Path) -> None:
    titles = f"item,title\n{MANY_TITLES}Item, Title\n400,last\n"
    dataset = microlens.load(write(tmp_path, A_pairs__tsv=PAIRS, A_titles__csv=titles))
    assert "Item" not in dataset.titles and dataset.report["titles_malformed_lines"] == 1


def test_titles_keep_the_line_ends_inside_their_quotes(tmp_path: Path) -> None:
    titles = 'item,title\n1,"one\ntwo"\n2,plain\n'
    assert microlens.load(write(tmp_path, A_pairs__tsv=PAIRS, A_titles__csv=titles)).titles["1"] == "one\ntwo"


def test_several_files(tmp_path: Path) -> None:
    path = write(tmp_path, A_pairs__tsv=PAIRS, A_pairs__csv="user,item\n1,2\n")
    with pytest.raises(InputError, match=r"several files to choose from: A_pairs.csv, A_pairs.tsv"):
        microlens.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*_pairs.tsv or \*_pairs.csv; the folder holds: other.txt"):
        microlens.load(write(tmp_path, other__txt="x"))


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_loader_names_a_path_that_is_not_there(tmp_path: Path, name: str) -> None:
    for missing in ("nowhere", "nowhere_pairs.csv"):
        with pytest.raises(InputError, match="nowhere"):
            load(DatasetConfig(name=name, path=str(tmp_path / missing)))


def test_reads_object_storage(bucket: str, tmp_path: Path) -> None:
    from lvlmrec import storage

    storage.write_bytes(f"{bucket}/set/A_pairs.tsv", PAIRS.encode())
    storage.write_bytes(f"{bucket}/set/A_titles.csv", b"item,title\n1,one\n")
    assert microlens.load(f"{bucket}/set").titles == {"1": "one"}
    assert history(f"{bucket}/set/A_pairs.tsv", "u2") == ["2", "3"]


@pytest.mark.data
def test_the_real_files(real_data: Path) -> None:
    dataset = microlens.load(str(real_data / "microlens_50k"))
    found = dataset.interactions
    assert (len(found.user_ids), len(found.item_ids), len(found.items)) == (50_000, 19_220, 359_708)
    assert (found.lengths.min(), found.lengths.max()) == (5, 218)
    assert len(dataset.titles) == 19_220
    assert not any(dataset.report.values())


@pytest.mark.data
def test_the_real_titles_of_100k(real_data: Path) -> None:
    from lvlmrec.data import files

    titles, report = files.read_titles(str(real_data / "microlens_100k/MicroLens-100k_title_en.csv"))
    assert len(titles) == 19_738 - 72
    assert titles["3"] == "This sudden reversal"
    assert report == {"titles_malformed_lines": 0, "titles_duplicate_items": 0, "titles_empty": 72}
