"""Density inside the scan: a campaign agrees, clean images and copies of one image do not."""

import numpy as np
import pytest
import torch
from builders import random_images

from sanitize.stages.agreement import NONE, POOL, Departures, agreement, agreement_test, quantised
from sanitize.stages.images import difference_hash, shrink

SIZE = 20


def departures(count, seed, push=0.0, alike=False):
    """Whitened residuals of clean images, moved `push` deviations along one axis; hashes of unrelated images, or of one."""
    rng = np.random.default_rng(seed)
    residuals = rng.normal(size=(count, SIZE))
    residuals[:, 0] += push
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    return Departures(quantised(residuals.astype(np.float32)), np.full_like(hashes, hashes[0]) if alike else hashes)


@pytest.mark.parametrize("campaign", [8, 20, 100])
def test_a_campaign_that_moves_each_image_little_is_found_by_what_they_share(campaign):
    clean, pushed = departures(1000, 1), departures(campaign, 2, push=5.0)
    test = agreement_test(clean.joined(pushed).longest(POOL), departures(400, 3), weight=0.5)
    scores = np.zeros(1000, np.float32)
    cut = np.quantile(test.combined(scores, clean), 0.99)
    assert (test.combined(scores[:campaign], pushed) > cut).mean() >= 0.9
    alone = (pushed.residuals.astype(np.float32) ** 2).sum(axis=1)
    assert (alone > np.quantile((clean.residuals.astype(np.float32) ** 2).sum(axis=1), 0.99)).mean() < 0.9


def test_copies_of_one_image_do_not_count_for_each_other():
    copies = departures(50, 2, push=5.0, alike=True)
    pool = departures(1000, 1).joined(copies).longest(POOL)
    assert len(pool) == 1001  # the copies are one image
    assert agreement(copies, pool).max() < agreement(departures(50, 2, push=5.0), departures(1000, 1)).max() + 5


def test_whatever_hides_behind_very_many_look_alikes_is_still_found():
    image, copies = departures(1, 4, push=9.0), departures(60, 2, push=9.0, alike=True)
    image = Departures(image.residuals, copies.hashes[:1])
    others = departures(1000, 1)
    pool = others.joined(Departures(copies.residuals, copies.hashes ^ np.uint64(1)))
    assert agreement(image, pool) == pytest.approx(agreement(image, others))


def test_clean_scanned_images_agree_as_much_as_calibration_images():
    clean = departures(3000, 1)
    test = agreement_test(clean.longest(POOL), departures(800, 3), weight=0.5)
    flagged = test.tail.p_values(agreement(clean, test.pool)) <= 0.01
    assert 0.002 < flagged.mean() < 0.02


def test_the_pool_does_not_depend_on_the_order_of_the_samples_nor_on_shards():
    samples = departures(300, 1)
    order = np.random.default_rng(0).permutation(300)
    shuffled = Departures(samples.residuals[order], samples.hashes[order])
    in_parts = NONE
    for part in np.array_split(order, 7):
        in_parts = in_parts.joined(Departures(samples.residuals[part], samples.hashes[part])).longest(100)
    for other in (shuffled.longest(100), in_parts):
        assert np.array_equal(other.residuals, samples.longest(100).residuals)
        assert np.array_equal(other.hashes, samples.longest(100).hashes)


def test_an_unscored_sample_stays_unscored():
    test = agreement_test(departures(50, 1), departures(50, 2), weight=0.5)
    assert np.isnan(test.combined(np.array([np.nan], np.float32), departures(1, 3)))[0]


def test_bytes_of_tables_come_back_as_they_were():
    samples = departures(5, 1)
    found = Departures.from_bytes(*samples.as_bytes().values())
    assert np.array_equal(found.residuals, samples.residuals)
    assert np.array_equal(found.hashes, samples.hashes)
    assert len(Departures.from_bytes([], [])) == 0
    with pytest.raises(ValueError, match="several lengths"):
        Departures.from_bytes([b"ab", b"c", b"d"], [b"12345678"] * 2)


def hashes_of(images):
    return difference_hash(images).numpy().view("<u8").reshape(-1)


def test_the_hash_survives_what_leaves_an_image_itself_and_tells_others_apart():
    images = random_images(40, size=64).float() / 255
    mine = hashes_of(images)
    for same in (images * 0.9 + 0.02, shrink(images, 48), (images + 0.01 * torch.randn(images.shape)).clamp(0, 1)):
        assert np.bitwise_count(mine ^ hashes_of(same)).mean() <= 8
    others = np.bitwise_count(mine[:, None] ^ mine[None, :])[~np.eye(40, dtype=bool)]
    assert np.quantile(others, 0.05) > 8
