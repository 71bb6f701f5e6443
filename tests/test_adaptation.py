"""Pass 2 moves the clean signature to the bulk of the scan, when that bulk can be trusted."""

import dataclasses
import itertools
import logging
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import (
    decision_table,
    encoded,
    image_members,
    random_image,
    tree_bytes,
    write_noisy,
    write_shards,
    write_tar,
)

from sanitize.commands.audit import audit
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.config import ScanConfig, ThresholdPolicy
from sanitize.errors import RefusedError
from sanitize.stages import score_table
from sanitize.stages.adaptation import MIN_SAMPLES, distinct_statistics
from sanitize.stages.clean_reference import adapted, fit_clean_reference

SHIFT = np.array([1.5, -1, 0.5, 0, 2, 1], np.float32)
POISON = np.array([-6, -5, -6, -4, 8, 5], np.float32)


def gaussian(count, seed, centre=0.0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=(count, 6)) * scale + centre).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.45])
def test_the_signature_follows_the_bulk_of_the_scan_and_not_its_poison(share):
    clean_images, poisoned = gaussian(2000, 1, SHIFT, 1.5), gaussian(round(2000 * share / (1 - share)), 2, POISON)
    known = fit_clean_reference(gaussian(1500, 0), torch.zeros(1, 1), seed=0)
    found = adapted(known, np.concatenate([clean_images, poisoned]))
    assert found.centre.numpy() == pytest.approx(SHIFT, abs=0.25)
    null = known.distance(torch.from_numpy(gaussian(20_000, 3))).quantile(0.99)
    assert float((known.distance(torch.from_numpy(clean_images)) > null).float().mean()) > 0.2
    assert float((found.distance(torch.from_numpy(clean_images)) > null).float().mean()) < 0.03
    if share:
        assert float((found.distance(torch.from_numpy(poisoned)) > null).float().mean()) > 0.95


def test_without_a_shift_the_signature_stays():
    known = fit_clean_reference(gaussian(4000, 0), torch.zeros(1, 1), seed=0)
    found = adapted(known, gaussian(4000, 1))
    assert found.centre.numpy() == pytest.approx(known.centre.numpy(), abs=0.1)
    assert found.precision.numpy() == pytest.approx(known.precision.numpy(), abs=0.15)
    assert torch.equal(adapted(known, gaussian(4000, 1)).precision, found.precision)


# ---------------------------------------------------------------- a scan of other images than the auxiliary ones


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    return write_noisy(tmp_path_factory.mktemp("shifted"), 3)


@pytest.fixture(scope="module")
def scored(shifted, detector, tmp_path_factory):
    """Pass 1 of `shifted`, once."""
    out = tmp_path_factory.mktemp("scored") / "scanned"
    scan(ScanConfig((str(shifted),), detector, str(out), batch_size=64, precision="fp32", workers=0, scores_only=True))
    return out


@pytest.fixture
def scanned(shifted, scored, scan_config, tmp_path):
    def make(shards=shifted, out="scanned", **changes):
        if shards is shifted and "effort" not in changes:
            shutil.copytree(scored, tmp_path / out, dirs_exist_ok=True)
        return scan(scan_config(shards, out, batch_size=64, **changes))

    return make


def decided(out):
    return decision_table(out).column("score").to_numpy()


def as_scored(out):
    return np.concatenate([score_table.numbers(pq.read_table(p), "score") for p in sorted((out / "scores").glob("*"))])


def test_fewer_of_other_clean_images_are_lost_when_pass_2_adapts(scanned, tmp_path):
    policy = ThresholdPolicy(fpr=0.02)
    cleaned = scanned(policy=policy).cleaned
    out = tmp_path / "scanned"
    plain = clean(str(out), dataclasses.replace(policy, adapt=False), force=True)
    assert plain.threshold == cleaned.threshold
    assert (decided(out) == as_scored(out)).all()
    assert cleaned.removed < plain.removed / 2
    again = clean(str(out), policy, force=True)
    assert again == cleaned
    assert (decided(out) != as_scored(out)).any()


def test_an_adapted_scan_is_the_same_after_a_kill_between_its_passes(scanned, tmp_path):
    scanned(policy=ThresholdPolicy(fpr=0.02))
    scanned(out="late", scores_only=True)
    scanned(out="late", policy=ThresholdPolicy(fpr=0.02))
    assert tree_bytes(tmp_path / "late") == tree_bytes(tmp_path / "scanned")


def test_the_audit_judges_by_the_scores_that_decided(scanned, tmp_path):
    cleaned = scanned(policy=ThresholdPolicy(fpr=0.02)).cleaned
    out = tmp_path / "scanned"
    text = audit(str(out), top=0).text
    assert f"highest {decided(out).max():.4g}" in text
    assert f"{cleaned.removed} removed" in text
    (out / "decisions" / "part-0001.parquet").write_bytes(b"")
    with pytest.raises(RefusedError, match=r"part-0001\.parquet: is not of this scan \(its SHA-256 is not the one"):
        audit(str(out), top=0)


@pytest.mark.parametrize("changes", [{"effort": "fast"}, {"policy": ThresholdPolicy("fraction", fraction=0.1)}])
def test_scores_stay_as_they_are_where_adapting_means_nothing(scanned, tmp_path, changes):
    scanned(**({"policy": ThresholdPolicy(fpr=0.02)} | changes))
    assert (decided(tmp_path / "scanned") == as_scored(tmp_path / "scanned")).all()


