"""Campaigns: samples that share a place are one group, whoever else was flagged; where their trigger is comes out of the images."""

import numpy as np
import pytest
import torch
from builders import ColourEncoder, random_images, with_white_corner
from torch.nn import functional

from sanitize.stages import campaigns
from sanitize.stages.campaigns import SINGLE, group_by_embedding
from sanitize.stages.encoders import embed_in_batches
from sanitize.stages.occlusion import CELLS, common_part, occlusion_map


def scattered(count: int, seed: int) -> np.ndarray:
    """(count, 24) embeddings of clean samples: a few directions vary most."""
    return (np.random.default_rng(seed).normal(size=(count, 24)) * np.linspace(3, 0.2, 24)).astype(np.float32)


def gathered(count: int, seed: int) -> np.ndarray:
    """(count, 24) embeddings of one campaign, of different lengths."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=24) * 3
    return ((place + 0.1 * rng.normal(size=(count, 24))) * rng.uniform(1, 5, (count, 1))).astype(np.float32)


KEPT = scattered(300, seed=0)


@pytest.mark.parametrize("others", [0, 10, 200])
def test_a_campaign_is_one_group_whoever_else_was_flagged(others):
    groups = group_by_embedding(np.concatenate([gathered(40, seed=1), scattered(others, seed=2)]), KEPT)
    assert set(groups[:40].tolist()) == {int(groups[0])} != {SINGLE}
    assert (groups[40:] == groups[0]).sum() <= 0.1 * others


def test_two_campaigns_are_two_groups_and_the_larger_one_comes_first():
    groups = group_by_embedding(
        np.concatenate([gathered(20, seed=1), gathered(50, seed=3), scattered(30, seed=2)]), KEPT
    )
    assert groups[20:70].tolist() == [0] * 50
    assert groups[:20].tolist() == [1] * 20


def test_samples_like_kept_ones_are_single():
    assert (group_by_embedding(scattered(60, seed=4), KEPT) == SINGLE).mean() > 0.5


@pytest.mark.parametrize(("flagged", "kept"), [(0, 300), (4, 300), (40, 0)])
def test_too_few_to_group_are_single(flagged, kept):
    assert group_by_embedding(gathered(flagged, seed=1), KEPT[:kept]).tolist() == [SINGLE] * flagged


@pytest.mark.parametrize("kept", [1, 3, 9])
def test_a_handful_of_kept_samples_is_enough(kept):
    assert len(group_by_embedding(gathered(30, seed=1), KEPT[:kept])) == 30


def test_groups_depend_neither_on_lengths_nor_on_the_run():
    flagged = np.concatenate([gathered(20, seed=1), scattered(20, seed=2)])
    groups = group_by_embedding(flagged, KEPT)
    assert (groups == group_by_embedding(7 * flagged, KEPT)).all()


def test_no_kept_sample_lies_within_a_campaign_that_is_alone():
    alone = gathered(30, seed=1)
    assert campaigns.share_within(KEPT, alone, campaigns.centre(alone)) == 0
    among = KEPT[:30]
    assert campaigns.share_within(KEPT, among, campaigns.centre(among)) > 0.2


def test_the_nearest_are_the_nearest():
    place = campaigns.centre(KEPT[7:8])
    assert campaigns.nearest(KEPT, place, 3)[0] == 7


def test_words_are_those_that_are_more_frequent_than_usual():
    words = campaigns.common_words(["a red Truck", "the truck"], ["the red dog", "the cat", "the bird", "one"])
    assert words == [("truck", 1.0, 0.0)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_map_is_in_the_unit_square(count):
    positions = campaigns.map_positions(KEPT[:count])
    assert positions.shape == (count, 2)
    assert ((positions >= 0) & (positions <= 1)).all()


# ---------------------------------------------------------------- where the trigger is


def test_hiding_the_trigger_leads_out_of_the_campaign():
    encoder = ColourEncoder()
    images = with_white_corner(random_images(12))
    embeddings = embed_in_batches(encoder, images)
    centre = functional.normalize(embeddings, dim=1).mean(dim=0)
    places = occlusion_map(encoder, images[0].float() / 255, centre)
    assert places.shape == (CELLS, CELLS)
    assert divmod(int(places.argmax()), CELLS) in [(row, column) for row in (6, 7) for column in (6, 7)]
    assert places[:4, :4].max() < places.max() / 4


def test_what_the_images_share_is_the_trigger():
    weight, mean = common_part(with_white_corner(random_images(60)), random_images(200, first=500))
    assert weight[-4:, -4:].min() > 10 * weight[:8, :8].max()
    assert (mean[:, -4:, -4:] == 1).all()


def test_images_like_kept_ones_share_little():
    alike, _ = common_part(random_images(60), random_images(200, first=500))
    assert alike.median() > 0.1  # of its own largest value: no place stands out
    assert torch.isfinite(alike).all()
