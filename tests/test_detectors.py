"""Baselines, all in one shape: a score is of its sample alone, planted outliers come first, wrong settings are named."""

import itertools

import numpy as np
import pytest
import torch
from builders import POINTS, SIZE, PlantedEncoder, auroc, random_images, with_white_corner
from torch.nn import functional

from sanitize.attacks.triggers import FrequencyTrigger
from sanitize.config import EncoderSpec
from sanitize.detectors import (
    DETECTORS,
    activation_clustering,
    backdoor_ids,
    check_detector,
    cross_encoder,
    fit_detector,
    norm,
    spectral,
)
from sanitize.detectors.energy import energy
from sanitize.detectors.reference_set import ReferenceSet, assign, cluster
from sanitize.errors import ConfigError
from sanitize.stages.encoders import Encoder, build_backbone, embed_in_batches


@pytest.fixture(scope="module")
def poisoned_set(colour_encoder):
    """200 images, 16 of them triggered: for the methods that learn the poison from the set."""
    images = random_images(200)
    images[:16] = with_white_corner(images[:16])
    return ReferenceSet(images, embed_in_batches(colour_encoder, images))


PER_SAMPLE = [
    ("energy", {}),
    ("norm", {}),
    ("whitened_norm", {}),
    ("density", {"kind": "kdistance"}),
    ("density", {"kind": "lid", "k": 20}),
    ("density", {"kind": "slof"}),
    ("density", {"kind": "dao", "unit": True}),
    ("spectral", {"clusters": 3}),
    ("activation_clustering", {"clusters": 3}),
    ("isolation_forest", {}),
    ("backdoor_ids", {}),
    ("cross_encoder", {}),
]


def fitted(name, settings, clean_set, colour_encoder, seed=3):
    if name == "cross_encoder":  # the second encoder: pixels themselves
        settings = {**settings, "other": lambda images: functional.avg_pool2d(images, 4).flatten(1)}
    return fit_detector(name, clean_set, colour_encoder, seed, settings)


def named(cases):
    return pytest.mark.parametrize(("name", "settings"), cases, ids=["-".join(map(str, (n, *s.values()))) for n, s in cases])  # fmt: skip


# ---------------------------------------------------------------- all of them


@named(PER_SAMPLE)
def test_a_score_depends_on_its_sample_alone(name, settings, clean_set, colour_encoder, stream):
    images, embeddings, _ = stream
    score = fitted(name, settings, clean_set, colour_encoder)
    together = score(images, embeddings)
    parts = [slice(0, 1), slice(1, 8), slice(8, 60)]
    assert together.dtype == torch.float32
    assert together.shape == (60,)
    assert torch.isfinite(together).all()
    torch.testing.assert_close(torch.cat([score(images[p], embeddings[p]) for p in parts]), together, rtol=1e-4, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(score(images.flip(0), embeddings.flip(0)).flip(0), together, rtol=1e-4, atol=1e-5)


@named([*PER_SAMPLE, ("lorex", {}), ("asset", {"steps": 5}), ("asset", {"kind": "offset", "steps": 5, "passes": 2})])
def test_the_same_seed_gives_the_same_scores(name, settings, clean_set, colour_encoder, stream):
    images, embeddings, _ = stream
    first = fitted(name, settings, clean_set, colour_encoder)
    expected = first(images, embeddings)
    torch.rand(7)  # the global generator plays no part
    with torch.no_grad():
        assert torch.equal(first(images, embeddings), expected)
        assert torch.equal(fitted(name, settings, clean_set, colour_encoder)(images, embeddings), expected)


@named([
    ("norm", {}), ("density", {"kind": "kdistance"}), ("density", {"kind": "slof"}), ("density", {"kind": "dao"}),
    ("density", {"kind": "slof", "unit": True}), ("backdoor_ids", {}), ("cross_encoder", {}),
    ("asset", {}), ("whitened_norm", {}), ("lorex", {}),
])  # fmt: skip
def test_planted_outliers_score_highest_against_a_clean_set(name, settings, clean_set, colour_encoder, stream):
    images, embeddings, truth = stream
    assert auroc(fitted(name, settings, clean_set, colour_encoder)(images, embeddings), truth) > 0.95


@named([("spectral", {"clusters": 1}), ("activation_clustering", {"clusters": 1})])
def test_poison_in_the_bank_is_learned_without_labels(name, settings, poisoned_set, colour_encoder, stream):
    images, embeddings, truth = stream
    assert auroc(fitted(name, settings, poisoned_set, colour_encoder)(images, embeddings), truth) > 0.95


def test_isolation_forest_ranks_outliers_in_every_direction_first(colour_encoder):
    generator = torch.Generator().manual_seed(0)
    usual, outliers = torch.randn(260, 8, generator=generator), 4 * torch.randn(10, 8, generator=generator).sign()
    images = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    score = fit_detector("isolation_forest", ReferenceSet(images, usual[:200]), colour_encoder, 0, {})
    assert auroc(score(images[:70], torch.cat([usual[200:], outliers])), torch.arange(70) >= 60) > 0.95


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("name", ["spectral", "activation_clustering"])
def test_a_bank_of_fewer_different_embeddings_than_clusters_gives_finite_scores(name, colour_encoder):
    images = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    score = fit_detector(name, ReferenceSet(images, torch.eye(4).repeat(10, 1)), colour_encoder, 0, {"clusters": 10})
    assert torch.isfinite(score(images[:9], torch.randn(9, 4))).all()


def test_an_unknown_detector_lists_the_known_ones():
    names = ", ".join(DETECTORS)
    for name in ("nonsense", "reference_set", "../energy", "os"):
        with pytest.raises(ConfigError, match=f"detector '{name}' is not known. Use one of {names}"):
            check_detector(name, {})


@named([("norm", {"k": 3}), ("density", {"neighbours": 3})])
def test_a_setting_that_a_detector_does_not_have_is_refused(name, settings, clean_set, colour_encoder):
    with pytest.raises(ConfigError, match=f"detector {name}: unknown setting '{next(iter(settings))}'. It has: "):
        fitted(name, settings, clean_set, colour_encoder)


@named([
    ("density", {"kind": "lof"}), ("density", {"k": 199}), ("spectral", {"clusters": 201}), ("asset", {"kind": "outer"}),
    ("backdoor_ids", {"ratios": 2}), ("cross_encoder", {"regularisation": 0.0}),
])  # fmt: skip
def test_wrong_settings_name_the_setting_and_its_value(name, settings, clean_set, colour_encoder):
    key, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{key}: {value!r}"):
        fitted(name, settings, clean_set, colour_encoder)


def test_a_bank_needs_one_embedding_per_image():
    with pytest.raises(ConfigError, match="reference set: 3 images and 2 embeddings"):
        ReferenceSet(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 5))


