"""Prediction: an eye learns what an encoder makes of benign images, and sees where it departs; fit refuses and warns in words."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import (
    auroc,
    decided,
    decision_table,
    fit_config,
    random_images,
    scores_by_key,
    table,
    tree_bytes,
    write_dim,
    write_encoder,
    write_shards,
)

from sanitize import storage
from sanitize.artifacts.detector_folder import load_detector
from sanitize.commands.audit import audit
from sanitize.commands.clean import clean
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.config import FitConfig, ScanConfig, ThresholdPolicy, TrainingConfig
from sanitize.config_loading import load_encoder_spec
from sanitize.config_models import PredictionConfig
from sanitize.errors import CheckpointError, ConfigError
from sanitize.runtime import Resources
from sanitize.stages.benign_changes import CHANGES, change
from sanitize.stages.encoders import embed_in_batches, load_encoder
from sanitize.stages.prediction import Predictor, explained, fit_departure, fit_target
from sanitize.training.prediction import fit_ridge

TRAINING = TrainingConfig(epochs=1, batch_size=64, precision="fp32", calibration_fraction=0.2)


def evidence_config(*arguments, **changes):
    return fit_config(*arguments, **({"scorer": "evidence"} | changes))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("many"), [280, 260], first_seed=20_000)


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory):
    return load_encoder_spec(str(write_encoder(tmp_path_factory.mktemp("ancestor"), seed=1)))


@pytest.fixture(scope="module")
def with_student(tmp_path_factory, many, encoder_spec) -> str:
    out = tmp_path_factory.mktemp("student") / "detector"
    fit(evidence_config(many, encoder_spec, out, training=TRAINING, prediction=PredictionConfig(views=3, epochs=6)))
    return str(out)


@pytest.fixture(scope="module")
def with_reference(tmp_path_factory, many, encoder_spec, ancestor) -> str:
    out = tmp_path_factory.mktemp("reference") / "detector"
    fit(evidence_config(many, encoder_spec, out, training=TRAINING, reference=ancestor))
    return str(out)


# ---------------------------------------------------------------- benign changes


@pytest.mark.parametrize("size", [16, 32, 96])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_gives_another_image_of_the_same_kind_and_the_same_for_the_same_draw(name, size):
    image, other = random_images(2, size=size).float() / 255
    before = image.clone()
    first, again = (CHANGES[name](image, other, np.random.default_rng(7)) for _ in range(2))
    assert first.shape == image.shape and first.dtype == torch.float32
    assert torch.equal(first, again) and torch.equal(image, before)
    assert not torch.allclose(first, image, atol=1e-3)


def test_a_changed_image_is_one_that_a_file_could_hold():
    image, other = random_images(2).float() / 255
    for draw in range(40):
        changed = change(image, other, np.random.default_rng(draw)) * 255
        assert changed.min() >= 0 and changed.max() <= 255
        assert torch.allclose(changed, changed.round(), atol=1e-3)


# ---------------------------------------------------------------- eyes and departures


def embedded(spec, count=600, first=0):
    return embed_in_batches(load_encoder(spec), random_images(count, first=first))


def test_a_ridge_recovers_a_linear_map_and_shrinks_where_there_is_none():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(400, 10), dim=1)
    targets = features @ torch.randn(10, 3)
    linear = fit_ridge(features[:300], targets[:300], features[300:], targets[300:])
    assert explained(targets[300:], linear(features[300:])) > 0.999
    noise = torch.randn(400, 3)
    nothing = fit_ridge(features[:300], noise[:300], features[300:], noise[300:])
    assert -0.1 < explained(noise[300:], nothing(features[300:])) < 0.1


def test_an_embedding_that_belongs_to_another_image_departs_from_its_prediction(encoder_spec, ancestor):
    suspect, known = embedded(encoder_spec), embedded(ancestor)
    target = fit_target(suspect[:400], 16)
    targets = target(suspect)
    eye = fit_ridge(known[:300], targets[:300], known[300:400], targets[300:400])
    departure = fit_departure(targets[300:400], eye(known[300:400]))
    quality = explained(targets[300:400], eye(known[300:400]))
    predictor = Predictor(eye, target, departure, quality, eye_size=0)
    with torch.no_grad():
        _, own = predictor(suspect[400:], known[400:])
        _, swapped = predictor(suspect[400:].roll(1, dims=0), known[400:])
    assert auroc(torch.cat([own, swapped]), torch.arange(400) >= 200) > 0.85


def test_the_target_is_standardised_and_never_larger_than_the_images_allow(encoder_spec):
    embeddings = embedded(encoder_spec, 40)
    targets = fit_target(embeddings, components=48)(embeddings)
    assert targets.shape == (40, 11)
    assert targets.mean(dim=0).numpy() == pytest.approx(0, abs=1e-4)
    assert targets.std(dim=0).numpy() == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- fit and scan


@pytest.mark.parametrize("kind", ["with_student", "with_reference"])
def test_fit_says_what_is_explained_and_a_scan_writes_how_images_depart(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    detector = load_detector(folder)
    assert detector.predictor and detector.summary.prediction_explained == pytest.approx(detector.predictor.explained)
    assert detector.summary.prediction_explained > 0.05
    assert len(detector.departures) == len(detector.scores)
    assert detector.summary.prediction_crowded == (
        0 if kind == "with_student" else None
    )  # asked about plain images alone
    shards = write_shards(tmp_path / "in", [30])
    scan(ScanConfig((str(shards),), folder, str(tmp_path / "out"), precision="fp32", workers=0, force=True))
    rows = table(tmp_path / "out", "part-0000")
    assert all(np.isfinite(row["prediction_energy"]) and row["prediction_residual"] > 0 for row in rows)
    size = detector.departures.residuals.shape[1]
    assert all(len(row["residuals"]) == size and len(row["image_hash"]) == 8 for row in rows)
    assert storage.read_json(str(tmp_path / "out" / "summary.json"))["scores"] == "as scored"
    residual = np.mean(np.frombuffer(rows[0]["residuals"], np.int8).astype(float) ** 2) / 64
    assert residual == pytest.approx(rows[0]["prediction_residual"], rel=0.1)


@pytest.mark.parametrize("kind", ["with_student", "with_reference"])
def test_calibration_images_depart_in_a_scan_as_they_did_in_the_fit(kind, request, many, tmp_path):
    folder = request.getfixturevalue(kind)
    scan(ScanConfig((str(many),), folder, str(tmp_path / "out"), precision="fp32", workers=0, scores_only=True))
    rows = [row for stem in ("part-0000", "part-0001") for row in table(tmp_path / "out", stem)]
    scanned = np.array([row["prediction_energy"] for row in rows])
    for expected in load_detector(folder).evidence["prediction"]:
        assert np.abs(scanned - expected).min() < 0.02


def test_agreement_joins_the_decisions_of_a_larger_scan_by_itself_and_is_taken_back_on_request(
    with_student, tmp_path, ray_cluster
):
    shards, out = write_shards(tmp_path / "in", [150, 100], first_seed=40_000), str(tmp_path / "out")
    scan(ScanConfig((str(shards),), with_student, out, precision="fp32", workers=0, force=True))
    assert storage.read_json(f"{out}/summary.json")["scores"].startswith("as scored, with agreement ")
    here = tree_bytes(Path(out))
    clean(out, ThresholdPolicy(agreement=False), force=True)
    assert storage.read_json(f"{out}/summary.json")["scores"] == "as scored"
    clean(out, ThresholdPolicy(), force=True, resources=Resources(2, 1, 0))
    assert tree_bytes(Path(out)) == here


def test_agreement_joins_the_decisions_of_a_small_scan_on_request_and_the_scan_stays_as_it_is(with_student, tmp_path):
    shards, out = write_shards(tmp_path / "in", [40, 20]), str(tmp_path / "out")
    scan(ScanConfig((str(shards),), with_student, out, precision="fp32", workers=0, force=True))
    before = decided(out)
    clean(out, ThresholdPolicy(agreement=True), force=True)
    assert storage.read_json(f"{out}/summary.json")["scores"].startswith("as scored, with agreement ")
    scores = decision_table(out).column("score").to_numpy()
    assert np.isfinite(scores).all()
    assert "--fpr 0.05" in Path(audit(out, top=0).report).read_text()
    clean(out, ThresholdPolicy(), force=True)
    assert decided(out) == before
    assert "--fpr 0.05" in Path(audit(out, top=0).report).read_text()


def test_fewer_of_other_clean_images_are_lost_when_pass_2_adapts_the_evidence(with_student, tmp_path):
    out, shards = str(tmp_path / "out"), write_dim(tmp_path / "in")
    scan(ScanConfig((str(shards),), with_student, out, precision="fp32", workers=0, scores_only=True))
    results = {}
    for adapt, agreement in itertools.product((False, True), repeat=2):
        policy = ThresholdPolicy(fpr=0.05, adapt=adapt, agreement=agreement)
        results[adapt, agreement] = clean(out, policy, force=True), storage.read_json(f"{out}/summary.json")["scores"]
    for agreement in (False, True):
        (plain, as_it_is), (moved, adapted) = (results[adapt, agreement] for adapt in (False, True))
        assert plain.threshold == moved.threshold
        assert moved.removed < plain.removed / 2
        assert "adapted evidence " not in as_it_is and adapted.startswith("adapted evidence ")
    assert results[False, False][1] == "as scored"
    assert " with agreement " in results[True, True][1]


def test_agreement_needs_a_prediction_and_a_policy_that_compares(detector, scan_config, tmp_path):
    shards = write_shards(tmp_path / "in", [5])
    scan(scan_config(shards))
    with pytest.raises(
        ConfigError,
        match=r"agreement: the detector .* was fitted without a prediction, .* fit with the scorer evidence",
    ):
        clean(str(tmp_path / "scanned"), ThresholdPolicy(agreement=True), force=True)
    with pytest.raises(
        ConfigError, match="agreement: policy fraction compares with no clean images. Use calibrated or fdr"
    ):
        ThresholdPolicy("fraction", agreement=True)


def test_scores_do_not_depend_on_batches_nor_on_how_the_scan_is_cut(with_student, tmp_path):
    shards = write_shards(tmp_path / "in", [17, 20])
    for out, batch_size in (("one", 64), ("two", 5)):
        scan(
            ScanConfig(
                (str(shards),),
                with_student,
                str(tmp_path / out),
                batch_size=batch_size,
                precision="fp32",
                workers=0,
                force=True,
            )
        )
    first, second = (scores_by_key(tmp_path / out) for out in ("one", "two"))
    assert first.keys() == second.keys()
    assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-3, abs=1e-3)


def test_a_fit_gives_the_same_predictor_whatever_the_batches(many, encoder_spec, with_student, tmp_path):
    settings = {"training": TRAINING, "prediction": PredictionConfig(views=3, epochs=6), "batch_size": 37}
    again = fit(evidence_config(many, encoder_spec, tmp_path / "again", **settings))
    assert again.summary.prediction_explained == pytest.approx(
        load_detector(with_student).summary.prediction_explained, abs=0.02
    )


def test_without_views_nothing_is_predicted(many, encoder_spec, tmp_path):
    found = fit(
        evidence_config(many, encoder_spec, tmp_path / "d", training=TRAINING, prediction=PredictionConfig(views=0))
    )
    assert found.predictor is None and found.summary.prediction_explained is None


def test_what_is_perturbed_is_left_to_a_predictor_only_where_it_sees_enough(with_student):
    detector = load_detector(with_student)
    detector.predictor.explained = 0.25
    assert detector.default_effort == "0.075"
    detector.predictor.explained = 0.24
    assert (
        detector.default_effort == "thorough"
    )  # else norm and distance, which an attacker imitates, would choose alone
    assert dataclasses.replace(detector, predictor=None).default_effort == "thorough"


def test_too_few_auxiliary_images_are_said_and_how_many_it_takes(aux_shards, encoder_spec, tmp_path, caplog):
    found = fit(evidence_config(aux_shards, encoder_spec, tmp_path / "d", training=TRAINING))
    assert found.predictor is None
    assert "no prediction: 240 auxiliary images leave" in caplog.text
    assert "to judge a predictor by, 50 are needed. Give about 344 images" in caplog.text


def test_a_predictor_that_explains_nothing_is_left_out_and_says_what_helps(many, encoder_spec, tmp_path, caplog):
    nothing = PredictionConfig(views=1, epochs=1, learning_rate=1e-12)
    found = fit(evidence_config(many, encoder_spec, tmp_path / "d", training=TRAINING, prediction=nothing))
    assert found.predictor is None and found.summary.prediction_explained < 0.05
    assert "no prediction: what was learnt explains" in caplog.text
    assert "Give --reference, best the encoder this one was fine-tuned from" in caplog.text


def test_a_suspect_does_not_vouch_for_itself(many, encoder_spec, tmp_path):
    copy = tmp_path / "copy.safetensors"
    shutil.copy(encoder_spec.weights, copy)
    itself = dataclasses.replace(encoder_spec, weights=str(copy))
    with pytest.raises(
        ConfigError,
        match=r"copy\.safetensors: is the encoder under test itself, which would vouch for itself\. Give one",
    ):
        fit(evidence_config(many, encoder_spec, tmp_path / "d", reference=itself))


def test_a_reference_that_sees_other_images_is_refused(many, encoder_spec, ancestor, tmp_path):
    larger = dataclasses.replace(ancestor, image_size=32)
    with pytest.raises(
        ConfigError,
        match=r"sees images of 32 pixels, the encoder under test 16\. Set `image_size: 16` in the reference",
    ):
        fit(evidence_config(many, encoder_spec, tmp_path / "d", reference=larger))


def test_a_reference_that_nothing_asks_is_refused(encoder_spec, ancestor):
    with pytest.raises(
        ConfigError,
        match="reference: scorer paper with prediction.views 1 asks no reference encoder. Use --scorer evidence",
    ):
        FitConfig(("aux",), encoder_spec, scorer="paper", reference=ancestor)


def test_a_reference_that_changed_since_is_refused(with_reference, ancestor, tmp_path):
    shards = write_shards(tmp_path / "in", [3])
    before = Path(ancestor.weights).read_bytes()
    tensors = safetensors.torch.load(before)
    tensors["conv1.weight"] = tensors["conv1.weight"] + 1
    try:
        safetensors.torch.save_file(tensors, ancestor.weights)
        with pytest.raises(
            CheckpointError, match="is not the reference encoder that the detector was fitted with. Restore"
        ):
            scan(ScanConfig((str(shards),), with_reference, str(tmp_path / "out"), workers=0))
    finally:
        Path(ancestor.weights).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("predictor.target_mean"), "predictor.target_mean of shape"),
        (
            lambda tensors: tensors["predictor.departure_residual_root"].fill_(float("nan")),
            "numbers that are not finite",
        ),
    ],
)
def test_a_damaged_predictor_is_refused_in_words(with_student, tmp_path, change, words):
    folder = tmp_path / "detector"
    shutil.copytree(with_student, folder)
    tensors = safetensors.torch.load((folder / "decoder.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "decoder.safetensors")
    description = storage.read_json(str(folder / "detector.json"))
    description["sha256"]["decoder.safetensors"] = storage.file_sha256(str(folder / "decoder.safetensors"))
    storage.write_json(str(folder / "detector.json"), description)
    with pytest.raises(CheckpointError, match=words):
        load_detector(str(folder))
