"""The whole extraction on a local Ray: real videos, a tiny model, real actors."""

import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lvlmrec import storage
from lvlmrec.config import load
from lvlmrec.errors import ConfigError, InputError, JobFailed
from lvlmrec.extraction import estimate, memory, pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import store
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import sample_clip
from tests.conftest import credentials
from tests.videos import write_video

GOOD = [f"good{i}" for i in range(6)]
Undisturbed = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def cluster(ray_address: str, s3_server: str) -> Iterator[None]:
    """A driver of the shared Ray, whose workers can reach the S3 server."""
    import ray

    ray.init(ray_address, log_to_driver=False, runtime_env={"env_vars": credentials(s3_server)})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llava_onevision"
    LVLMS["llava_onevision"].write_tiny(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good videos of different sizes and lengths, two broken files and an empty one."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(GOOD):
        write_video(folder / f"{name}.mp4", num_frames=4 + 5 * i, size=(64 + 16 * i, 96 - 8 * i))
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "truncated.mp4").write_bytes((folder / "good5.mp4").read_bytes()[:600])
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def extract(*overrides: str) -> dict[str, Any]:
    return pipeline.run(pipeline.plan(load(ExtractConfig, [], list(overrides))), lambda metrics, step: None)


def rows_of(uri: str) -> dict[str, dict[str, Any]]:
    """Every committed item with its row, without the version of its file, as a reader of the index sees it."""
    rows = {}
    for entry in store.read(uri).index.to_pylist():
        table = storage.read_table(f"{uri}/parts/{entry['part']}").drop_columns(["source"])
        rows[entry["item_id"]] = table.slice(entry["row"], 1).to_pylist()[0]
    return rows


def overrides(tmp_path: Path, model: Path, videos: Path) -> list[str]:
    return [f"workspace={tmp_path}", f"input={videos}", f"lvlm.model={model}", "recipe.frames=8", "recipe.taps=[llm.*]"]


