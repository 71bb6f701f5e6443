"""DECREE: its formulas against plain loops, the controller's traces, inversion of planted encoders, the derived score."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from builders import SIZE, random_image
from torch import Tensor, nn
from torch.nn import functional

from sanitize.config_loading import from_mapping
from sanitize.detectors import decree_score
from sanitize.detectors.decree import inversion as decree
from sanitize.detectors.decree.config import DecreeConfig, recommended
from sanitize.detectors.decree.inversion import Inversion, InvertedTrigger, Penalty
from sanitize.detectors.reference_set import ReferenceSet
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.encoders import embed_in_batches

QUICK = DecreeConfig(pool=96, batch_size=32, epochs=150, patience=40, restarts=1)
BOX = (slice(None), slice(None), slice(SIZE - 4, SIZE), slice(SIZE - 4, SIZE))  # 4x4 pixels at the lower right


class SyntheticEncoder(nn.Module):
    """SYNTHETIC, no training: a random linear map of coarse colours; `strength` > 0 plants a collapse when BOX is white."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.map = nn.Linear(3 * 8 * 8, 24)
        self.map.weight = nn.Parameter(torch.randn(24, 192, generator=generator) / 8)
        self.map.bias = nn.Parameter(torch.zeros(24))
        self.target, self.strength = torch.randn(24, generator=generator), strength

    def forward(self, images: Tensor) -> Tensor:
        coarse = functional.avg_pool2d(images - 0.5, 2).flatten(1)
        whiteness = images[BOX].mean(dim=(1, 2, 3))[:, None]
        return self.map(coarse) + self.strength * (10 * whiteness - 8).sigmoid() * self.target


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(96, 3, 16, 16) uint8."""
    return torch.stack([torch.from_numpy(random_image(seed).copy()).permute(2, 0, 1) for seed in range(96)])


@pytest.fixture(scope="module")
def clean(images) -> Inversion:
    return decree.invert(images, SyntheticEncoder(0), QUICK)


@pytest.fixture(scope="module")
def trojaned(images) -> Inversion:
    return decree.invert(images, SyntheticEncoder(10), QUICK)


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("count", [2, 3, 17])
def test_the_closed_form_is_the_mean_cosine_of_all_pairs(count):
    embeddings = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
    pairs = itertools.permutations(embeddings.double(), 2)
    expected = sum(float(functional.cosine_similarity(a, b, dim=0)) for a, b in pairs) / (count * (count - 1))
    assert float(decree.mean_pairwise_cosine(embeddings)) == pytest.approx(expected, abs=1e-9)


def test_embeddings_that_are_all_zero_do_not_count_as_collapsed():
    assert float(decree.mean_pairwise_cosine(torch.zeros(4, 3))) == 0


@pytest.mark.parametrize("logit", [-30.0, -1.3, 0.0, 0.4, 30.0])
def test_decoding_is_the_published_tanh(logit):
    expected = min(max(math.tanh(logit) / (2 - 1e-7) + 0.5, 0), 1)
    assert float(decree.from_logits(torch.tensor(logit, dtype=torch.float64))) == pytest.approx(expected, abs=1e-12)


def test_a_random_start_is_decoded_to_itself_and_is_finite_at_its_ends():
    values = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.isfinite(decree.to_logits(values)).all()
    assert decree.from_logits(decree.to_logits(values)) == pytest.approx(values.double(), abs=1e-6)


def test_stamping_mixes_raw_pixels(images):
    mask, pattern = torch.rand(1, SIZE, SIZE), torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    stamped = decree.stamp(images[:2], mask, pattern)
    for b, c, y, x in itertools.product(range(2), range(3), (0, 7), (3, 15)):
        m, p, value = float(mask[0, y, x]), float(pattern[c, y, x]), float(images[b, c, y, x])
        assert float(stamped[b, c, y, x]) == pytest.approx((1 - m) * value + m * p, abs=1e-3)


def test_an_empty_mask_changes_nothing_and_a_full_one_shows_the_pattern(images):
    pattern = torch.full((3, SIZE, SIZE), 200, dtype=torch.uint8)
    assert torch.equal(decree.stamp(images, torch.zeros(1, SIZE, SIZE), pattern), images.float())
    assert (decree.stamp(images, torch.ones(1, SIZE, SIZE), pattern) == 200).all()


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.5), (29, 0.5), (30, 0.1), (49, 0.1), (50, 0.05), (79, 0.05)])
def test_the_learning_rate_falls_at_the_milestones(epoch, rate):
    assert decree.learning_rate(DecreeConfig(), epoch) == rate


def test_large_images_get_the_published_schedule_and_small_ones_starts_from_blocks():
    assert recommended(32) == {"restarts": 1, "blocks": 3}
    config = from_mapping(DecreeConfig, recommended(224), "settings")
    assert (config.epochs, config.milestones, config.patience, config.penalty_floor) == (1000, (200, 500), 35, 1e-7)


def test_sizes_follow_the_convention():
    trigger = InvertedTrigger(torch.full((1, 4, 5), 0.5), torch.zeros(3, 4, 5, dtype=torch.uint8), 1)
    assert (trigger.l1, trigger.p_l1, trigger.pixels) == (30, 0.5, 10)


# ---------------------------------------------------------------- lambda


def penalty_after(outcomes: str, **changes: Any) -> float:
    penalty = Penalty(DecreeConfig(**changes))
    for outcome in outcomes:
        penalty.update(outcome == "s")
    return penalty.value


@pytest.mark.parametrize(
    ("outcomes", "factor"),
    [
        ("s" * 5, 1),
        ("s" * 6, 5),
        ("s" * 11, 5),  # the count began again
        ("s" * 12, 25),
        ("f" * 5, 1),
        ("f" * 6, 1 / 5),
        ("f" * 12, 1 / 25),
        ("sssssfsssss", 1),  # a failure ends the row of successes
        ("fffffsfffff", 1),
        ("f" * 6 + "s" * 6, 1),
    ],
)
def test_lambda_moves_on_the_sixth_equal_outcome_in_a_row(outcomes, factor):
    assert penalty_after(outcomes) == pytest.approx(1e-3 * factor)


def test_lambda_ends_at_most_one_factor_below_its_floor():
    assert penalty_after("f" * 600) == pytest.approx(1e-3 / 5**3)  # 4e-5 is above the floor 1e-5, 8e-6 below
    assert penalty_after("f" * 600, penalty_floor=1e-7) == pytest.approx(1e-3 / 5**6)


def test_lambda_is_not_multiplied_at_its_ceiling():
    assert penalty_after("s" * 600, penalty_ceiling=0.01) == pytest.approx(1e-3 * 25)


# ---------------------------------------------------------------- inversion


def test_a_planted_encoder_needs_a_smaller_trigger_than_a_clean_one(clean, trojaned):
    assert trojaned.best.p_l1 < 0.1
    assert clean.best is None or clean.best.p_l1 > trojaned.best.p_l1 + 0.08


def test_the_reported_cosine_is_that_of_the_whole_stamped_pool(images, trojaned):
    best = trojaned.best
    stamped = decree.stamp(images[: QUICK.pool], best.mask, best.pattern)
    cosine = float(decree.mean_pairwise_cosine(embed_in_batches(SyntheticEncoder(10), stamped)))
    assert best.cosine == pytest.approx(cosine, abs=1e-6)
    assert cosine > 0.99
    assert (best.mask.shape, best.pattern.shape, best.pattern.dtype) == ((1, SIZE, SIZE), (3, SIZE, SIZE), torch.uint8)
    assert float(best.mask.min()) >= 0 and float(best.mask.max()) <= 1


def test_a_mask_that_holds_on_one_batch_only_is_not_accepted(images):
    small, large = (
        InvertedTrigger(torch.full((1, SIZE, SIZE), v), torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8), 1)
        for v in (0.0, 1.0)
    )
    accepted = decree._accepted([large, small], None, images, SyntheticEncoder(0), 0.99)
    assert (accepted.l1, accepted.cosine > 0.99) == (large.l1, True)
    assert decree._accepted([small], accepted, images, SyntheticEncoder(0), 0.99) is accepted


def test_the_same_seed_gives_the_same_size_and_another_start_another(images, trojaned):
    encoder = SyntheticEncoder(10)
    again = decree.invert(images, encoder, QUICK)
    assert (again.best.l1, again.restarts[0].steps) == (trojaned.best.l1, trojaned.restarts[0].steps)
    two = decree.invert(images, encoder, dataclasses.replace(QUICK, restarts=2))
    sizes = [restart.trigger.l1 for restart in two.restarts]
    assert sizes[0] == trojaned.best.l1 != sizes[1]
    assert two.best.l1 == min(sizes)
    assert two.spread == pytest.approx(max(sizes) - min(sizes))


def test_blocks_are_starts_that_cover_the_image_and_overlap_by_half(images):
    masks = torch.cat([decree.block_mask((SIZE, SIZE), 3, number) for number in range(9)]) > 0.5
    assert bool(masks.any(dim=0).all())
    assert set(masks.sum(dim=(1, 2)).tolist()) == {(SIZE // 2) ** 2}
    beside = int((masks[0] & masks[1]).sum()), int((masks[0] & masks[2]).sum())
    assert beside == (SIZE**2 // 8, 0)
    with_blocks = decree.invert(images, SyntheticEncoder(10), dataclasses.replace(QUICK, epochs=2, blocks=2))
    assert len(with_blocks.restarts) == 5
    alone = decree.invert(images, SyntheticEncoder(10), dataclasses.replace(QUICK, epochs=2))
    assert [r.steps for r in with_blocks.restarts[:1]] == [r.steps for r in alone.restarts]
    with pytest.raises(ConfigError, match="blocks: -1 is negative"):
        DecreeConfig(blocks=-1)


def test_the_encoder_is_left_as_it_was(images):
    encoder = SyntheticEncoder(10)
    before = encoder.map.weight.detach().clone()
    decree.invert(images, encoder, dataclasses.replace(QUICK, epochs=1))
    assert torch.equal(encoder.map.weight, before)
    assert encoder.map.weight.grad is None


def test_a_restart_stops_early_only_with_a_trigger(images, trojaned):
    assert trojaned.restarts[0].epochs < QUICK.epochs
    strict = dataclasses.replace(QUICK, epochs=3, threshold=0.999999)
    result = decree.invert(images, SyntheticEncoder(0), strict)
    assert (result.best, result.spread, result.restarts[0].epochs) == (None, 0.0, 3)


def test_progress_is_told_after_every_epoch(images):
    told = []
    config = dataclasses.replace(QUICK, epochs=2, restarts=2)
    decree.invert(images, SyntheticEncoder(0), config, lambda *arguments: told.append(arguments))
    assert [arguments[:2] for arguments in told] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_an_encoder_without_numbers_is_refused(images):
    encoder = SyntheticEncoder(0)
    encoder.map.bias.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="embeddings that are not finite numbers"):
        decree.invert(images, encoder, QUICK)


# ---------------------------------------------------------------- derived sample score


def test_the_derived_score_ranks_triggered_images_above_clean_ones(images):
    encoder = SyntheticEncoder(10)
    score = decree_score.fit(
        ReferenceSet(images, embed_in_batches(encoder, images)), encoder, 0, pool=96, batch_size=32, restarts=1
    )
    triggered = images.clone()
    triggered[BOX] = 255
    clean_scores, scores = (score(batch, embed_in_batches(encoder, batch)) for batch in (images, triggered))
    assert (scores.shape, scores.dtype, scores.device.type) == ((96,), torch.float32, "cpu")
    assert float(scores.min()) > float(clean_scores.max())


def test_without_a_trigger_every_derived_score_is_zero(images):
    encoder = SyntheticEncoder(0)
    settings = {"pool": 64, "batch_size": 32, "epochs": 1, "restarts": 1, "threshold": 0.999999}
    score = decree_score.fit(ReferenceSet(images, embed_in_batches(encoder, images)), encoder, 0, **settings)
    assert torch.equal(score(images[:3], embed_in_batches(encoder, images[:3])), torch.zeros(3))


def test_an_unknown_setting_of_the_derived_score_is_named(images):
    encoder = SyntheticEncoder(0)
    with pytest.raises(ConfigError, match="settings of decree: unknown key 'steps'. Known keys: pool, batch_size"):
        decree_score.fit(ReferenceSet(images, embed_in_batches(encoder, images)), encoder, 0, steps=3)
