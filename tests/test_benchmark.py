"""The detection benchmark: pools, rows, reuse; on a tiny victim."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import yaml
from builders import shape_members, tiny_victim, write_tar
from click.testing import CliRunner

from pipelines import benchmark, benchmark_page, benchmark_scores, calibration_study, uneven_scans
from pipelines.benchmark import PoolScores, pool
from pipelines.benchmark_config import BenchmarkConfig, DetectorConfig
from sanitize import storage
from sanitize.config import ThresholdPolicy
from sanitize.config_loading import from_mapping, load_encoder_spec, load_yaml, to_mapping
from sanitize.errors import ConfigError
from sanitize.stages.evidence_adaptation import values_of
from sanitize.stages.thresholds import threshold_for


@pytest.fixture
def study(tmp_path):
    """One victim made on coloured shapes, two detectors, one seed."""
    for name, count, seed in (("train", 96, 0), ("test", 60, 1), ("aux", 320, 2)):
        write_tar(tmp_path / name / "s.tar", shape_members(count, seed))
    folder = str(tmp_path)
    (tmp_path / "red_team_tiny.yaml").write_text(yaml.safe_dump(tiny_victim(tmp_path)))
    values = {
        "out": f"{folder}/out",
        "table": f"{folder}/table.csv",
        "zoo": f"{folder}/zoo",
        "preset": "cpu",
        "default": "reaction",
        "victims": {
            "tiny": {
                "config": f"{folder}/red_team_tiny.yaml",
                "test": f"{folder}/test",
                "auxiliary": {"id": f"{folder}/aux"},
            }
        },
        "detectors": {
            "reaction": {"scorer": "reaction", "adapt": True},
            "plain": {"scorer": "reaction"},
            "norm": {"detector": "norm"},
        },
        "rates": [0.01],
        "curves": ["norm"],
        "seeds": [0],
        "auxiliary_images": 320,
        "fit": {
            "decoder": {
                "image_size": 8,
                "patch_size": 4,
                "width": 16,
                "heads": 2,
                "encoder_depth": 1,
                "decoder_depth": 1,
            },
            "training": {"epochs": 1, "batch_size": 32, "precision": "fp32", "calibration_fraction": 0.5},
        },
    }
    return from_mapping(BenchmarkConfig, values, "test")


DETECTORS = ("reaction", "plain", "norm")


def test_every_detector_gets_a_row_for_every_auxiliary_set_and_rate_and_the_page_shows_them(study, tmp_path):
    rows = benchmark.run(study)
    found = {(r["aux"], r["poison_rate"], r["detector"]) for r in rows}
    assert found == {(a, p, d) for a in ("id", "poisoned") for p in (0.01, 0.5) for d in DETECTORS}
    assert {r["is_default"] for r in rows if r["detector"] == "reaction"} == {1}
    header = Path(study.table).read_text().splitlines()[0].split(",")
    assert all(list(row) == header for row in rows)
    assert all(
        0 <= row[name] <= 1 for row in rows for name in ("auroc", "auprc", "tpr_at_1pct", "control_auroc", "asr")
    )
    assert len(Path(study.table).read_text().splitlines()) == len(rows) + 1
    classes = benchmark.by_class(study)
    assert [(r["true_class"], r["is_target"]) for r in classes if r["aux"] == "id"] == [
        (c, int(c == 4)) for c in range(6)
    ]
    clean = benchmark.clean_scans(study)
    assert {(r["aux"], r["encoder"], r["policy"]) for r in clean if r["detector"] == "reaction"} == {
        (a, e, p) for a in ("id", "poisoned") for e in ("backdoored", "clean") for p in ("calibrated", "fdr")
    }
    assert all(r["images"] == 60 and 0 <= r["low"] <= r["removed"] <= r["high"] <= 1 for r in clean)
    assert benchmark_page.summary(rows, "id").count("| reaction |") == 1
    benchmark.write_curves(study, str(tmp_path / "page.md"))
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["table_roc.png", "table_scores.png"]
    benchmark_page.write_cost(tmp_path / "cost.png", rows, "id")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_a_smaller_study_writes_its_own_section_of_the_page_only(study, tmp_path):
    values = dataclasses.asdict(dataclasses.replace(study, section="patch"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    (tmp_path / "page.md").write_text("above\n<!-- patch: begin -->\n<!-- patch: end -->\nbelow\n")
    result = CliRunner().invoke(benchmark.main, [f"{tmp_path}/study.yaml", "--page", f"{tmp_path}/page.md"])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("above") and text.endswith("below\n")
    assert text.count("| reaction |") == 1


def test_finished_scores_are_reused(study, monkeypatch):
    first = benchmark.run(study)
    monkeypatch.setattr(benchmark_scores, "score_with_product", None)  # would fail when called
    monkeypatch.setattr(benchmark_scores, "score_with_baseline", None)
    assert benchmark.run(study) == first


def test_a_pool_holds_all_clean_images_and_the_asked_share_of_triggered_ones():
    for rate, poisoned in ((0.001, 1), (0.01, 9), (0.1, 100), (0.5, 700)):
        members, truth = pool(900, 700, rate, seed=0)
        assert (len(set(members.tolist())) - 900, truth.sum(), truth[:900].sum()) == (poisoned, poisoned, 0)
        assert members[:900].tolist() == list(range(900))


def test_a_detector_that_judges_images_by_each_other_is_given_every_pool_by_itself(study):
    settings = DetectorConfig(detector="spectral", settings={"clusters": 2}, each_pool=True, fit_on_pool=True)
    study = dataclasses.replace(study, detectors={"spectral": settings}, default="spectral", curves=())
    victim = benchmark.load_victim(study, "tiny", study.victims["tiny"])
    scores = PoolScores(study, victim, "backdoored", "id", 0, "spectral", settings)
    few, many = scores.pool(0.01)[0], scores.pool(0.5)[0]
    assert (len(few), len(many)) == (61, 60 + len(victim.triggered))
    assert (few[:60] != many[:60]).any()  # the same clean images, beside other triggered ones
    assert {(r["aux"], r["poison_rate"]) for r in benchmark.run(study)} == {
        (a, p) for a in ("id", "poisoned") for p in (0.01, 0.5)
    }


def test_an_independent_encoder_of_another_image_size_is_refused(study, tmp_path):
    other = tiny_victim(tmp_path)
    other["encoder"]["image_size"] = 16
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    settings = DetectorConfig(detector="cross_encoder", other=f"{tmp_path}/other.yaml")
    wrong = dataclasses.replace(study, detectors={"cross": settings}, default="cross", curves=())
    with pytest.raises(
        ConfigError, match=r"other\.yaml: its encoder sees 16 pixels, victim tiny 32\. Name an independent"
    ):
        benchmark.run(wrong)


def test_a_detector_whose_scores_are_not_finite_stops_the_study(study):
    weights = Path(study.out).parent / "huge.safetensors"
    victim = benchmark.load_victim(study, "tiny", study.victims["tiny"])
    encoder = storage.read_bytes(load_encoder_spec(victim.encoders["backdoored"]).weights)
    tensors = {n: t * 1e30 if t.is_floating_point() else t for n, t in safetensors.torch.load(encoder).items()}
    safetensors.torch.save_file(tensors, weights)
    spec = to_mapping(load_encoder_spec(victim.encoders["backdoored"])) | {"weights": str(weights)}
    (weights.parent / "huge.yaml").write_text(yaml.safe_dump(spec))
    broken = dataclasses.replace(victim, encoders={"backdoored": f"{weights.parent}/huge.yaml"})
    with pytest.raises(
        ConfigError, match=r"tiny, backdoored encoder, id auxiliary set, seed 0: \d+ of \d+ scores of norm"
    ):
        benchmark_scores.score_victim(study, broken, "backdoored", "id", 0, "norm", DetectorConfig(detector="norm"))


def test_the_published_configuration_names_victims_that_exist():
    config = from_mapping(BenchmarkConfig, load_yaml("configs/benchmark_cpu.yaml"), "benchmark_cpu")
    assert all(Path(victim.config).exists() for victim in config.victims.values())


WRONG = {
    "two kinds": ({"scorer": "paper", "detector": "norm"}, "give either `scorer` or `detector`, not both"),
    "misspelt": (
        {"scorer": "reaction", "efort": "fast"},
        r"detectors\.x: unknown key 'efort'\. Known keys: scorer, effort",
    ),
    "unknown scorer": ({"scorer": "magic"}, "scorer: 'magic' is not one of paper, lowres, reaction"),
    "unknown column": ({"scorer": "reaction", "column": "colour"}, "column: 'colour' is not one of score, p_value"),
    "unknown effort": ({"scorer": "reaction", "effort": "slow"}, "effort: 'slow' is not fast, thorough"),
    "unknown detector": ({"detector": "wishful"}, "detector 'wishful' is not known. Use one of activation_clustering"),
    "unknown setting": (
        {"detector": "density", "settings": {"kind": "dao", "neighbours": 3}},
        "detector density: unknown setting 'neighbours'. It has: kind, k, unit",
    ),
    "idle setting": ({"detector": "norm", "effort": "fast"}, "effort: means nothing for the baseline norm. Remove it"),
    "kinds of another scorer": (
        {"scorer": "reaction", "kinds": ["prediction"]},
        "kinds: of the scorer evidence, thorough, some of prediction, whereabouts, reaction",
    ),
    "idle baseline setting": ({"scorer": "paper", "each_pool": True}, "each_pool: means nothing for the scorer paper"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_detector_setting_is_refused_before_any_work(case, study):
    values, words = WRONG[case]
    settings = to_mapping(study) | {"detectors": {"reaction": {"scorer": "reaction"}, "x": values}, "curves": []}
    with pytest.raises(ConfigError, match=words):
        from_mapping(BenchmarkConfig, settings, "test")


def test_a_default_that_is_not_measured_says_so(study):
    with pytest.raises(ConfigError, match="'missing' is not among the detectors"):
        dataclasses.replace(study, default="missing")


# ---------------------------------------------------------------- how many auxiliary images a cut needs


@pytest.mark.parametrize("scorer", ["reaction", "evidence"])
def test_the_calibration_study_judges_clean_images_by_cuts_of_few_and_many_held_out_images(study, scorer):
    victim = benchmark.load_victim(study, "tiny", study.victims["tiny"])
    settings = DetectorConfig(scorer=scorer)
    rows = list(calibration_study.measured(study, victim, "id", settings))
    cuts = {(row["held_out"], row["nominal"]): row["cut"] for row in rows}
    most = max(size for size, _ in cuts)
    assert cuts == {
        **{(20, rate): "refused" for rate in (0.01, 0.001)},
        **{(size, rate): "fitted tail" for size in (60, most) for rate in (0.01, 0.001)},
    }
    assert most > 100
    detector, _ = benchmark.fit_scorer(study, victim, "backdoored", "id", 0, settings)
    found = benchmark.score_victim(study, victim, "backdoored", "id", 0, scorer, settings)
    assert all(0 <= row["removed_low"] <= row["removed_high"] <= 1 for row in rows if row["cut"] != "refused")
    every = np.arange(len(detector.scores))  # with all of them the cut is that of a scan
    clean = found.of(np.arange(len(found.clean)))
    values = values_of(detector.clean_reference, clean.statistics, clean.energy) if scorer == "evidence" else {}
    cut = threshold_for(found.clean, detector.calibration("thorough"), ThresholdPolicy(fpr=0.05))
    share = calibration_study.removed_share(detector, every, found.clean, values, 0.05)
    assert share == pytest.approx(float((found.clean > cut).mean()), abs=1 / len(found.clean))
    assert "| tiny | " in calibration_study.markdown(rows)


# ---------------------------------------------------------------- honest groups


def test_uneven_scans_tell_what_agreement_takes_of_them_and_of_their_groups(study):
    victim = benchmark.load_victim(study, "tiny", study.victims["tiny"])
    strangers = victim.test[:10].flip(-2)
    rows = list(uneven_scans.measured(study, victim, "clean", strangers))
    largest = int(victim.labels.bincount().max())
    assert [(row["scan"], row["images"]) for row in rows[::2]] == [
        ("even", 60),
        ("5 copies of 40 images", 260),
        ("a third of one class", largest + min(2 * largest, 60 - largest)),
        ("10 of another kind", 70),
    ]
    assert [row["agreement"] for row in rows] == [0, 1] * 4
    assert all(0 <= row["removed"] <= 1 for row in rows)
    assert [row["of_its_group"] for row in rows[:2]] == ["", ""]
    assert uneven_scans.markdown(rows).count("| tiny, clean | ") == 8


def test_a_copy_is_another_file_of_what_looks_the_same(study):
    image = benchmark.load_victim(study, "tiny", study.victims["tiny"]).test[0]
    copies = [uneven_scans.altered(image, np.random.default_rng(seed)) for seed in (0, 1)]
    assert not np.array_equal(copies[0], copies[1])
    for copy in copies:
        assert 0 < (copy.float() - image.float()).abs().mean() < 25