@pytest.fixture(scope="module")
def undisturbed(cluster: None, model: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The workspace and the result of an extraction of `videos` in parts of two; nothing may write there."""
    workspace = tmp_path_factory.mktemp("undisturbed")
    return workspace, extract(*overrides(workspace, model, videos), "pool.videos_per_part=2")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestExtraction:
    def test_every_video_is_written_or_rejected_with_a_reason(self, undisturbed: Undisturbed) -> None:
        _, result = undisturbed
        assert {key: result[key] for key in ("items", "written", "skipped", "rejected")} == {
            "items": 9,
            "written": 6,
            "skipped": 0,
            "rejected": 3,
        }
        rejected = store.read_rejected(result["feature_set"]).to_pandas()
        assert sorted(rejected["item_id"]) == ["empty", "noise", "truncated"]
        assert (rejected[["stage", "error", "message"]] != "").all(axis=None)
        rows = rows_of(result["feature_set"])
        assert sorted(rows) == GOOD
        assert rows["good0"]["num_distinct_frames"] == 4
        assert rows["good5"]["num_distinct_frames"] == 8

    def test_the_features_are_those_of_the_adapter(self, tmp_path: Path, model: Path, videos: Path) -> None:
        config = load(ExtractConfig, [], [*overrides(tmp_path, model, videos), "recipe.dtype=float32"])
        plan = pipeline.plan(config)
        result = pipeline.run(plan, lambda metrics, step: None)
        lvlm = LVLMS["llava_onevision"].load(config.lvlm, plan.recipe.reading)
        rows = rows_of(result["feature_set"])
        for item in GOOD:
            clip = sample_clip(videos / f"{item}.mp4", 8, 1280)
            for name, values in lvlm.extract(lvlm.prepare([Item(item, clip)])).items():
                np.testing.assert_allclose(rows[item][name], values[0].numpy(), rtol=0, atol=1e-6)

    def test_a_rerun_does_only_what_is_missing(
        self, undisturbed: Undisturbed, tmp_path: Path, model: Path, videos: Path
    ) -> None:
        uri = shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True) / "features"
        shutil.copytree(videos, tmp_path / "videos")
        arguments = overrides(tmp_path, model, tmp_path / "videos")
        before = {f.uri: f.modified for f in storage.list_files(str(uri), recursive=True)}
        again = extract(*arguments)
        assert (again["written"], again["skipped"], again["rejected"], again["rejected_now"]) == (0, 9, 3, 0)
        assert {f.uri: f.modified for f in storage.list_files(str(uri), recursive=True)} == before
        shutil.copy(videos / "good2.mp4", tmp_path / "videos" / "new.mp4")
        more = extract(*arguments)
        assert (more["written"], more["skipped"]) == (1, 9)
        rows = rows_of(more["feature_set"])
        assert sorted(rows) == [*GOOD, "new"]
        assert rows["new"] == rows["good2"] | {"item_id": "new"}

    def test_parts_of_a_run_killed_before_its_commit_are_adopted(
        self, undisturbed: Undisturbed, tmp_path: Path, model: Path, videos: Path
    ) -> None:
        shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
        uri = tmp_path / "features" / Path(undisturbed[1]["feature_set"]).name
        for left in ("index", "writers"):  # as after the first run, which was killed
            shutil.rmtree(uri / left)
        lost = sorted((uri / "parts").iterdir())[0]
        items_lost = len(pq.read_table(lost))
        lost.unlink()
        again = extract(*overrides(tmp_path, model, videos), "pool.videos_per_part=2")
        assert Path(again["feature_set"]) == uri
        assert (again["written"], again["skipped"]) == (items_lost, 9 - items_lost)
        assert rows_of(again["feature_set"]) == rows_of(undisturbed[1]["feature_set"])

    def test_batches_blocks_and_actors_change_nothing_and_tasks_ask_for_the_same(
        self, undisturbed: Undisturbed, tmp_path: Path, model: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray keeps a class of scheduling for each amount of memory that a task asks for."""
        from ray.remote_function import RemoteFunction

        asked: defaultdict[str, set[float | None]] = defaultdict(set)
        options = RemoteFunction.options

        def noting(function: RemoteFunction, **given: Any) -> Any:
            asked[given.get("name", "")].add(given.get("memory"))
            return options(function, **given)

        monkeypatch.setattr(RemoteFunction, "options", noting)
        pool = ["pool.max_actors=2", "pool.min_actors=2", "pool.videos_per_block=2", "pool.videos_per_part=1"]
        other = extract(*overrides(tmp_path, model, videos), "lvlm.batch_size=1", *pool)
        assert rows_of(other["feature_set"]) == rows_of(undisturbed[1]["feature_set"])
        assert asked["MapBatches(write)"] == {memory.WORKER_MEMORY}
        (decoding,) = asked["MapBatches(decode)"]
        assert decoding is not None
        assert decoding > memory.WORKER_MEMORY

    def test_from_object_storage_to_object_storage(
        self, undisturbed: Undisturbed, bucket: str, tmp_path: Path, model: Path, videos: Path
    ) -> None:
        for name in ("good0", "good1", "noise"):
            storage.write_bytes(f"{bucket}/videos/{name}.mp4", (videos / f"{name}.mp4").read_bytes())
        remote = [f"input={bucket}/videos", f"store={bucket}/features"]
        result = extract(*overrides(tmp_path, model, videos), *remote)
        assert (result["written"], result["rejected"]) == (2, 1)
        expected = rows_of(undisturbed[1]["feature_set"])
        assert rows_of(result["feature_set"]) == {name: expected[name] for name in ("good0", "good1")}

    def test_when_nothing_fits_the_model_the_run_fails(self, tmp_path: Path, videos: Path) -> None:
        from safetensors.torch import load_file, save_file

        broken = tmp_path / "broken"
        LVLMS["llava_onevision"].write_tiny(broken, seed=0)
        weights = load_file(broken / "model.safetensors")
        name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight") and "vision" not in name)
        weights[name] = weights[name] * 1e6
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(JobFailed, match=r"every video was rejected by the model: .*overflows float16"):
            extract(*overrides(tmp_path, broken, videos))


def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, model: Path, videos: Path) -> None:
    def plan(*overrides: str) -> None:
        base = [f"workspace={tmp_path}", f"input={videos}", f"lvlm.model={model}"]
        pipeline.plan(load(ExtractConfig, [], [*base, *overrides]))

    with pytest.raises(InputError, match="no such manifest"):
        plan("input=/nowhere")
    with pytest.raises(ConfigError, match=r"lvlm\.model"):
        plan("lvlm.model=/nowhere")
    with pytest.raises(ConfigError, match=r"lvlm\.model"):
        plan("lvlm.name=qwen2_vl")
    with pytest.raises(ConfigError, match=r"'llm\.99': out of range"):
        plan("recipe.taps=[llm.99]")
    with pytest.raises(InputError, match=r"pool\.max_actors: 1 is below pool\.min_actors=2"):
        plan("pool.min_actors=2")