def test_a_small_scan_is_not_adapted_to(scanned, tmp_path, caplog):
    small = write_shards(tmp_path / "small", [MIN_SAMPLES - 1])
    with caplog.at_level(logging.INFO, "sanitize"):
        scanned(small, policy=ThresholdPolicy(fpr=0.02))
    assert (
        f"not adapted to the scan: {MIN_SAMPLES - 1} different scored images, {MIN_SAMPLES} are needed" in caplog.text
    )
    assert (decided(tmp_path / "scanned") == as_scored(tmp_path / "scanned")).all()


def test_a_scan_of_which_much_stands_out_is_not_adapted_to(scanned, tmp_path, caplog):
    scanned(write_noisy(tmp_path / "strange", 12), policy=ThresholdPolicy(fpr=0.02))
    assert "of it stands out. Its bulk may not be clean. Look at `sanitize audit`" in caplog.text
    assert (decided(tmp_path / "scanned") == as_scored(tmp_path / "scanned")).all()


def statistics_of(folder):
    paths = sorted(map(str, (folder / "scores").glob("*")))
    tables = score_table.read_each(paths, score_table.STATISTICS_COLUMNS)
    return np.concatenate([score_table.statistics(table) for table in tables])


def samples_of(folder):
    """In each score file."""
    return {str(path): pq.read_metadata(path).num_rows for path in sorted((folder / "scores").glob("*"))}


def test_the_bulk_is_estimated_from_different_images_of_all_shards(scanned, shifted, tmp_path):
    shutil.copytree(shifted, tmp_path / "in")
    shutil.copy(tmp_path / "in" / "part-0000.tar", tmp_path / "in" / "zcopy.tar")
    scanned(tmp_path / "in", scores_only=True)
    assert (
        distinct_statistics(samples_of(tmp_path / "scanned"), b"k") == statistics_of(tmp_path / "scanned")[:600]
    ).all()


def test_of_no_score_files_there_is_no_bulk():
    assert distinct_statistics({}, b"k").shape == (0, len(score_table.STATISTICS_COLUMNS))


def test_a_large_scan_is_drawn_from_by_a_key_that_an_attacker_does_not_know(scanned, tmp_path):
    scanned(scores_only=True)
    samples = samples_of(tmp_path / "scanned")
    drawn = [distinct_statistics(samples, key, limit=200) for key in (b"one", b"one", b"two")]
    assert all(len(rows) == pytest.approx(200, abs=60) for rows in drawn)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_copies_of_one_image_are_not_taken_for_the_bulk(scanned, shifted, tmp_path, caplog):
    """320 copies of an ordinary image among 300 others; the covariance of the copies alone cannot be inverted."""
    others = image_members({f"o{i:04d}": i for i in range(300)})
    copies = image_members({f"c{i:04d}": 7 for i in range(320)})
    write_tar(tmp_path / "in" / "s.tar", others + copies)
    scanned(tmp_path / "in", policy=ThresholdPolicy(fpr=0.02))
    assert "not adapted to the scan: 300 different scored images, 500 are needed" in caplog.text


def test_a_bulk_of_one_image_still_gives_a_reference_that_can_be_inverted():
    known = fit_clean_reference(gaussian(1500, 0), torch.zeros(1, 1), seed=0)
    same = np.concatenate([np.repeat(gaussian(1, 4), 700, axis=0), gaussian(100, 5)])
    moved = adapted(known, same)
    assert torch.isfinite(moved.precision).all()
    assert float(torch.linalg.eigvalsh(moved.precision).max()) < 25 * float(
        torch.linalg.eigvalsh(known.precision).max()
    )


def test_adapting_that_would_flag_far_more_is_refused(scanned, tmp_path, caplog):
    """Half of the scan are near-duplicates of one image: its bulk is narrower than clean images are."""
    members = image_members({f"o{i:04d}": i for i in range(500)})
    base = random_image(7).astype(int)
    for number in range(600):
        pixels = base + np.random.default_rng(number).integers(-1, 2, base.shape)
        members.append((f"d{number:04d}.png", encoded(pixels.clip(0, 255).astype(np.uint8))))
    write_tar(tmp_path / "in" / "s.tar", members)
    scanned(tmp_path / "in", policy=ThresholdPolicy(fpr=0.02))
    assert "Its bulk is more alike than clean images are; look for near-duplicates" in caplog.text
    assert (decided(tmp_path / "scanned") == as_scored(tmp_path / "scanned")).all()


@pytest.mark.parametrize("rates", [(0.02, 0.05, 0.1, 0.18, 0.2, 0.3)])
def test_a_laxer_threshold_never_brings_a_sample_back(scanned, tmp_path, rates):
    scanned(policy=ThresholdPolicy(fpr=rates[0]))
    kept = []
    for rate in rates:
        clean(str(tmp_path / "scanned"), ThresholdPolicy(fpr=rate), force=True)
        kept.append(decision_table(tmp_path / "scanned").column("keep").to_numpy(zero_copy_only=False))
    assert all((stricter >= laxer).all() for stricter, laxer in itertools.pairwise(kept))
