import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import fit_config, tree_bytes, write_encoder, write_shards, write_tar

from sanitize import storage
from sanitize.artifacts import detector_folder
from sanitize.commands.fit import fit
from sanitize.config import ThresholdPolicy, TrainingConfig
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError, ConfigError, RefusedError, SanitizeError
from sanitize.stages.decoder import visible_count
from sanitize.stages.encoders import load_encoder
from sanitize.stages.thresholds import threshold_for
from sanitize.training.decoder import Auxiliary, _train
from sanitize.training.distributed import Rank
from sanitize.training.split import held_out


def test_a_detector_folder_holds_what_a_scan_needs_and_nothing_else(detector):
    assert sorted(p.name for p in detector.iterdir() if p.name != ".lock") == [
        "calibration.parquet",
        "decoder.safetensors",
        "detector.json",
        "fit.json",
        "reconstructions.png",
    ]
    loaded = detector_folder.load_detector(str(detector))
    assert loaded.summary.training_images + loaded.summary.calibration_images == 240
    assert len(loaded.calibration("thorough")) == loaded.summary.calibration_images
    assert len(loaded.summary.loss_by_epoch) == 2


def test_calibration_scores_are_what_a_scan_gives_the_same_images(detector, aux_shards, scan_config, tmp_path):
    """One path for fit and scan; cached pixels are float16, which allows a relative difference of 1e-3."""
    from sanitize.commands.scan import scan

    scan(scan_config(aux_shards, scores_only=True))
    tables = [pq.read_table(path) for path in (tmp_path / "scanned" / "scores").glob("*.parquet")]
    scanned = np.sort(np.concatenate([t.column("score").to_numpy() for t in tables]))
    calibration = detector_folder.load_detector(str(detector)).calibration("thorough")
    nearest = np.abs(scanned[None] - calibration[:, None]).min(axis=1)
    assert (nearest / calibration).max() < 1e-3


def test_the_same_settings_give_the_same_detector(aux_shards, encoder_spec, tmp_path):
    for name in ("a", "b"):
        fit(fit_config(aux_shards, encoder_spec, tmp_path / name))
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_running_a_finished_fit_again_changes_nothing(detector, aux_shards, encoder_spec):
    before = {path: path.stat().st_mtime_ns for path in detector.iterdir()}
    fit(fit_config(aux_shards, encoder_spec, detector))
    assert {path: path.stat().st_mtime_ns for path in detector.iterdir()} == before