def test_what_is_left_out_of_the_input_is_said(
    tmp_path: Path, model: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.MOV", "a.HEIC", "a.json", "b.mp4.part"):
        shutil.copy(videos / "good0.mp4", folder / name)
    shutil.copy(videos / "good0.mp4", os.fsdecode(f"{folder}/caf".encode() + b"\xe9.mp4"))
    base = [f"workspace={tmp_path}", f"input={folder}", f"lvlm.model={model}"]
    plan = pipeline.plan(load(ExtractConfig, [], base))
    assert plan.manifest["item_id"].to_pylist() == ["a"]
    left_out = "3 not videos (1 images, 1 texts, 1 unfinished downloads), 1 names not utf8"
    assert f"extract: left out of the input: {left_out}\n" in capsys.readouterr().err
    assert (plan.manifest_report["not_videos"], plan.manifest_report["not_videos_images"]) == (3, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_titles_covers_and_captions_from_a_manifest_to_a_second_model(
    tmp_path: Path, model: Path, videos: Path
) -> None:
    write_video(tmp_path / "cover.mp4", num_frames=1, size=(40, 60))
    items = pd.DataFrame(
        {
            "item_id": ["a", "b", "no_title", "no_cover"],
            "uri": [str(videos / f"good{i}.mp4") for i in range(4)],
            "title": ["a red circle", "blue", "", "green square"],
            "cover_uri": ["cover.mp4", "cover.mp4", "cover.mp4", ""],
        }
    )
    items.to_csv(tmp_path / "items.csv", index=False)
    prompts = (
        "recipe.prompts={caption: {text: 'Describe {title}.', max_new_tokens: 5}, look: {text: Look., input: cover}, "
        "title: {text: '{title}', input: text}}"
    )
    shared = [f"workspace={tmp_path}", f"lvlm.model={model}", "recipe.taps=[llm.2]"]
    result = extract(
        *shared, f"input={tmp_path}/items.csv", prompts, "recipe.poolings=[visual_mean,last_token,new_mean]"
    )
    assert result["rejected_by_reason"] == {"fetch/missing": 1, "text/empty": 1}
    rows = rows_of(result["feature_set"])
    assert sorted(rows) == ["a", "b"]
    assert sorted(rows["a"])[-1] == "title/llm.2/last_token"
    assert rows["a"]["caption/finish"] in ("eos", "length")
    assert set(result["stages"]) == {"decode", "prepare", "forward", "write"}
    assert result["estimate"]["bytes_per_item"] == 6 * 128 * 2 + 4 * 5

    captions = store.read_texts(result["feature_set"])
    assert captions.set_index("item_id")["caption"].to_dict() == {i: rows[i]["caption/text"] for i in "ab"}
    read = ["recipe.prompts={said: {text: '{caption}', input: text}}", "recipe.poolings=[all_mean]"]
    second = extract(*shared, f"input={result['feature_set']}", *read)
    assert sorted(rows_of(second["feature_set"])) == ["a", "b"]
    recipe = store.read(second["feature_set"]).recipe.reading
    assert recipe.texts_from == store.read(result["feature_set"]).recipe.fingerprint
    assert recipe.media == ()
    with pytest.raises(InputError, match=r"no column 'title'; its columns: item_id, caption"):
        extract(
            *shared, f"input={result['feature_set']}", "recipe.prompts={t: {text: '{title}', input: text}}", read[1]
        )


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_estimate_is_told_before_and_can_be_all(
    tmp_path: Path, model: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [f"workspace={tmp_path}", f"lvlm.model={model}", f"input={videos}", "estimate.videos=3"]
    result = extract(*shared, "estimate.only=true")
    told = result["estimate"]
    assert (told["videos"], told["bytes_per_item"], told["gb"]) == (9, 4 * 128 * 2, 9 * 4 * 128 * 2 / 1e9)
    assert told["limited_by"] in ("decode", "prepare", "forward")
    assert told["hours"] > 0
    assert not list(Path(result["feature_set"]).glob("parts/*"))
    done = extract(*shared)
    assert "hours" not in done["estimate"]
    error = capsys.readouterr().err
    assert "9 videos, 1,024 bytes each, 9.22e-06 GB, about " in error
    assert estimate.describe(told) in error
    assert done["slowest_stage"] in error
