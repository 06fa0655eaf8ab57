"""Real clips of many codecs and containers: sampled as decoded, or refused by name."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from lvlmrec.media.file import VideoError
from lvlmrec.media.sampling import sample_clip
from tests.videos import decode_all

NUM_SHARES = 8


def clips(real_data: Path) -> list[Path]:
    return sorted(p for f in ("videos", "microlens_videos") for p in (real_data / f).iterdir() if p.suffix != ".csv")


# files whose frames are not what INDEX.csv counted, and why
COUNTED_OTHERWISE = {
    "torchcodec__test__resources__nasa_13013.mp4": 390,  # the index counts the first of two video streams, 320x180
    "fate__video__dxa__meetsquid.mp4": 444,  # the index stops at 400
}

# its display matrix transposes: a quarter turn and a mirror; the index knows the turn only
MIRRORED = "fate__video__hevc__hdr10tags-both.mkv"


@pytest.mark.data
@pytest.mark.thorough
@pytest.mark.parametrize("share", range(NUM_SHARES))  # so that they are tested beside each other
def test_every_real_clip_equals_decoding_everything_or_has_a_named_fault(real_data: Path, share: int) -> None:
    with (real_data / "videos" / "INDEX.csv").open() as file:
        index = {row["file"]: row for row in csv.DictReader(file)}
    num_clips = 0
    for path in clips(real_data)[share::NUM_SHARES]:
        try:
            clip = sample_clip(path, 8, 1 << 20)
        except VideoError as error:
            tags = index[path.name]["tags"]
            is_known = any(tag in tags for tag in ("decode_error", "zero_frames", "no_video"))
            assert is_known or path.name == "fate__video__rv30__sipr_6k5.mp4", (path.name, error)  # cut after 400
            continue
        num_clips += 1
        if "extradata-reload" in path.name:  # its size changes, which the plain reference cannot stack
            assert clip.num_source_frames == 4
            continue
        frames, total = decode_all(path, 8, clip.num_source_frames)
        rotation = index[path.name]["tags"].partition("rotation=")[2].partition(";")[0] if path.name in index else ""
        assert clip.num_source_frames == total, path.name
        frames = np.rot90(frames, int(rotation or 0) // 90, axes=(1, 2))
        frames = frames[:, :, ::-1] if path.name == MIRRORED else frames
        assert np.array_equal(clip.frames, frames), path.name
        if path.name in index:
            counted = COUNTED_OTHERWISE.get(path.name, int(index[path.name]["decoded_up_to_400"]))
            assert total == counted, path.name
    assert num_clips >= 25  # of 30


@pytest.mark.data
def test_a_file_cut_short_elsewhere_is_still_refused(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "microlens_videos" / "10034.mp4"
    path = tmp_path / "v.mp4"
    shutil.copy(source, path)
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(VideoError):
        sample_clip(path, 8, 224)