def test_a_fit_that_is_killed_resumes_to_the_same_detector(aux_shards, encoder_spec, tmp_path, monkeypatch):
    """Killed after the first epoch's checkpoint; embeddings and the first epoch are not computed again."""
    fit(fit_config(aux_shards, encoder_spec, tmp_path / "whole"))
    real = storage.write_bytes

    def dies(path, data):
        real(path, data)
        if path.endswith("last.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(fit_config(aux_shards, encoder_spec, tmp_path / "killed"))
    monkeypatch.setattr(storage, "write_bytes", real)
    assert (tmp_path / "killed" / "training" / "last.pt").exists()
    fit(fit_config(aux_shards, encoder_spec, tmp_path / "killed"))
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


def test_copies_of_an_image_stay_on_one_side_of_the_split():
    hashes = torch.randint(0, 256, (500, 32), dtype=torch.uint8)
    doubled = torch.cat([hashes, hashes])
    held = held_out(doubled, 0.3, seed=4)
    assert torch.equal(held[:500], held[500:])
    assert held.float().mean().item() == pytest.approx(0.3, abs=0.08)
    assert not torch.equal(held, held_out(doubled, 0.3, seed=5))


def test_limit_uses_the_first_images_only(aux_shards, encoder_spec, tmp_path):
    summary = fit(fit_config(aux_shards, encoder_spec, tmp_path / "d", limit=100)).summary
    assert summary.training_images + summary.calibration_images == 100


def test_training_lowers_the_loss_and_covers_the_test_condition(aux_shards, encoder_spec, tmp_path):
    training = TrainingConfig(epochs=12, batch_size=32, learning_rate=1e-2, precision="fp32", calibration_fraction=0.2)
    config = fit_config(aux_shards, encoder_spec, tmp_path / "d", training=training)
    losses = fit(config).summary.loss_by_epoch
    assert losses[-1] < 0.9 * losses[0]
    assert visible_count(4, training.mask_ratio_max) == 0


def test_two_ranks_see_the_same_batches_as_one(encoder_spec, aux_shards, tmp_path, monkeypatch):
    """The global batch is split evenly: mean of both ranks' first gradients = gradient of one process."""
    from sanitize.training.decoder import _epoch, _restore

    generator = torch.Generator().manual_seed(0)
    auxiliary = Auxiliary(
        torch.randn(64, 32, generator=generator),
        torch.rand(64, 3, 8, 8, generator=generator).half(),
        torch.zeros(64, 32, dtype=torch.uint8),
    )
    config = fit_config(
        aux_shards, encoder_spec, tmp_path, training=TrainingConfig(epochs=1, batch_size=64, precision="fp32")
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    gradients = []
    for number, world in ((0, 1), (0, 2), (1, 2)):
        state = _restore(config, auxiliary, torch.device("cpu"), str(tmp_path / "none"))
        monkeypatch.setattr(state.optimizer, "step", lambda: None)
        rank = Rank(number, 1, torch.device("cpu")) if world == 1 else _Half(number)
        _epoch(config, auxiliary, rank, state.decoder, state, 0)
        gradients.append({n: p.grad for n, p in state.decoder.named_parameters() if p.grad is not None})
    torch.distributed.destroy_process_group()
    for name, whole in gradients[0].items():
        torch.testing.assert_close((gradients[1][name] + gradients[2][name]) / 2, whole, rtol=1e-3, atol=1e-6)


class _Half(Rank):
    """One rank of two; the group it reports its loss to has only this process."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_train_gives_the_losses_of_one_process(aux_shards, encoder_spec, tmp_path, ray_cluster, workers):
    here = fit(fit_config(aux_shards, encoder_spec, tmp_path / "here"))
    config = fit_config(aux_shards, encoder_spec, tmp_path / "ray", workers=workers, cpus_per_worker=1)
    there = fit(config)
    assert there.summary.loss_by_epoch == pytest.approx(here.summary.loss_by_epoch, rel=1e-3)
    assert there.scores == pytest.approx(here.scores, rel=5e-2)


# ---------------------------------------------------------------- wrong use


def test_the_folder_of_another_fit_is_refused(detector, aux_shards, encoder_spec):
    with pytest.raises(RefusedError, match="holds a fit that differs in seed. Give another --out"):
        fit(fit_config(aux_shards, encoder_spec, detector, seed=99))


def test_too_few_images_say_how_many_are_needed(tmp_path, encoder_spec):
    write_shards(tmp_path / "aux", [9])
    with pytest.raises(
        ConfigError, match=r"9 auxiliary images leave .* at least 32 and 1 are needed, thousands are better"
    ):
        fit(fit_config(tmp_path / "aux", encoder_spec, tmp_path / "d"))


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.2, "few for the default --fpr 0.01 of a scan: its cut will be taken from a tail fitted to their scores"),
        (0.1, "too few for the default --fpr 0.01 of a scan (50)"),
    ],
)
def test_too_few_to_calibrate_the_default_scan_say_so_before_training(tmp_path, encoder_spec, caplog, share, said):
    write_shards(tmp_path / "aux", [300])
    config = fit_config(tmp_path / "aux", encoder_spec, tmp_path / "d")
    fit(dataclasses.replace(config, training=dataclasses.replace(config.training, calibration_fraction=share)))
    (message,) = [record.message for record in caplog.records if "held out to calibrate" in record.message]
    held_out = int(message.split()[0])
    assert f"{held_out} of 300 auxiliary images are held out to calibrate on, {said}" in message
    assert f"Give about {2745 if share == 0.2 else 5490} images, so that the cut is counted" in message
    advised = message.partition("scan with --fpr ")[2].split() or ["0.01"]
    threshold_for(np.empty(0, np.float32), np.zeros(held_out, np.float32), ThresholdPolicy(fpr=float(advised[0])))


def test_auxiliary_shards_without_a_usable_image_say_so(tmp_path, encoder_spec):
    write_tar(tmp_path / "aux" / "s.tar", [("a.png", b"broken"), ("b.txt", b"")])
    with pytest.raises(ConfigError, match="no usable image in .*aux"):
        fit(fit_config(tmp_path / "aux", encoder_spec, tmp_path / "d"))


def test_a_broken_auxiliary_shard_is_left_out_with_a_warning(tmp_path, encoder_spec, caplog):
    write_shards(tmp_path / "aux", [90])
    (tmp_path / "aux" / "bad.tar").write_bytes(b"<html>")
    fit(fit_config(tmp_path / "aux", encoder_spec, tmp_path / "d"))
    assert "auxiliary shard left out: " in caplog.text
    assert "bad.tar: not a tar archive" in caplog.text


def test_divergence_is_an_error_not_a_detector(aux_shards, encoder_spec, tmp_path):
    training = TrainingConfig(epochs=3, batch_size=32, precision="fp32", learning_rate=1e30, schedule="constant")
    with pytest.raises(SanitizeError, match=r"training diverged .* Lower training.learning_rate"):
        fit(fit_config(aux_shards, encoder_spec, tmp_path / "d", training=training))
    assert not (tmp_path / "d" / "detector.json").exists()


def test_a_detector_of_another_version_is_refused(detector, tmp_path):
    values = json.loads((detector / "detector.json").read_text()) | {"format_version": 0}
    (tmp_path / "detector.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"written by another version of sanitize \(format 0"):
        detector_folder.load_detector(str(tmp_path))


@pytest.mark.parametrize("key", ["format_version", "decode_path"])
def test_what_another_version_began_is_not_gone_on_with(detector, aux_shards, encoder_spec, tmp_path, key):
    """A detector that a scan refuses would else be called finished; a half-made one would mix pixels of both."""
    shutil.copytree(detector, tmp_path / "d")
    record = tmp_path / "d" / "fit.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {key: "old"}))
    with pytest.raises(
        RefusedError, match=rf"holds a fit that differs in {key}\. Give another --out, or delete the folder"
    ):
        fit(fit_config(aux_shards, encoder_spec, tmp_path / "d"))


def test_the_encoder_is_found_from_another_working_folder(aux_shards, tmp_path, monkeypatch):
    write_encoder(tmp_path / "e")
    monkeypatch.chdir(tmp_path)
    fit(fit_config(aux_shards, load_encoder_spec("e/encoder.yaml"), tmp_path / "d"))
    monkeypatch.chdir("/")
    spec = detector_folder.load_detector(str(tmp_path / "d")).encoder
    assert load_encoder(spec).fingerprint() == load_encoder(dataclasses.replace(spec)).fingerprint()


def test_an_epoch_that_is_done_is_not_repeated(aux_shards, encoder_spec, tmp_path):
    auxiliary = Auxiliary(torch.randn(64, 32), torch.rand(64, 3, 8, 8).half(), torch.zeros(64, 32, dtype=torch.uint8))
    config = fit_config(aux_shards, encoder_spec, tmp_path)
    path, rank = str(tmp_path / "last.pt"), Rank(0, 1, torch.device("cpu"))
    done: list[int] = []
    first = _train(config, auxiliary, rank, path, lambda epoch, _: done.append(epoch))
    again = _train(config, auxiliary, rank, path, lambda epoch, _: done.append(epoch))
    assert done == [1, 2]
    assert again.losses == first.losses
