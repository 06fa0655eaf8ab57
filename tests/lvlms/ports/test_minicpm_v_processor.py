"""What MiniCPM-V is shown: sizes, slices, patches, times and prompts, against the published rules."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lvlmrec.errors import ConfigError
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.recipe import Recipe, make
from lvlmrec.features.recipe_config import RecipeConfig
from lvlmrec.lvlms import LVLMS, LVLMConfig
from lvlmrec.lvlms.files import torchvision_shim
from lvlmrec.lvlms.ports import minicpm_v
from lvlmrec.lvlms.protocol import Item

torchvision_shim.ensure_importable()

from lvlmrec.lvlms.ports import minicpm_v_processor as processor_file  # noqa: E402

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1280, 720), (602, 336)),
        ((720, 1280), (336, 602)),
        ((640, 480), (518, 392)),
        ((500, 500), (448, 448)),
        ((100, 100), (448, 448)),
        ((1920, 800), (700, 294)),
        ((480, 104), (952, 210)),  # 208 high, then 960 - 1 wide: cut, not rounded, to pixels
    ],
)
def test_frames_are_resized_to_one_area(size, fitted) -> None:
    assert processor_file.plan_views(size, 448, 14, max_slice_nums=1) == processor_file.Views((fitted,), (0, 0))


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((1280, 720), 2, (2, 1)),
        ((720, 1280), 2, (1, 2)),
        ((1280, 720), 9, (3, 2)),  # 4.6 areas: 4, 5 or 6 slices; 3 x 2 is nearest to 1.78
        ((1920, 1080), 9, (4, 2)),  # 10.3 areas, at most 9
        ((600, 600), 9, (1, 2)),  # 1.8 areas: 2 or 3 slices, never a single one
        ((400, 400), 9, (0, 0)),
        ((900, 450), 9, (2, 1)),
    ],
)
def test_large_frames_are_sliced_like_their_shape(size, most, grid) -> None:
    views = processor_file.plan_views(size, 448, 14, most)
    assert views.grid == grid
    assert len(views.sizes) == 1 + math.prod(grid)
    assert all(side % 14 == 0 for view in views.sizes for side in view)


def test_slices_are_what_is_seen_of_the_enlarged_frame(make_clip) -> None:
    frame = make_clip(720, 1280, num_frames=1).frames[0]
    views = processor_file.plan_views((1280, 720), 448, 14, 2)
    # Each half is 640 x 720: int(448 / sqrt(8 / 9)) = 475 high, int(475 * 8 / 9) = 422 wide, to whole patches.
    assert views.sizes == ((602, 336), (420, 476), (420, 476))
    whole, left, right = processor_file.make_views(frame, views)
    picture = Image.fromarray(frame)
    assert np.array_equal(whole, np.asarray(picture.resize((602, 336), Image.Resampling.BICUBIC)))
    large = picture.resize((840, 476), Image.Resampling.BICUBIC)
    assert np.array_equal(left, np.asarray(large.crop((0, 0, 420, 476))))
    assert np.array_equal(right, np.asarray(large.crop((420, 0, 840, 476))))


def test_pixels_are_packed_as_unfold_packs_them() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (28, 42, 3), np.uint8), rng.integers(0, 256, (14, 28, 3), np.uint8)]
    packed, grid = processor_file.pack_patches(pictures, 14)
    assert grid.tolist() == [[2, 3], [1, 2]]
    assert packed.shape == (2, 3, 14, 6 * 14)
    for row, picture in enumerate(pictures):
        pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255 * 2 - 1
        unfolded = torch.nn.functional.unfold(pixels, (14, 14), stride=(14, 14))
        expected = unfolded.reshape(3, 14, 14, -1).permute(0, 1, 3, 2).reshape(3, 14, -1)
        width = expected.shape[-1]
        torch.testing.assert_close(packed[row, ..., :width], expected, rtol=0, atol=2e-7)
        assert not packed[row, ..., width:].any()


@pytest.mark.parametrize(("fps", "total"), [(25.0, 120), (29.97, 300), (23.976, 3000), (10.0, 7), (60.0, 997)])
def test_times_are_the_nearest_tenth_of_a_second(fps, total) -> None:
    indices = [*range(0, total, max(total // 16, 1)), total - 1]
    ticks = processor_file.frame_ticks({"frames_indices": indices, "fps": fps, "total_num_frames": total})
    grid = np.arange(0, total / fps, 0.1)
    for index, tick in zip(indices, ticks, strict=True):
        distances = np.abs(grid - index / fps)
        assert distances[tick] <= distances.min() + 1e-9


@pytest.mark.parametrize(("frames", "packing"), [(1, 1), (16, 1), (180, 1), (181, 2), (360, 2), (361, 3), (540, 3)])
def test_many_frames_are_packed(frames, packing) -> None:
    assert processor_file.pack_size(frames, 0) == packing
    assert processor_file.pack_size(frames, 6) == 6


def tiny_processor(directory: Path) -> Any:
    config = dataclasses.replace(LVLMConfig(), name=directory.name, model=str(directory))
    return minicpm_v.read_processor(config, LVLMS[directory.name].read_config(config))


def process(processor: Any, clips: list[Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
    metadata = [
        {
            "total_num_frames": clip.num_source_frames,
            "fps": clip.num_source_frames / clip.duration,
            "frames_indices": clip.frame_indices.tolist(),
        }
        for clip in clips
    ]
    texts = [processor.video_token] * len(clips)
    inputs = processor(text=texts, videos=[clip.frames for clip in clips], video_metadata=metadata, **options)
    return inputs, [offsets[0]["replacement"] for offsets in inputs.pop("text_replacement_offsets")]


def test_the_text_names_every_frame_or_pack(tiny_models, make_clip) -> None:
    old, new = (tiny_processor(tiny_models[name]) for name in ("minicpm_v_2_6", "minicpm_v_4_5"))
    clip, frame = make_clip(90, 160, num_frames=7), "<image>" + "<unk>" * 4 + "</image>"
    assert process(old, [clip])[1] == process(new, [clip])[1] == ["\n".join([frame] * 7)]
    assert process(new, [clip], packing=3)[1] == ["\n".join([frame] * 3)]
    assert process(old, [clip], packing=3)[1] == ["\n".join([frame] * 7)]  # 2.6 packs nothing
    part = "<slice>" + "<unk>" * 4 + "</slice>"
    tall = make_clip(240, 120, num_frames=2)  # 2.3 areas of 112 x 112
    inputs, (text,) = process(old, [tall], max_slice_nums=2)
    assert text == "\n".join([frame + part + "\n" + part] * 2)
    assert inputs["group_sizes"].tolist() == [1] * 6
    inputs, (text,) = process(new, [tall], max_slice_nums=2, packing=2)
    assert text == frame + part + "\n" + part
    assert inputs["group_sizes"].tolist() == [2, 2, 2]  # whole frames, upper halves, lower halves
    assert inputs["temporal_ids"].tolist() == [0, 12] * 3
    assert inputs["num_groups"].tolist() == [3]


def test_a_cover_is_a_numbered_picture_with_slices(tiny_models, make_clip) -> None:
    tokens = "<unk>" * 4
    for name in ("minicpm_v_2_6", "minicpm_v_4_5"):
        processor = tiny_processor(tiny_models[name])
        pictures = [make_clip(60, 100, num_frames=1).frames[0], make_clip(120, 360, num_frames=1).frames[0]]
        inputs = processor(text=[processor.image_token] * 2, images=[[picture] for picture in pictures])
        small, large = (offsets[0]["replacement"] for offsets in inputs["text_replacement_offsets"])
        assert small == f"<image_id>0</image_id><image>{tokens}</image>"
        assert large == small + f"<slice>{tokens}</slice>" * 3  # 3.4 areas of 112 x 112, at most 3 slices
        assert inputs["num_groups"].tolist() == [1, 4]
        assert inputs["temporal_ids"].tolist() == [-1] * 5


def test_settings_are_the_published_ones_where_files_do_not_say(tiny_models, tmp_path, make_clip) -> None:
    directory = Path(shutil.copytree(tiny_models["minicpm_v_2_6"], tmp_path / "minicpm_v_2_6"))
    (directory / "preprocessor_config.json").unlink()
    picture = make_clip(720, 1280, num_frames=1).frames[0]
    inputs = tiny_processor(directory)(text=["(<image>./</image>)"], images=[[picture]])
    assert inputs["grid_hw"][0].tolist() == [24, 43]
    assert inputs["num_groups"].tolist() == [7]  # the whole and 3 x 2 slices: 4.6 areas of 448 x 448


def test_prompts_are_the_published_ones(tiny_models) -> None:
    conversation = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    old, new = (tiny_processor(tiny_models[name]) for name in ("minicpm_v_2_6", "minicpm_v_4_5"))
    assert old.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n(<image>./</image>)\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert new.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<|im_start|>user\n(<image>./</image>)\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert new.apply_chat_template(conversation, add_generation_prompt=False).endswith("What?<|im_end|>\n")


def test_packing_is_part_of_the_recipe_and_changes_the_features(tiny_models, make_clip) -> None:
    family, clip = LVLMS["minicpm_v_4_5"], make_clip(60, 90, num_frames=6)
    config = dataclasses.replace(
        LVLMConfig(), name="minicpm_v_4_5", model=str(tiny_models["minicpm_v_4_5"]), device="cpu"
    )
    info = family.inspect(config)
    found = {}
    for packing in (0, 3):
        wanted = RecipeConfig(taps=["llm.-1"], video_options={"packing": packing})
        recipe = recipes.resolve_source(wanted, info)
        assert recipe.video_options == {"max_slice_nums": 1, "packing": packing}
        assert Recipe.from_json(make(recipe, "float16").to_json()).source == recipe
        model = family.load(config, recipe)
        (found[make(recipe, "float16").fingerprint],) = model.extract(model.prepare([Item("a", clip)])).values()
    assert len(found) == 2
    first, second = found.values()
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(
        ConfigError, match=r"recipe\.video_options\.fps=2: not an option of minicpm_v_4_5; choices: max_"
    ):
        recipes.resolve_source(RecipeConfig(video_options={"fps": 2}), info)