# ---------------------------------------------------------------- energy, norm


def test_energy_is_that_of_the_normalised_pixels(clean_set, colour_encoder):
    images = random_images(3)
    normalised = (images.float() / 255 - colour_encoder.mean) / colour_encoder.std
    scores = fitted("energy", {}, clean_set, colour_encoder)(images, torch.zeros(3, 1))
    torch.testing.assert_close(scores, energy(normalised))


def test_robust_z_is_the_plain_formula_on_both_sides():
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    z = norm.robust_z(torch.tensor([3.0, 0.0, 8.0]), reference)
    assert z.tolist() == pytest.approx([0, 3 / 1.4826, 5 / 1.4826])
    assert torch.isfinite(norm.robust_z(torch.ones(2), torch.ones(5))).all()


# ---------------------------------------------------------------- spectral, activation clustering


def test_spectral_scores_of_one_class_are_those_of_the_definition():
    mean, direction = spectral.signature(POINTS)
    assert mean.tolist() == pytest.approx([2.25, 1.5])
    assert direction.abs().tolist() == pytest.approx([0.836554, 0.547884], abs=1e-6)
    expected = [7.312012, 3.487628, 3.542853, 0.004200, 0.247813, 34.706557]
    assert spectral.spectral_score(POINTS, mean, direction).tolist() == pytest.approx(expected, abs=2e-6)


def test_a_sample_is_scored_in_its_nearest_pseudo_class(clean_set, colour_encoder, stream):
    images, embeddings, _ = stream
    points, queries = (functional.normalize(z.double(), dim=1) for z in (clean_set.embeddings, embeddings))
    centres = cluster(points, 3, 5)
    members = assign(points, centres)
    scores = spectral.fit(clean_set, colour_encoder, 5, clusters=3)(images, embeddings)
    for query, score in zip(queries[:10], scores, strict=False):
        own = points[members == int((centres - query).norm(dim=1).argmin())]
        _, _, right = torch.linalg.svd(own - own.mean(dim=0))
        assert float(score) == pytest.approx(float(((query - own.mean(dim=0)) @ right[0]) ** 2), rel=1e-4, abs=1e-9)


