"""What goes wrong during a scan: the model, the device, and what users do wrong."""

import io
import json
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from builders import image_members, random_image, write_encoder, write_tar

from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.config import ThresholdPolicy
from sanitize.config_loading import load_encoder_spec
from sanitize.config_models import DecoderConfig
from sanitize.errors import CheckpointError, ConfigError, RefusedError, StorageError
from sanitize.stages.shards import open_shard

# ---------------------------------------------------------------- model trouble


class SmallMemory(torch.nn.Module):
    """A backbone that has room for two images, and returns NaN for an all-white one."""

    def forward(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")
        pooled = images.mean(dim=(2, 3))
        return torch.where(images.amin(dim=(1, 2, 3))[:, None] > 1.9, torch.nan, pooled)


@pytest.fixture
def small_memory_scorer(encoder_spec):
    from sanitize.stages.decoder import Decoder
    from sanitize.stages.encoders import Encoder
    from sanitize.stages.scoring import References, Scorer

    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(8, 4, 16, 2, 1, 1), 3).eval()
    references = References(torch.zeros(3, 8, 8), torch.ones(3, 8, 8))
    options: dict[str, Any] = {
        "name": "lowres",
        "mask_ratio": 1.0,
        "seed": 0,
        "precision": "fp32",
        "device": torch.device("cpu"),
    }
    return Scorer(Encoder(SmallMemory(), encoder_spec), decoder, references, **options)


def image(number, pixels):
    from sanitize.records import DecodedImage

    return DecodedImage(number, f"k{number}", "00" * 32, pixels, 16, 16, "ok", "")


def test_out_of_memory_halves_the_batch_and_goes_on(small_memory_scorer):
    pixels = [torch.from_numpy(random_image(i).copy()).permute(2, 0, 1) for i in range(7)]
    together = small_memory_scorer([image(i, p) for i, p in enumerate(pixels)])["score"]
    single = [small_memory_scorer([image(i, p)])["score"][0] for i, p in enumerate(pixels)]
    assert small_memory_scorer.largest <= 2
    assert together == pytest.approx(np.array(single), rel=1e-5)


def test_an_image_without_a_finite_score_gets_a_reason(small_memory_scorer):
    from sanitize.stages.score_table import rows

    decoded = [
        image(0, torch.full((3, 16, 16), 255, dtype=torch.uint8)),
        image(1, torch.zeros(3, 16, 16, dtype=torch.uint8)),
    ]
    result = rows("s", decoded, small_memory_scorer(decoded), np.zeros(9, np.float32)).to_pylist()
    assert [row["status"] for row in result] == ["not_finite", "ok"]
    assert (result[0]["score"], result[0]["p_value"], result[0]["embedding_norm"]) == (None, None, None)


# ---------------------------------------------------------------- wrong use


def test_a_missing_detector_says_how_to_make_one(shards, scan_config, tmp_path):
    with pytest.raises(CheckpointError, match=r"no detector there .* Run `sanitize fit` first, or give --detector"):
        scan(scan_config(shards, detector=str(tmp_path / "none")))


def test_a_detector_of_another_encoder_is_refused(shards, scan_config, tmp_path):
    other = load_encoder_spec(str(write_encoder(tmp_path / "other", seed=5)))
    with pytest.raises(
        CheckpointError, match=r"fitted to another encoder: .*other/encoder.safetensors .* run `sanitize fit`"
    ):
        scan(scan_config(shards, encoder=other))


