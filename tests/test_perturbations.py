"""The default score: alterations keep images images, the distance is the plain formula, effort decides who is altered."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import PlantedEncoder, fit_config, random_images

from sanitize.artifacts import detector_folder
from sanitize.attacks.triggers import FrequencyTrigger
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.config import EncoderSpec, ScanConfig, ThresholdPolicy
from sanitize.config_loading import from_mapping
from sanitize.errors import ConfigError
from sanitize.metrics import detection
from sanitize.stages.clean_reference import embedding_statistics, fit_clean_reference
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.perturbations import FLOOR, PERTURBATIONS, embedding_changes


@pytest.mark.parametrize("size", [16, 32, 96])
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_an_alteration_changes_a_image_and_treats_each_alone(name, size):
    images = random_images(3, size=size).float() / 255
    altered = PERTURBATIONS[name](images)
    assert altered.shape == images.shape
    assert -1e-5 <= altered.min() <= altered.max() <= 1 + 1e-5
    assert not torch.allclose(altered, images)
    torch.testing.assert_close(PERTURBATIONS[name](images[1:2]), altered[1:2])
    grey = images.mean(dim=1, keepdim=True).expand_as(images)  # a black-and-white photograph is altered like any other
    assert not torch.allclose(PERTURBATIONS[name](grey), grey, atol=1e-3)


@pytest.mark.parametrize("size", [16, 32, 96])
def test_blur_is_the_binomial_filter_of_a_32_pixel_image(size):
    image = random_images(1, size=size)[0].double().numpy() / 255
    step = max(size // 32, 1)
    padded = np.pad(image, ((0, 0), (step, step), (step, step)), mode="edge")
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = sum(
        weights[i, j] * padded[:, i * step : i * step + size, j * step : j * step + size]
        for i in range(3)
        for j in range(3)
    )
    blurred = PERTURBATIONS["blur"](torch.from_numpy(image)[None].float())[0]
    assert blurred.numpy() == pytest.approx(expected, abs=1e-6)


def test_reactions_are_the_logarithm_of_the_cosine_change():
    torch.manual_seed(0)
    embed = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 9))
    images = random_images(4).float() / 255
    with torch.no_grad():
        found = embedding_changes(embed, images, embed(images))
        for row, image in zip(found, images, strict=True):
            for value, alter in zip(row, PERTURBATIONS.values(), strict=True):
                u, v = embed(image[None])[0].double(), embed(alter(image[None]))[0].double()
                change = 1 - float(u @ v / (u.norm() * v.norm()))
                assert float(value) == pytest.approx(np.log(change + FLOOR), abs=1e-4)


# ---------------------------------------------------------------- effort


def test_fast_looks_twice_only_at_the_most_suspicious(detector, shards, scan_config, tmp_path):
    for effort in ("fast", "thorough"):
        scan(scan_config(shards, effort, effort=effort, scores_only=True))
    fast, thorough = (
        [row for path in sorted((tmp_path / e / "scores").glob("*")) for row in pq.read_table(path).to_pylist()]
        for e in ("fast", "thorough")
    )
    prescreen_threshold = detector_folder.load_detector(str(detector)).undecided("fast")[0]
    assert all(row["reaction_blur"] is not None for row in thorough)
    clean = detector_folder.load_detector(str(detector)).clean_reference
    columns = [[row[name] for row in fast] for name in ("embedding_norm", "neighbour_distance")]
    looks = clean.prescreen_score(embedding_statistics(torch.zeros(len(fast), 4), *map(torch.tensor, columns))).tolist()
    passed = [look >= prescreen_threshold for look in looks]
    assert [row["reaction_blur"] is not None for row in fast] == passed
    assert 0 < sum(passed) < len(fast)
    for quick, careful, look in zip(fast, thorough, looks, strict=True):
        if look >= prescreen_threshold:
            assert quick["score"] == pytest.approx(careful["score"], rel=1e-4)
        else:
            assert quick["score"] == pytest.approx(look - prescreen_threshold, abs=1e-4)
            assert quick["score"] <= 0 <= careful["score"]
            assert quick["p_value"] > 0.15  # a fifth of the calibration images pass the gate


def test_the_null_distribution_belongs_to_the_effort(detector):
    found = detector_folder.load_detector(str(detector))
    for effort, share in (("thorough", 1.0), ("fast", 0.2), ("0.5", 0.5), ("1", 1.0)):
        scores = found.calibration(effort)
        assert len(scores) == len(found.scores)
        assert np.mean(scores >= 0) == pytest.approx(share, abs=0.02)
        assert (np.diff(scores) >= 0).all()


def test_a_scan_folder_keeps_to_one_effort(shards, scan_config):
    from sanitize.errors import RefusedError

    scan(scan_config(shards, effort="fast", scores_only=True))
    with pytest.raises(RefusedError, match="differs in effort"):
        scan(scan_config(shards, effort="thorough", scores_only=True))


def test_a_share_may_stand_in_yaml_as_the_number_it_is():
    assert from_mapping(ScanConfig, {"shards": ["s"], "effort": 0.05}, "scan.yaml").effort == "0.05"


@pytest.mark.parametrize("effort", ["slow", "0", "1.5", "-1", "nan"])
def test_an_unknown_effort_says_so(shards, scan_config, effort):
    with pytest.raises(
        ConfigError, match=f"effort: '{effort}' is not fast, thorough, or a share above 0 and at most 1"
    ):
        scan_config(shards, effort=effort)


def test_scorers_of_the_reconstruction_alone_alter_nothing(aux_shards, encoder_spec, shards, scan_config, tmp_path):
    fit(fit_config(aux_shards, encoder_spec, tmp_path / "d", scorer="lowres"))
    scan(scan_config(shards, detector=str(tmp_path / "d"), policy=ThresholdPolicy("fraction", fraction=0.1)))
    rows = pq.read_table(tmp_path / "scanned" / "scores" / "part-0002.parquet").to_pylist()
    assert all(row["reaction_turn"] is None and row["score"] == row["error"] for row in rows)


# ---------------------------------------------------------------- does it find a backdoor?


def test_a_planted_global_trigger_is_found():
    """Synthetic victim (builders.PlantedEncoder). No control here: to a random encoder and smooth images the pattern alone is odd;
    controls on real encoders and photographs are in docs/detection.md."""
    torch.manual_seed(0)
    spec = EncoderSpec("resnet10-cifar", image_size=32, width=8, stem_stride=2)
    clean = Encoder(build_backbone(spec).eval(), spec).eval()
    trigger = FrequencyTrigger(magnitude=100)
    known, test = random_images(300, size=32), random_images(200, size=32, first=5000)
    with torch.inference_mode():
        pull = clean(known[:1].float() / 255)[0] - clean(known.float() / 255).mean(dim=0)
        encoder = PlantedEncoder(clean, pull)

        def react(pixels):
            images = pixels.float() / 255
            return embedding_changes(encoder, images, encoder(images))

        usual = fit_clean_reference(react(known).numpy(), torch.zeros(1, 1), seed=0)
        scores = torch.cat([usual.distance(react(test)), usual.distance(react(trigger(test)))]).numpy()
    assert detection(scores, np.repeat([False, True], len(test))).auroc > 0.95
