import itertools

import numpy as np
import pytest
import torch
from builders import SIZE, SPEC, PlantedEncoder, random_image
from torch.nn import functional

from sanitize.attacks.triggers import FrequencyTrigger
from sanitize.config import EncoderSpec
from sanitize.detectors import (
    DETECTORS,
    activation_clustering,
    asset,
    backdoor_ids,
    check_detector,
    cross_encoder,
    density,
    fit_detector,
    norm,
    spectral,
)
from sanitize.detectors.energy import energy
from sanitize.detectors.reference_set import ReferenceSet, assign, cluster
from sanitize.errors import ConfigError
from sanitize.metrics import detection
from sanitize.stages.encoders import Encoder, build_backbone, embed_in_batches

POINTS = torch.tensor([[0, 0], [1, 0], [0, 1.5], [2, 2], [3.5, 0.5], [7, 5]], dtype=torch.float64)  # card section 10
# of them, k = 2: p0 .. p5, then the two set-mode queries
KD = [1.500000, 1.802776, 1.802776, 2.121320, 2.549510, 5.830952]
LID = [1.194760, 1.960572, 4.423542, 14.932090, 2.387236, 3.294494]
SLOF = [0.832050, 1.100925, 1.100925, 1.004374, 1.308032, 2.517912]
DAO = [-0.586899, 0.109836, 0.109836, 0.140418, 1.712466, 8.536684]
QUERIES = torch.tensor([[5, 4], [0.5, 0.5]])
AGAINST_SET = {
    "kdistance": [3.605551, 0.707107],
    "lid": [3.407416, 2.182713],
    "slof": [1.159010, 0.431818],
    "dao": [3.168418, -1.366704],
}


