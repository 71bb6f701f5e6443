"""Reading and decoding ahead: order, memory, errors."""

import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from builders import SPEC, encoded, random_image

from sanitize.records import Sample
from sanitize.stages import prefetch
from sanitize.stages.images import MAX_SCANS, decode_image
from sanitize.stages.prefetch import decode_ahead, image_batches


def samples(images):
    return [Sample(number, f"k{number}", (), image) for number, image in enumerate(images)]


def flat(side):
    return encoded(np.zeros((side, side, 3), np.uint8))


@pytest.mark.parametrize("threads", [1, 4])
def test_images_come_in_sample_order_whatever_their_size(threads):
    sides = [64, 8, 200, 8, 8, 100, 1]
    batches = list(image_batches(samples(map(flat, sides)), 3, threads))
    assert [[image.width for image in batch] for batch in batches] == [[64, 8, 200], [8, 8, 100], [1]]


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_pixels_are_decoded_ahead_than_the_limit(threads, monkeypatch):
    """Six bombs of a few bytes each are decoded one after the other."""
    monkeypatch.setattr(prefetch, "PIXELS", 1 << 20)
    bombs = samples([flat(1024)] * 6)
    tracemalloc.start()
    with_images = decode_ahead(bombs, ahead=6, threads=threads)
    next(with_images)
    time.sleep(0.3)  # the threads would go on if they could
    assert sum(1 for _ in with_images) == 5
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 3 * (1 << 20)


def test_a_batch_ends_where_it_has_enough_pixels(monkeypatch):
    monkeypatch.setattr(prefetch, "PIXELS", 2 * 64 * 64)
    batches = list(image_batches(samples([flat(64)] * 5), 10, 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_images_come_at_the_encoder_s_size_and_hold_no_more_than_that(monkeypatch):
    monkeypatch.setattr(prefetch, "PIXELS", 3 * SPEC.image_size**2)
    sides = [200, 8, 64, SPEC.image_size, 100]
    batches = list(image_batches(samples(map(flat, sides)), 10, 2, SPEC))
    assert [len(batch) for batch in batches] == [3, 2]
    found = [image for batch in batches for image in batch]
    assert [image.width for image in found] == sides  # as they are stored
    assert all(image.pixels.shape == torch.Size([3, SPEC.image_size, SPEC.image_size]) for image in found)


def test_what_a_small_image_becomes_counts_before_it_is_enlarged(monkeypatch):
    """As many are decoded ahead as have room at the encoder's size, not at their own."""
    monkeypatch.setattr(prefetch, "PIXELS", 4 * SPEC.image_size**2)
    decoded = []
    real = prefetch.resized

    def noted(*arguments):
        decoded.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(prefetch, "resized", noted)
    images = decode_ahead(samples([flat(1)] * 40), ahead=40, threads=2, spec=SPEC)
    next(images)
    time.sleep(0.3)  # the threads would go on if they could
    assert len(decoded) <= 5
    assert sum(1 for _ in images) == 39


def test_an_image_larger_than_the_limit_is_decoded_alone(monkeypatch):
    monkeypatch.setattr(prefetch, "PIXELS", 100)
    assert [len(b) for b in image_batches(samples([flat(64), flat(4), b"broken", flat(64)]), 8, 3)] == [1, 3]


def test_what_cannot_be_decoded_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(prefetch, "PIXELS", 300)
    truncated = encoded(random_image(0, 16))[:-30]
    mixed = [truncated, b"", flat(16), b"no image", truncated, flat(17)] * 5
    found = [image for batch in image_batches(samples(mixed), 4, 3) for image in batch]
    assert [image.pixels is not None for image in found] == [False, False, True, False, False, True] * 5


def test_a_consumer_that_leaves_early_leaves_no_thread(monkeypatch):
    monkeypatch.setattr(prefetch, "PIXELS", 100)
    before = threading.active_count()
    images = decode_ahead(samples([flat(64)] * 50), ahead=20, threads=3)
    next(images)
    images.close()
    assert threading.active_count() == before


def test_an_error_of_the_reader_surfaces():
    def broken():
        yield from samples([flat(8)])
        raise OSError("the device is gone")

    with pytest.raises(OSError, match="the device is gone"):
        list(image_batches(broken(), 4, 2))


def test_a_jpeg_of_a_thousand_scans_is_not_decoded():
    data = encoded(random_image(0, 64), "JPEG", progressive=True)
    assert decode_image(data)[3] == ""
    scan = data.index(b"\xff\xda")
    pixels, width, _, reason = decode_image(data[:scan] + data[scan:-2] * (MAX_SCANS + 1) + data[-2:])
    assert (pixels, width) == (None, 64)
    assert f"scans, the limit is {MAX_SCANS}" in reason
