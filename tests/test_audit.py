"""`sanitize audit`: what was flagged and why, on the terminal and in summary.json; the page itself is in test_report.py."""

import json
from pathlib import Path

import pytest
from builders import KEEP_ALL, REMOVE_SOME, decision_table, write_lines, write_shards

from sanitize.commands.audit import audit, require_current, why
from sanitize.commands.clean import clean
from sanitize.commands.review import review
from sanitize.commands.scan import scan
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError


def summary(scanned: str) -> dict:
    return json.loads(Path(scanned, "audit", "summary.json").read_text())


def page(scanned: str) -> str:
    return Path(scanned, "audit", "report.html").read_text()


def data(scanned: str) -> dict:
    """What the page's script reads."""
    return json.loads(page(scanned).split('id="data">', 1)[1].split("</script>", 1)[0])


def shares(text: str) -> list[float]:
    """Of each statistic, as `why` tells them."""
    return [float(part.split()[1]) for part in text.split("shares in it: ")[1].split("\n")[0].split(", ")]


def test_every_removed_sample_is_in_the_report_with_what_was_decided(scanned):
    audit(scanned)
    rows = data(scanned)["rows"]
    removed = {row["key"]: row for row in decision_table(scanned).to_pylist() if not row["keep"]}
    shown = {key: number for number, key in enumerate(rows["key"]) if rows["removed"][number]}
    assert shown.keys() == removed.keys()
    for key, number in shown.items():
        assert rows["score"][number] == pytest.approx(removed[key]["score"], rel=1e-4)
        assert data(scanned)["reasons"][rows["reason"][number]] == removed[key]["reason"]
        assert rows["label"][number] == str(int(key[1:]) % 10)


def test_kept_samples_near_the_cut_are_shown_too(scanned):
    audit(scanned)
    rows = data(scanned)["rows"]
    kept = [number for number, removed in enumerate(rows["removed"]) if not removed]
    table = [row for row in decision_table(scanned).to_pylist() if row["keep"]]
    highest = sorted(table, key=lambda row: -row["score"])[: len(kept)]
    assert {rows["key"][number] for number in kept} == {row["key"] for row in highest}
    assert all(rows["near"][number] for number in kept)


def test_the_summary_counts_what_the_page_shows(scanned):
    result = audit(scanned)
    values = summary(scanned)
    assert (values["samples"], values["removed"], values["shown"]) == (54, 16, len(data(scanned)["rows"]["key"]))
    assert values["decisions"] == json.loads(Path(scanned, "summary.json").read_text())["markers_sha256"]
    grouped = sum(campaign["samples"] for campaign in values["campaigns"])
    assert grouped + values["singles"] == 16
    assert result.report.endswith("audit/report.html")


def test_the_same_scan_gives_the_same_page(scanned):
    audit(scanned)
    before = page(scanned)
    audit(scanned)
    assert page(scanned) == before


def test_without_images_nothing_is_read_but_scores(scanned, shards):
    for shard in shards.iterdir():
        shard.unlink()
    audit(scanned, top=0)
    assert (summary(scanned)["shown"], data(scanned)["rows"]["key"]) == (0, [])


def test_fewer_than_no_samples_are_refused(scanned):
    with pytest.raises(ConfigError, match="top: -1 samples; give 0"):
        audit(scanned, top=-1)


def test_fewer_than_were_removed_are_the_highest_scores_and_the_page_says_so(scanned):
    audit(scanned, top=3)
    rows = data(scanned)["rows"]
    removed = sorted((row["score"] for row in decision_table(scanned).to_pylist() if not row["keep"]), reverse=True)
    found = [score for score, gone in zip(rows["score"], rows["removed"], strict=True) if gone]
    assert found == pytest.approx(removed[:3], rel=1e-4)
    assert "13 removed samples with lower scores are not in this page; --top shows more." in page(scanned)


def test_a_scan_without_decisions_shows_its_highest_scores(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    scanned = str(tmp_path / "scanned")
    audit(scanned)
    assert set(data(scanned)["rows"]["removed"]) == {None}
    assert summary(scanned)["shown"] == 32


def test_nothing_removed_is_a_report_too(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=KEEP_ALL))
    scanned = str(tmp_path / "scanned")
    audit(scanned)
    assert summary(scanned)["campaigns"] == []
    assert sum(data(scanned)["rows"]["near"]) == 24


# ---------------------------------------------------------------- inputs that are gone


def test_a_shard_that_is_gone_leaves_its_samples_without_a_picture(scanned, shards, caplog):
    (shards / "part-0002.tar").unlink()
    audit(scanned)
    assert "part-0002.tar: is gone, so its samples cannot be shown. Restore it" in caplog.text
    assert "samples have no picture (first: " in page(scanned)
    rows = data(scanned)["rows"]
    assert any("is gone" in missing for missing in rows["missing"])
    assert len(rows["key"]) == summary(scanned)["shown"]