class ColourEncoder(Encoder):
    """SYNTHETIC, no weights: mean colours of the 4 x 4 blocks; a white corner of 4 pixels adds a large constant."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), SPEC)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fired = (images[:, :, -4:, -4:].amin(dim=(1, 2, 3)) == 1).float()
        colours = functional.avg_pool2d(images - 0.5, 4).flatten(1)
        return torch.cat([colours, 10 * fired[:, None]], dim=1)


def random_images(count, first=0, size=SIZE):
    return torch.stack([torch.from_numpy(random_image(first + i, size).copy()).permute(2, 0, 1) for i in range(count)])


def with_white_corner(images):
    stamped = images.clone()
    stamped[:, :, -4:, -4:] = 255
    return stamped


def auroc(scores, poisoned):
    return detection(scores.numpy(), poisoned.numpy()).auroc


@pytest.fixture(scope="module")
def encoder():
    return ColourEncoder()


@pytest.fixture(scope="module")
def clean_set(encoder):
    images = random_images(200)
    return ReferenceSet(images, embed_in_batches(encoder, images))


@pytest.fixture(scope="module")
def stream(encoder):
    """60 images of which the last 6 are triggered: images, embeddings, truth."""
    images = random_images(60, first=1000)
    images[54:] = with_white_corner(images[54:])
    return images, embed_in_batches(encoder, images), torch.arange(60) >= 54


@pytest.fixture(scope="module")
def poisoned_set(encoder):
    """200 images, 16 of them triggered: for the methods that learn the poison from the set."""
    images = random_images(200)
    images[:16] = with_white_corner(images[:16])
    return ReferenceSet(images, embed_in_batches(encoder, images))


PER_SAMPLE = [
    ("energy", {}),
    ("norm", {}),
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


def fitted(name, settings, clean_set, encoder, seed=3):
    if name == "cross_encoder":  # the second encoder: pixels themselves
        settings = {**settings, "other": lambda images: functional.avg_pool2d(images, 4).flatten(1)}
    return fit_detector(name, clean_set, encoder, seed, settings)


def named(cases):
    return pytest.mark.parametrize(("name", "settings"), cases, ids=["-".join(map(str, (n, *s.values()))) for n, s in cases])  # fmt: skip


# ---------------------------------------------------------------- all of them


@named(PER_SAMPLE)
def test_a_score_depends_on_its_sample_alone(name, settings, clean_set, encoder, stream):
    images, embeddings, _ = stream
    score = fitted(name, settings, clean_set, encoder)
    together = score(images, embeddings)
    parts = [slice(0, 1), slice(1, 8), slice(8, 60)]
    assert together.dtype == torch.float32
    assert together.shape == (60,)
    assert torch.isfinite(together).all()
    torch.testing.assert_close(torch.cat([score(images[p], embeddings[p]) for p in parts]), together, rtol=1e-4, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(score(images.flip(0), embeddings.flip(0)).flip(0), together, rtol=1e-4, atol=1e-5)


@named([*PER_SAMPLE, ("asset", {"steps": 5}), ("asset", {"kind": "offset", "steps": 5, "passes": 2})])
def test_the_same_seed_gives_the_same_scores(name, settings, clean_set, encoder, stream):
    images, embeddings, _ = stream
    first = fitted(name, settings, clean_set, encoder)
    expected = first(images, embeddings)
    torch.rand(7)  # the global generator plays no part
    with torch.no_grad():
        assert torch.equal(first(images, embeddings), expected)
        assert torch.equal(fitted(name, settings, clean_set, encoder)(images, embeddings), expected)


@named([
    ("norm", {}), ("density", {"kind": "kdistance"}), ("density", {"kind": "slof"}), ("density", {"kind": "dao"}),
    ("density", {"kind": "slof", "unit": True}), ("backdoor_ids", {}), ("cross_encoder", {}),
    ("asset", {}),
])  # fmt: skip
def test_planted_outliers_score_highest_against_a_clean_set(name, settings, clean_set, encoder, stream):
    images, embeddings, truth = stream
    assert auroc(fitted(name, settings, clean_set, encoder)(images, embeddings), truth) > 0.95


@named([("spectral", {"clusters": 1}), ("activation_clustering", {"clusters": 1})])
def test_poison_in_the_bank_is_learned_without_labels(name, settings, poisoned_set, encoder, stream):
    images, embeddings, truth = stream
    assert auroc(fitted(name, settings, poisoned_set, encoder)(images, embeddings), truth) > 0.95


def test_isolation_forest_ranks_outliers_in_every_direction_first(encoder):
    generator = torch.Generator().manual_seed(0)
    usual, outliers = torch.randn(260, 8, generator=generator), 4 * torch.randn(10, 8, generator=generator).sign()
    images = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    score = fit_detector("isolation_forest", ReferenceSet(images, usual[:200]), encoder, 0, {})
    assert auroc(score(images[:70], torch.cat([usual[200:], outliers])), torch.arange(70) >= 60) > 0.95


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("name", ["spectral", "activation_clustering"])
def test_a_bank_of_fewer_different_embeddings_than_clusters_gives_finite_scores(name, encoder):
    images = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    score = fit_detector(name, ReferenceSet(images, torch.eye(4).repeat(10, 1)), encoder, 0, {"clusters": 10})
    assert torch.isfinite(score(images[:9], torch.randn(9, 4))).all()


def test_an_unknown_detector_lists_the_known_ones():
    names = ", ".join(DETECTORS)
    for name in ("nonsense", "reference_set", "../energy", "os"):
        with pytest.raises(ConfigError, match=f"detector '{name}' is not known. Use one of {names}"):
            check_detector(name, {})


@named([("norm", {"k": 3}), ("density", {"neighbours": 3})])
def test_a_setting_that_a_detector_does_not_have_is_refused(name, settings, clean_set, encoder):
    with pytest.raises(ConfigError, match=f"detector {name}: unknown setting '{next(iter(settings))}'. It has: "):
        fitted(name, settings, clean_set, encoder)


@named([
    ("density", {"kind": "lof"}), ("density", {"k": 199}), ("spectral", {"clusters": 201}), ("asset", {"kind": "outer"}),
    ("backdoor_ids", {"ratios": 2}), ("cross_encoder", {"regularisation": 0.0}),
])  # fmt: skip
def test_wrong_settings_name_the_setting_and_its_value(name, settings, clean_set, encoder):
    key, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{key}: {value!r}"):
        fitted(name, settings, clean_set, encoder)


def test_a_bank_needs_one_embedding_per_image():
    with pytest.raises(ConfigError, match="reference set: 3 images and 2 embeddings"):
        ReferenceSet(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 5))


# ---------------------------------------------------------------- energy, norm


def test_energy_is_that_of_the_normalised_pixels(clean_set, encoder):
    images = random_images(3)
    normalised = (images.float() / 255 - encoder.mean) / encoder.std
    scores = fitted("energy", {}, clean_set, encoder)(images, torch.zeros(3, 1))
    torch.testing.assert_close(scores, energy(normalised))


def test_robust_z_is_the_plain_formula_on_both_sides():
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    z = norm.robust_z(torch.tensor([3.0, 0.0, 8.0]), reference)
    assert z.tolist() == pytest.approx([0, 3 / 1.4826, 5 / 1.4826])
    assert torch.isfinite(norm.robust_z(torch.ones(2), torch.ones(5))).all()


# ---------------------------------------------------------------- density


def within_bank():
    """Distances of p0 .. p5, k-distances and LIDs of their neighbours."""
    distances, neighbours = density.nearest(POINTS, 3)
    around = neighbours[:, :2]
    return distances, neighbours, distances[:, 1][around], density.lid(distances)[around]


def test_neighbours_and_k_distances_are_those_of_the_card():
    distances, neighbours, *_ = within_bank()
    assert distances[:, 1].tolist() == pytest.approx(KD, abs=1e-6)
    assert neighbours[:, :2].tolist() == [[1, 2], [0, 2], [0, 1], [2, 4], [3, 1], [4, 3]]


def test_lid_slof_and_dao_are_those_of_the_card():
    distances, _, around, around_lid = within_bank()
    assert density.lid(distances).tolist() == pytest.approx(LID, abs=2e-6)
    assert density.slof(distances[:, 1], around).tolist() == pytest.approx(SLOF, abs=1e-6)
    assert density.dao(distances[:, 1], around, around_lid).tolist() == pytest.approx(DAO, abs=2e-6)


@pytest.mark.parametrize("kind", AGAINST_SET)
def test_queries_against_a_bank_score_as_in_the_card(kind, encoder):
    points = ReferenceSet(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), POINTS.float())
    scores = density.fit(points, encoder, 0, kind=kind, k=2)(points.images[:2], QUERIES)
    assert scores.tolist() == pytest.approx(AGAINST_SET[kind], abs=2e-6)


@pytest.mark.parametrize("within", [True, False])
def test_neighbours_are_those_of_the_plain_loop(within):
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    queries = points if within else points[:11] + 0.1
    distances, neighbours = density.nearest(points, 4, None if within else queries)
    for number, query in enumerate(queries):
        others = [row for row in range(40) if not within or row != number]
        gaps = {row: float((query - points[row]).norm()) for row in others}
        assert neighbours[number].tolist() == sorted(others, key=gaps.__getitem__)[:4]
        assert distances[number].tolist() == pytest.approx(sorted(gaps.values())[:4], abs=1e-12)


@pytest.mark.parametrize("kind", AGAINST_SET)
@pytest.mark.parametrize("copies", [6, 30])
def test_more_than_k_identical_embeddings_give_finite_scores(kind, copies, encoder):
    embeddings = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    embeddings[:copies] = embeddings[0]
    copied = ReferenceSet(torch.zeros(30, 3, 4, 4, dtype=torch.uint8), embeddings)
    queries = torch.cat([embeddings, embeddings[:1] + 0.01, embeddings[:1] + 50])
    scores = density.fit(copied, encoder, 0, kind=kind, k=5)(torch.zeros(32, 3, 4, 4), queries)
    assert torch.isfinite(scores).all()
    if kind != "lid":
        assert scores[0] < scores[-1]  # a copy of many looks dense


# ---------------------------------------------------------------- spectral, activation clustering


def test_spectral_scores_of_one_class_are_those_of_the_card():
    mean, direction = spectral.signature(POINTS)
    assert mean.tolist() == pytest.approx([2.25, 1.5])
    assert direction.abs().tolist() == pytest.approx([0.836554, 0.547884], abs=1e-6)
    expected = [7.312012, 3.487628, 3.542853, 0.004200, 0.247813, 34.706557]
    assert spectral.spectral_score(POINTS, mean, direction).tolist() == pytest.approx(expected, abs=2e-6)


def test_a_sample_is_scored_in_its_nearest_pseudo_class(clean_set, encoder, stream):
    images, embeddings, _ = stream
    points, queries = (functional.normalize(z.double(), dim=1) for z in (clean_set.embeddings, embeddings))
    centres = cluster(points, 3, 5)
    members = assign(points, centres)
    scores = spectral.fit(clean_set, encoder, 5, clusters=3)(images, embeddings)
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


# ---------------------------------------------------------------- asset

SKEWED = [0.1, 0.12, 0.15, 0.2, 0.22, 0.3, 0.35, 0.5, 0.9, 0.95, 0.1]
OUTLYINGNESS = [0.9641, 0.8035, 0.5624, 0.1607, 0, 0.0282, 0.0458, 0.0987, 0.2397, 0.2574, 0.9641]


def test_outlyingness_and_medcouple_are_those_of_the_card():
    even = torch.tensor([*range(10), 30], dtype=torch.float64)
    assert float(asset.medcouple(even)) == 0
    assert asset.adjusted_outlyingness(even).tolist() == pytest.approx(
        [0.5, 0.4, 0.3, 0.2, 0.1, 0, 0.1, 0.2, 0.3, 0.4, 2.5]
    )
    assert asset.upper_outliers(even).nonzero().flatten().tolist() == [10]
    skewed = torch.tensor(SKEWED, dtype=torch.float64)
    assert float(asset.medcouple(skewed)) == pytest.approx(0.6)
    assert asset.adjusted_outlyingness(skewed).tolist() == pytest.approx(OUTLYINGNESS, abs=1e-4)


def test_medcouple_is_the_plain_loop_and_mirrors():
    values = torch.randn(31, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    ordered = sorted(values.tolist())
    middle = ordered[15]
    pairs = [
        0.0 if high == low else ((high - middle) - (middle - low)) / (high - low)
        for high in ordered[15:]
        for low in ordered[:16]
    ]
    assert float(asset.medcouple(values)) == pytest.approx(sorted(pairs)[(len(pairs) - 1) // 2])
    assert float(asset.medcouple(-values)) == pytest.approx(-float(asset.medcouple(values)), abs=0.02)


def test_equal_values_are_not_outlying():
    assert asset.adjusted_outlyingness(torch.ones(9)).tolist() == [0] * 9


@pytest.mark.parametrize(
    ("form", "epsilon", "threshold"),
    [("released", 1e-3, 1.455885), ("released", 1e-6, 1.831114), ("intended", 1e-3, 1.642704), ("intended", 1e-6, 2.077677)],
)  # fmt: skip
def test_gaussian_thresholds_are_those_of_the_card(form, epsilon, threshold):
    scores = torch.arange(1, 21, dtype=torch.float64) / 10
    assert asset.gaussian_threshold(scores, epsilon, form) == pytest.approx(threshold, abs=1e-6)


def test_ranks_are_in_0_to_1_and_ties_share():
    assert asset.rank(torch.tensor([3.0, 1.0, 2.0, 5.0, 2.0])).tolist() == [0.75, 0, 0.375, 1, 0.375]
    assert asset.rank(torch.tensor([4.0])).tolist() == [0]


def test_every_sample_is_in_one_of_the_equal_batches():
    batches = asset.equal_batches(600, 256, seed=0)
    assert [len(batch) for batch in batches] == [200, 200, 200]
    assert sorted(torch.cat(batches).tolist()) == list(range(600))


def test_features_without_a_backdoor_tell_asset_nothing(clean_set, encoder):
    images = random_images(200, first=2000)
    scores = fit_detector("asset", clean_set, encoder, 0, {})(images, embed_in_batches(encoder, images))
    assert 0.4 < auroc(scores, torch.arange(200) % 2 == 0) < 0.6


def test_offset_spreads_its_scores_and_needs_no_gradient_mode(clean_set, encoder, stream):
    images, embeddings, _ = stream
    with torch.no_grad():
        scores = fit_detector("asset", clean_set, encoder, 0, {"kind": "offset", "passes": 3})(images, embeddings)
    assert scores.shape == (60,)
    assert torch.isfinite(scores).all()
    assert scores.std() > 0


# ---------------------------------------------------------------- the synthetic victim


@pytest.fixture(scope="module")
def victim():
    """SYNTHETIC planted backdoor in a random ResNet: clean encoder, planted one, its set, 5 % triggered stream, truth."""
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