def test_the_smaller_part_is_the_suspicious_one():
    generator = torch.Generator().manual_seed(0)
    many, few = torch.randn(40, 20, generator=generator), torch.randn(6, 20, generator=generator) + 5
    split = activation_clustering.split(torch.cat([many, few]), 10, 0)
    assert split.axes.shape == (20, 10)
    assert (split.score(few) > 0).all()
    assert (split.score(many) < 0).all()
    reduced = (many[:1].double() - split.mean) @ split.axes
    expected = float((reduced - split.larger).square().sum() - (reduced - split.smaller).square().sum())
    assert float(split.score(many[:1])) == pytest.approx(expected)


def test_a_class_of_one_sample_has_no_smaller_part():
    split = activation_clustering.split(torch.ones(1, 4), 10, 0)
    assert split.score(torch.randn(3, 4)).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- backdoor_ids


@pytest.mark.parametrize("size", [16, 32, 36])
def test_masks_grow_and_hide_the_share_asked_for(size):
    ratios = torch.linspace(0, 0.9, 10)
    hidden = backdoor_ids.growing_masks(size, ratios, seed=1)
    assert hidden.shape == (10, 1, size, size)
    assert not hidden[0].any()
    assert (hidden[1:] | ~hidden[:-1]).all()
    assert hidden.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx(ratios.tolist(), abs=0.05)
    assert torch.equal(hidden, backdoor_ids.growing_masks(size, ratios, seed=1))
    assert not torch.equal(hidden, backdoor_ids.growing_masks(size, ratios, seed=2))


def test_hidden_pixels_hold_the_mean_colour_of_their_image():
    images, hidden = random_images(2), torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    hidden[:, :, :4] = True
    covered = backdoor_ids.masked(images, hidden)[:, 0]
    assert torch.equal(covered[:, :, 4:], images[:, :, 4:])
    for image, result in zip(images, covered, strict=True):
        for channel in range(3):
            assert (result[channel, :4] == round(float(image[channel].float().mean()))).all()


def test_largest_jump_is_the_plain_loop():
    sequences = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    for sequence, jump in zip(sequences, backdoor_ids.largest_jump(sequences), strict=True):
        steps = [1 - float(functional.cosine_similarity(a, b, dim=0)) for a, b in itertools.pairwise(sequence)]
        assert float(jump) == pytest.approx(max(steps) / np.median(steps), rel=1e-4)
    assert backdoor_ids.largest_jump(torch.ones(1, 6, 4)).tolist() == pytest.approx([0], abs=1e-6)


# ---------------------------------------------------------------- cross_encoder


def test_the_ridge_map_finds_a_linear_relation_and_its_offset():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    explained = cross_encoder.ridge(g, g @ weights + 7, 1e-9)
    torch.testing.assert_close(explained.weights, weights, rtol=1e-6, atol=1e-6)
    assert explained.residual(g, g @ weights + 7).abs().max() < 1e-6
    assert cross_encoder.ridge(g, g @ weights, 10.0).weights.norm() < weights.norm()


def test_whitened_norm_is_the_mahalanobis_length():
    covariance = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    residuals = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    expected = [float(r @ torch.linalg.inv(covariance) @ r) ** 0.5 for r in residuals]
    assert cross_encoder.whitened_norm(residuals, covariance).tolist() == pytest.approx(expected)


# ---------------------------------------------------------------- the synthetic victim


@pytest.fixture(scope="module")
def victim():
    """SYNTHETIC planted backdoor in a random ResNet: clean colour_encoder, planted one, its set, 5 % triggered stream, truth."""
    torch.manual_seed(0)
    spec = EncoderSpec("resnet10-cifar", image_size=32, width=8, stem_stride=2)
    clean = Encoder(build_backbone(spec).eval(), spec)
    images, stream = random_images(256, 0, 32), random_images(256, 5000, 32)
    stream[:13] = FrequencyTrigger()(stream[:13])
    raw = embed_in_batches(clean, images)
    planted = PlantedEncoder(clean, raw[:20].mean(dim=0) - raw.mean(dim=0))
    return clean, planted, ReferenceSet(images, embed_in_batches(planted, images)), stream, torch.arange(256) < 13


@named([("cross_encoder", {}), ("asset", {}), ("density", {"kind": "kdistance"})])
def test_the_planted_backdoor_is_found(name, settings, victim):
    clean, planted, its_set, stream, truth = victim
    settings = {**settings, "other": clean} if name == "cross_encoder" else settings
    scores = fit_detector(name, its_set, planted, 0, settings)(stream, embed_in_batches(planted, stream))
    assert auroc(scores, truth) > 0.85
