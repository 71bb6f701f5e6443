import json

import numpy as np
import pytest
import torch
from builders import HOSTILE, encoded, random_image
from PIL import Image

from sanitize.records import Sample
from sanitize.stages.images import decode_image, decode_sample, to_batch

CPU = torch.device("cpu")


def image_cases():
    entries = json.loads((HOSTILE / "manifest.json").read_text())
    return [pytest.param(e, id=e["file"]) for e in entries if e["file"].startswith("images/")]


@pytest.mark.parametrize("entry", image_cases())
def test_every_hostile_image_decodes_or_gives_a_reason(entry):
    pixels, width, height, reason = decode_image((HOSTILE / entry["file"]).read_bytes())
    if entry["expect"] == "image":
        assert (pixels.dtype, tuple(pixels.shape), reason) == (torch.uint8, (3, height, width), "")
    elif entry["expect"] == "error":
        assert pixels is None
        assert reason
    else:
        assert (pixels is None) == bool(reason)


def test_the_pixel_limit_is_checked_before_decoding():
    bomb = encoded(np.zeros((2000, 2000), np.uint8))
    assert decode_image(bomb, max_pixels=1_000_000) == (None, 2000, 2000, "2000 x 2000 pixels, the limit is 1000000")


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "gray.png")
    pixels, *_ = decode_image((tmp_path / "gray.png").read_bytes())
    assert pixels[0, 0].tolist() == [0, 1, 128, 255]


def test_gray_becomes_three_equal_channels_and_png_pixels_are_exact():
    image = random_image(3)
    assert torch.equal(decode_image(encoded(image))[0].permute(1, 2, 0), torch.from_numpy(image.copy()))
    gray = decode_image(encoded(image[:, :, 0]))[0]
    assert torch.equal(gray[0], gray[2])


def test_a_sample_without_a_usable_image_keeps_its_reason():
    broken = decode_sample(Sample(7, "k", (), image=b"not an image"))
    assert (broken.index, broken.status, broken.pixels) == (7, "undecodable", None)
    assert "UnidentifiedImageError" in broken.reason
    assert len(broken.sha256) == 64
    missing = decode_sample(Sample(8, "k", (), status="no_image", reason="why"))
    assert (missing.status, missing.reason, missing.sha256) == ("no_image", "why", "")


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_an_image_does_not_depend_on_the_batch_it_is_resized_with(resize):
    shapes = [(20, 30), (16, 16), (20, 30), (7, 300)]
    decoded = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    together = to_batch(decoded, 16, resize, CPU)
    assert together.shape == (4, 3, 16, 16)
    for number, image in enumerate(decoded):
        assert torch.equal(together[number], to_batch([image], 16, resize, CPU)[0])


def test_images_of_the_right_size_are_not_touched():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert torch.equal((to_batch([image], 16, "squash", CPU)[0] * 255).round().byte(), image)


def test_squash_shows_the_border_that_crop_hides():
    image = torch.zeros(3, 16, 64, dtype=torch.uint8)
    image[:, :, -8:] = 255
    assert to_batch([image], 16, "squash", CPU).max() > 0.9
    assert to_batch([image], 16, "crop", CPU).max() == 0
