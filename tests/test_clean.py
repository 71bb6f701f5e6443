"""Pass 2: thresholds, decisions, splitting again, verify."""

from pathlib import Path

import pytest
from builders import decision_table, members, tree_bytes

from sanitize.artifacts import detector_folder
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import RefusedError
from sanitize.runtime import Resources

# ---------------------------------------------------------------- clean again


def test_another_threshold_rereads_scores_only(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.1)))
    out = tmp_path / "scanned"
    before = tree_bytes(out / "scores")
    kept = [clean(str(out), ThresholdPolicy("fraction", fraction=f)).kept for f in (0.0, 0.2, 0.4)]
    assert kept == [54, 54 - 11, 54 - 22]
    assert tree_bytes(out / "scores") == before
    assert verify(str(out)).problems == ()
    scan(scan_config(shards, out="fresh", policy=ThresholdPolicy("fraction", fraction=0.4)))
    assert tree_bytes(out) == tree_bytes(tmp_path / "fresh")


def test_workers_decide_in_a_folder_that_is_named_by_a_relative_path(
    shards, scan_config, tmp_path, ray_cluster, monkeypatch
):
    scan(scan_config(shards, scores_only=True))
    monkeypatch.chdir(tmp_path)
    policy = ThresholdPolicy("fraction", fraction=0.2)
    assert clean("scanned", policy, resources=Resources(workers=2, cpus=1, gpus=0)).kept == 54 - 11
    scan(scan_config(shards, out="here", policy=policy))
    assert tree_bytes(tmp_path / "scanned") == tree_bytes(tmp_path / "here")


def test_fdr_says_when_the_calibration_set_is_too_small_to_remove_anything(shards, scan_config, tmp_path, caplog):
    scan(scan_config(shards, scores_only=True))
    clean(str(tmp_path / "scanned"), ThresholdPolicy("fdr", fpr=0.001))
    count = len(detector_folder.load_detector(scan_config(shards).detector).scores)
    assert (
        f"fdr 0.001 removes nothing: with {count} calibration scores it acts only where 100.0 % of a scan "
        "stand out. To act on 1 %, fit with auxiliary images that leave 99999 to calibrate on, or use --policy calibrated"
    ) in caplog.text


def test_decisions_join_to_the_samples(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.2)))
    decisions = decision_table(tmp_path / "scanned").to_pylist()
    assert len(decisions) == 54
    clean_keys = {m[0].split(".")[0] for p in (tmp_path / "scanned" / "clean").glob("*.tar") for m in members(p)}
    assert {d["key"] for d in decisions if d["keep"]} == clean_keys
    assert all(d["reason"].startswith("embedding ") for d in decisions if not d["keep"])


def test_more_than_half_removed_is_refused_unless_forced(shards, scan_config, tmp_path):
    policy = ThresholdPolicy("fraction", fraction=0.6)
    with pytest.raises(
        RefusedError, match=r"32 of 54 samples would be removed .* more than half.*--force goes on anyway"
    ):
        scan(scan_config(shards, policy=policy, force=False))
    assert not (tmp_path / "scanned" / "clean").exists()
    assert scan(scan_config(shards, policy=policy, force=True)).cleaned.removed == 32


def test_a_shard_changed_after_its_scan_is_not_split(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    data = bytearray((shards / "part-0002.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (shards / "part-0002.tar").write_bytes(data)
    result = clean(str(tmp_path / "scanned"), ThresholdPolicy("fraction", fraction=0.1))
    assert [f.partition(": ")[2] for f in result.failed] == [
        "changed after it was scored. Scan it again into another --out."
    ]
    assert not (tmp_path / "scanned" / "clean" / "part-0002.tar").exists()


def test_without_its_detector_a_scan_can_be_split_by_other_policies(shards, scan_config, tmp_path):
    config = scan_config(shards, scores_only=True)
    scan(config)
    Path(config.detector).rename(tmp_path / "away")
    try:
        with pytest.raises(
            RefusedError, match=r"is gone, and fdr compares .* use --policy fraction, absolute or robust"
        ):
            clean(str(tmp_path / "scanned"), ThresholdPolicy("fdr"))
        assert clean(str(tmp_path / "scanned"), ThresholdPolicy("fraction", fraction=0.1)).removed == 5
    finally:
        (tmp_path / "away").rename(config.detector)


def test_verify_names_every_changed_byte(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.1)))
    out = tmp_path / "scanned"
    assert verify(str(out)).problems == ()
    path = out / "clean" / "part-0000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    (out / "scores" / "part-0002.parquet").unlink()
    (out / "clean" / "extra.tar").write_bytes(b"x")
    problems = verify(str(out)).problems
    assert [p.split(":")[0] for p in problems] == ["clean/part-0000.tar", "scores/part-0002.parquet", "clean/extra.tar"]


@pytest.mark.filterwarnings("ignore")
def test_clean_shards_stream_through_webdataset(shards, scan_config, tmp_path):
    import webdataset

    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.2)))
    urls = sorted(str(p) for p in (tmp_path / "scanned" / "clean").glob("*.tar"))
    streamed = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    decisions = decision_table(tmp_path / "scanned").to_pylist()
    assert streamed == [d["key"] for d in decisions if d["keep"]]
