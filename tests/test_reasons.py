"""Why a sample is removed: shares of the evidence that add up, and words that say the largest ones."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import REMOVE_SOME, decision_table, tree_bytes

from sanitize import storage
from sanitize.artifacts.scan_folder import ScanFolder
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.stages import score_table
from sanitize.stages.agreement import Departures, agreement, agreement_test
from sanitize.stages.clean_reference import CleanReference, fit_clean_reference
from sanitize.stages.evidence import PREDICTION, REACTION, WHEREABOUTS, combination
from sanitize.stages.perturbations import FLOOR
from sanitize.stages.reasons import (
    CONTRIBUTIONS,
    STATISTICS,
    EvidenceReasons,
    OneStatistic,
    ReactionReasons,
    Reasons,
    main_parts,
    shares,
    split_distance,
)

CALIBRATION = np.sort(np.random.default_rng(3).chisquare(6, 999).astype(np.float32)) ** np.float32(0.5)
UNIT = CleanReference(torch.zeros(6), torch.eye(6), torch.zeros(0, 1))


def correlated() -> CleanReference:
    mix = np.random.default_rng(0).normal(size=(6, 6))
    rows = (np.random.default_rng(1).normal(size=(2000, 6)) @ mix + 3).astype(np.float32)
    return fit_clean_reference(rows, torch.zeros(1, 1), seed=0)


def rows(statistics, energy=None) -> pa.Table:
    """Score rows with these statistics (M, 6)."""
    wide = np.asarray(statistics, np.float64)
    columns = {name: wide[:, place] for place, name in enumerate(STATISTICS)}
    for name in STATISTICS[-2:]:
        columns[name] = np.exp(columns[name]) - FLOOR
    columns["prediction_energy"] = np.full(len(wide), np.nan) if energy is None else np.asarray(energy)
    return pa.table({name: pa.array(values.astype(np.float32)) for name, values in columns.items()})


# ---------------------------------------------------------------- shares


def test_the_parts_of_a_distance_add_up_to_its_square():
    reference, statistics = correlated(), np.random.default_rng(2).normal(size=(40, 6)).astype(np.float32) * 4
    parts, offsets = split_distance(reference, statistics)
    expected = reference.distance(torch.from_numpy(statistics)).double().numpy() ** 2
    assert parts.sum(axis=1) == pytest.approx(expected, rel=1e-4)
    precision = reference.precision.numpy()
    for sample in (0, 17):
        for j in range(6):
            pull = sum(precision[j, i] * offsets[sample, i] for i in range(6))
            assert parts[sample, j] == pytest.approx(offsets[sample, j] * pull, rel=1e-4)


def test_an_image_that_was_not_perturbed_is_explained_by_where_it_lies_alone():
    reference, statistics = correlated(), np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    statistics[:, :4] = np.nan
    parts, _ = split_distance(reference, statistics)
    assert np.isnan(parts[:, :4]).all()
    expected = reference.prescreen_score(torch.from_numpy(statistics)).double().numpy() ** 2
    assert parts[:, 4:].sum(axis=1) == pytest.approx(expected, rel=1e-3)


def test_shares_of_nothing_are_none():
    assert np.isnan(shares(np.zeros((2, 3)))).all()


def test_main_parts_are_the_largest_that_make_most_of_what_speaks_against_a_sample():
    parts = np.array([[6.0, 3, 1, -2], [1, 1, 1, 1], [0, -1, np.nan, 0]])
    assert main_parts(parts).tolist() == [[True, True, False, False], [True, True, True, False], [False] * 4]


# ---------------------------------------------------------------- words

SAID = {
    (-5, -5, 0, 0, 0, 0): "embedding stays put under noise and blur",
    (-5, -5, -5, -5, 0, 0): "embedding stays put under noise, blur and coarsening",  # these three are three quarters
    (5, 0, 0, 0, 0, 0): "embedding moves more than clean ones do under noise",
    (
        -5,
        5,
        0,
        0,
        0,
        5,
    ): "embedding stays put under noise, moves more than clean ones do under blur and lies far from clean ones",
    (0, 0, 0, 0, -5, 0): "embedding is shorter than clean ones",
    (0, 0, 0, 0, 5, -5): "embedding is longer than clean ones and lies closer to clean ones than they do to each other",
    (0, 0, 0, -5, 0, 1): "embedding stays put under turning",
    (0, 0, 0, 0, 0, 0): "score above threshold",
}


@pytest.mark.parametrize("statistics", SAID)
def test_words_name_what_is_most_of_the_distance_and_its_direction(statistics):
    told = ReactionReasons(CALIBRATION, UNIT).explain(rows([statistics]), np.array([9.0], np.float32))
    assert told.words == [f"{SAID[statistics]} (p 0.001)"]
    assert told.p_values["score"] == pytest.approx([1 / 1000])


def test_an_image_that_was_not_perturbed_is_told_by_where_it_lies():
    statistics = [[np.nan] * 4 + [0.1, 4.0]]
    told = ReactionReasons(CALIBRATION, UNIT).explain(rows(statistics), np.array([9.0], np.float32))
    assert told.words == ["embedding lies far from clean ones (p 0.001)"]
    assert np.isnan(told.contributions["reaction_blur"]).all()


def test_the_reconstruction_error_is_all_there_is_of_paper_and_lowres():
    told = OneStatistic(CALIBRATION).explain(rows([[0] * 6]), np.array([9.0], np.float32))
    assert told.words == ["image decodes to something else (p 0.001)"]
    assert told.contributions["reconstruction"].tolist() == [1]


def test_nothing_known_is_nothing_said():
    told = Reasons(CALIBRATION[:0]).explain(rows([[0] * 6]), np.array([9.0], np.float32))
    assert (told.words, dict(told.contributions), dict(told.p_values)) == (["score above threshold"], {}, {})


# ---------------------------------------------------------------- several kinds of evidence


def normal(count, seed):
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def evidence_reasons(test=None) -> EvidenceReasons:
    kinds = {PREDICTION: normal(999, 5), WHEREABOUTS: np.abs(normal(999, 6)), REACTION: CALIBRATION}
    return EvidenceReasons(CALIBRATION, UNIT, combination(kinds, explained=0.5), test)


def test_each_kind_has_the_share_of_its_weight_over_its_p_value():
    reasons = evidence_reasons()
    statistics, energy = [[-6, -6, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [np.nan] * 4 + [0, 5]], [0.0, 9.0, 0.0]
    told = reasons.explain(rows(statistics, energy), np.array([3, 3, 3], np.float32))
    for sample in range(3):
        terms = {
            kind: weight / told.p_values[kind][sample]
            for kind, weight in reasons.evidence.weights.items()
            if not np.isnan(told.p_values[kind][sample])
        }
        for kind, term in terms.items():
            assert told.contributions[kind][sample] == pytest.approx(term / sum(terms.values()), abs=1e-3)
    assert np.isnan(told.contributions[REACTION][2])
    assert [words.rpartition(" (p ")[0] for words in told.words] == [
        "embedding stays put under noise and blur",
        "embedding is not the one that this image ought to have",
        "embedding lies far from clean ones",
    ]
    assert all(float(words.rpartition("(p ")[2].rstrip(")")) < 1e-3 for words in told.words)


def departures(count, seed) -> Departures:
    residuals = np.random.default_rng(seed).normal(size=(count, 8)) * 8
    return Departures(
        residuals.astype(np.int8), np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)
    )


def test_agreement_is_a_kind_where_pass_2_asked_for_it():
    campaign = Departures(np.full((20, 8), 60, np.int8), departures(20, 9).hashes)
    test = agreement_test(departures(300, 1).joined(campaign), departures(200, 2), 0.5)
    table = rows([[0] * 6] * 20, [0.0] * 20)
    for name, column in campaign.as_bytes().items():
        table = table.append_column(name, pa.array(column, pa.binary()))
    told = evidence_reasons(test).explain(table, np.full(20, 3, np.float32))
    assert told.p_values["agreement"] == pytest.approx(test.tail.p_values(agreement(campaign, test.pool)))
    assert (told.contributions["agreement"] > 0.9).all()
    assert told.words[0].startswith("embedding departs from its prediction as those of other samples do (p ")


# ---------------------------------------------------------------- decision tables


def test_decisions_say_why_of_what_is_removed_and_nothing_of_the_rest(scanned):
    for row in decision_table(scanned).to_pylist():
        if row["keep"]:
            assert (row["reason"], row["contributions"], row["p_values"]) == ("", None, None)
        else:
            assert row["reason"].startswith("embedding ") and "(p 0." in row["reason"]
            known = [value for value in row["contributions"].values() if value is not None]
            assert (len(known), sum(known)) == (6, pytest.approx(1, abs=0.01))
            assert 0 < row["p_values"]["score"] <= 1
    assert set(CONTRIBUTIONS) == {field.name for field in decision_table(scanned).schema.field("contributions").type}


def test_a_scan_whose_detector_is_gone_is_decided_and_says_that_reasons_are_not_known(
    shards, scan_config, tmp_path, caplog, detector
):
    shutil.copytree(detector, tmp_path / "own")
    scan(scan_config(shards, detector=str(tmp_path / "own"), scores_only=True))
    shutil.rmtree(tmp_path / "own")
    clean(str(tmp_path / "scanned"), REMOVE_SOME)
    assert "why samples are removed is not known, the column `reason` says only that they are: " in caplog.text
    told = [row for row in decision_table(tmp_path / "scanned").to_pylist() if not row["keep"]]
    assert {row["reason"] for row in told} == {"score above threshold"}
    assert {value for row in told for value in row["contributions"].values()} == {None}


def test_decisions_of_an_earlier_version_are_read_and_the_next_clean_adds_the_reasons(scanned, tmp_path):
    out, expected = tmp_path / "scanned", tree_bytes(tmp_path / "scanned")
    for path in (out / "decisions").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.select(table.column_names[:7]), path)
        done = out / "done" / f"{path.stem}.json"
        marker = json.loads(done.read_text())
        entry = marker["files"][f"decisions/{path.name}"]
        entry["sha256"], entry["bytes"] = storage.file_sha256(str(path)), path.stat().st_size
        marker["clean"]["rule"] = "of another version"
        done.write_text(json.dumps(marker))
    folder = ScanFolder(str(out))
    summary = json.loads((out / "summary.json").read_text())
    del summary["decision_format"], summary["markers_sha256"]
    (out / "summary.json").write_text(json.dumps(summary | {"rule": "of another version"}))
    (out / "markers.jsonl").unlink()
    rows = folder.decision_rows(folder.read_marker("part-0000")).to_pylist()
    assert {row["contributions"] for row in rows} == {None}
    before = {path: path.stat().st_mtime_ns for path in (out / "clean").iterdir()}
    clean(scanned, REMOVE_SOME)
    assert tree_bytes(out) == expected
    assert {path: path.stat().st_mtime_ns for path in (out / "clean").iterdir()} == before  # nothing was copied again
    assert verify(scanned).problems == ()


def test_score_tables_without_the_statistics_are_decided_without_reasons(scanned, tmp_path):
    folder = ScanFolder(scanned)
    path = folder.scores("part-0000")
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["reaction_blur"]), path)
    clean(scanned, dataclasses.replace(REMOVE_SOME, fraction=0.1))
    told = folder.decision_rows(folder.read_marker("part-0000")).to_pylist()
    assert {row["reason"] for row in told if not row["keep"]} == {"score above threshold"}
    assert score_table.read(path, ["key"]).num_rows == 20