def test_a_damaged_detector_is_refused(shards, scan_config, detector, tmp_path):
    shutil.copytree(detector, tmp_path / "copy")
    with (tmp_path / "copy" / "decoder.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"decoder.safetensors: does not match detector.json"):
        scan(scan_config(shards, detector=str(tmp_path / "copy")))


def test_the_folder_of_another_run_is_refused(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    with pytest.raises(RefusedError, match=r"holds a scan that differs in precision\. Give another --out"):
        scan(scan_config(shards, precision="auto", scores_only=True))
    write_tar(shards / "new.tar", image_members(["n"]))
    with pytest.raises(RefusedError, match="differs in shards"):
        scan(scan_config(shards, scores_only=True))


def test_shards_without_images_are_named(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "audio.tar", [("a.wav", b"x"), ("b.wav", b"y")])
    result = scan(scan_config(tmp_path / "in"))
    assert "none of its 2 samples has an image (found: wav). Give shards of images" in result.failed[0]


def test_a_rate_the_calibration_cannot_hold_fails_before_any_work(shards, scan_config, tmp_path):
    with pytest.raises(ConfigError, match=r"fpr 0.0001: needs at least 500 calibration scores"):
        scan(scan_config(shards, policy=ThresholdPolicy(fpr=0.0001)))
    assert not (tmp_path / "scanned").exists()


def test_no_permission_to_write_says_so(shards, scan_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"a part of the path is a file, not a folder\. Choose another --out"):
        scan(scan_config(shards, out="file/scanned"))


def test_a_read_only_place_says_so(shards, scan_config, monkeypatch):
    from pathlib import Path

    def denied(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(
        StorageError, match=r"scanned.*: no permission to write\. Choose another --out, then run the same command"
    ):
        scan(scan_config(shards))


def test_an_empty_tar_is_a_failed_shard_and_one_without_members_has_no_rows(shards, scan_config):
    (shards / "empty.tar").write_bytes(b"")
    write_tar(shards / "no-members.tar", [])
    result = scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.1)))
    assert [f.partition(": ")[2] for f in result.failed] == ["the file is empty (0 bytes). Download or write it again."]
    assert result.samples == 54


class FailingDisk(io.BytesIO):
    def read(self, *_):
        raise OSError(5, "Input/output error")


def test_a_device_that_fails_while_reading_fails_its_shard_alone(shards, scan_config, monkeypatch):
    def opened(shard):
        return FailingDisk() if shard.stem == "part-0002" else open_shard(shard)

    monkeypatch.setattr(sys.modules["sanitize.commands.scan"], "open_shard", opened)
    result = scan(scan_config(shards, scores_only=True))
    assert "part-0002.tar: cannot be read ([Errno 5] Input/output error). Check the device" in result.failed[0]
    assert result.samples == 21


def test_a_shard_that_vanishes_during_the_scan_fails_alone(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    (shards / "part-0001.tar").unlink()
    result = clean(str(tmp_path / "scanned"), ThresholdPolicy("fraction", fraction=0.1))
    assert [f.partition(": ")[2] for f in result.failed] == ["no such file. Check the path."]
    assert (tmp_path / "scanned" / "clean" / "part-0002.tar").exists()


def test_no_permission_to_read_says_so(shards, scan_config, monkeypatch):
    from pathlib import Path

    def denied(self, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(StorageError, match="no permission to read. Check the owner and mode of the file"):
        scan(scan_config(shards))


def test_a_scan_without_scores_cannot_be_cleaned(tmp_path):
    with pytest.raises(ConfigError, match=r"no scan there \(run.json is missing\)\. Run `sanitize scan` first"):
        clean(str(tmp_path), ThresholdPolicy())


def test_clean_with_another_detector_in_place_is_refused(shards, scan_config, detector, tmp_path):
    shutil.copytree(detector, tmp_path / "mine")
    scan(scan_config(shards, detector=str(tmp_path / "mine"), scores_only=True))
    changed = json.loads((tmp_path / "mine" / "detector.json").read_text()) | {"seed": 99}
    (tmp_path / "mine" / "detector.json").write_text(json.dumps(changed))
    with pytest.raises(RefusedError, match="is not the detector that .* was scanned with"):
        clean(str(tmp_path / "scanned"), ThresholdPolicy(fpr=0.2))
