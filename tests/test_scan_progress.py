"""How far a scan or a fit says it is: by the samples that are done, not by what is read ahead of them."""

import logging
import tarfile

import pytest
from builders import fit_config, write_shards

from sanitize.commands.fit import fit
from sanitize.commands.scan import ScoreTask
from sanitize.stages.shards import list_shards


@pytest.fixture
def score_task(detector, tmp_path):
    return ScoreTask(
        detector=str(detector),
        encoder=None,
        out=str(tmp_path / "scanned"),
        batch_size=5,
        precision="fp32",
        image_member="",
        caption_member="",
        effort="thorough",
        flag_p=0.01,
    )


def test_bytes_are_those_of_the_samples_that_are_scored(score_task, tmp_path):
    """Twenty samples fit into what is read ahead, so all of the shard is read when the first five are scored."""
    (shard,) = list_shards([str(write_shards(tmp_path / "in", [20]))])
    with tarfile.open(shard.url) as tar:
        starts = [member.offset for member in tar if member.name.endswith(".cls")]  # the first member of each sample
        end_of_members = tar.offset
    told: list[tuple[int, int]] = []
    score_task.start(1)(shard, lambda samples, _flagged, size, *_: told.append((samples, size)))
    expected = [(done, [*starts, end_of_members][done]) for done in (5, 10, 15, 20)]
    assert told == [*expected, (20, shard.size)]  # the last when its file is written


def test_every_long_stage_of_a_fit_says_how_far_it_is(aux_shards, encoder_spec, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sanitize.progress")
    detector = fit(fit_config(aux_shards, encoder_spec, tmp_path / "detector"))
    lines = [record.getMessage() for record in caplog.records if record.name == "sanitize.progress"]
    last = {line.partition(":")[0]: line for line in lines}
    assert list(last) == ["embed", "train", "calibrate"]
    assert last["embed"].startswith("embed: 2/2 shards, 240 images, ")
    assert last["train"].startswith("train: 2/2 epochs, ")
    measured = (
        detector.summary.training_images // 2 + detector.summary.calibration_images
    )  # the other half are neighbours
    assert last["calibrate"].startswith(f"calibrate: 2/2 shards, {measured} images, ")