def test_a_shard_that_is_another_one_is_not_shown(scanned, shards, caplog):
    write_shards(shards, [20, 1, 34], first_seed=900)
    audit(scanned)
    assert "part-0002.tar: is not the shard that was scanned, so its samples are not shown." in caplog.text


def test_without_its_detector_a_scan_has_a_report_without_images(shards, scan_config, detector, tmp_path, caplog):
    moved = tmp_path / "detector"
    moved.symlink_to(detector)
    scan(scan_config(shards, detector=str(moved), policy=REMOVE_SOME))
    moved.unlink()
    audit(str(tmp_path / "scanned"))
    assert "no detector there" in caplog.text
    assert "Without images and campaigns: " in page(str(tmp_path / "scanned"))


# ---------------------------------------------------------------- is the report of these decisions


def test_a_report_of_other_decisions_is_refused(scanned):
    audit(scanned, top=0)
    assert require_current(scanned).endswith("report.html")
    clean(scanned, ThresholdPolicy("fraction", fraction=0.1))
    with pytest.raises(
        RefusedError, match=r"report\.html: shows other decisions than .* holds now. Run `sanitize audit"
    ):
        require_current(scanned)
    audit(scanned, top=0)
    require_current(scanned)


def test_a_report_that_is_missing_is_named(scanned):
    with pytest.raises(ConfigError, match="no report there. Run `sanitize audit"):
        require_current(scanned)


# ---------------------------------------------------------------- why


def test_why_one_sample_says_what_was_decided_and_every_number(scanned):
    removed = next(row for row in decision_table(scanned).to_pylist() if not row["keep"])
    text = why(scanned, removed["key"])
    assert f"{removed['shard']} {removed['key']}: removed" in text
    assert f"why: {removed['reason']}" in text
    assert f"score that decides: {removed['score']:.4g}, the cut is {removed['threshold']:.4g}" in text
    assert "neighbour_distance" in text
    assert "to the 16th nearest of the clean embeddings" in text


def test_why_one_kept_sample_says_how_far_below_the_cut_it_is_and_what_its_score_comes_from(scanned):
    kept = next(row for row in decision_table(scanned).to_pylist() if row["keep"])
    text = why(scanned, kept["key"])
    assert f"{kept['shard']} {kept['key']}: kept" in text
    assert f"kept: below the cut by {kept['threshold'] - kept['score']:.4g}" in text
    assert "most of its score: embedding " in text
    assert sum(shares(text)) == pytest.approx(1, abs=0.01)


def test_why_says_the_shares_that_were_decided_by(scanned):
    removed = next(row for row in decision_table(scanned).to_pylist() if not row["keep"])
    recorded = [value for value in removed["contributions"].values() if value is not None]
    assert shares(why(scanned, removed["key"])) == pytest.approx(sorted(recorded, reverse=True), rel=1e-2)


def test_a_kept_sample_that_a_person_decided_on_has_its_reason_and_its_shares(scanned, tmp_path):
    removed = next(row["key"] for row in decision_table(scanned).to_pylist() if not row["keep"])
    review(scanned, release=write_lines(tmp_path / "keys.txt", [removed]), by="Ada", note="fine")
    text = why(scanned, removed)
    assert "why: released by Ada: fine" in text
    assert "below the cut" not in text
    assert sum(shares(text)) == pytest.approx(1, abs=0.01)


def test_without_its_detector_why_says_what_is_not_known(shards, scan_config, detector, tmp_path, caplog):
    moved = tmp_path / "detector"
    moved.symlink_to(detector)
    scan(scan_config(shards, detector=str(moved), policy=REMOVE_SOME))
    moved.unlink()
    kept = next(row for row in decision_table(tmp_path / "scanned").to_pylist() if row["keep"])
    text = why(tmp_path / "scanned", kept["key"])
    assert "below the cut by" in text
    assert "shares in it" not in text
    assert "the shares of each statistic are not known: " in caplog.text
    assert "Run `sanitize clean " in caplog.text


def test_why_of_a_key_that_is_not_there_says_so(scanned):
    with pytest.raises(ConfigError, match="no sample has the key 'nobody'. Keys are those of the score tables"):
        why(scanned, "nobody")


def test_the_commands_say_why_and_whether_the_report_is_current(sanitize, scanned):
    code, output = sanitize("audit", scanned, "--key", "s000003")
    assert (code, "s000003: " in output) == (0, True)
    code, output = sanitize("audit", scanned, "--check")
    assert (code, "no report there" in output) == (2, True)
    sanitize("audit", scanned, "--top", "0")
    code, output = sanitize("audit", scanned, "--check")
    assert (code, "shows the decisions that count now" in output) == (0, True)
