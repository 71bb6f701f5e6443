import io
import json

import numpy as np
import pytest
import torch
from builders import HOSTILE, SPEC, encoded, random_image
from PIL import Image
from torch.nn import functional

from sanitize.records import Sample
from sanitize.stages import images
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.images import decode_image, decode_sample, resized, to_batch

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


def by_pillow(monkeypatch, data: bytes):
    with monkeypatch.context() as without:
        without.setattr(images, "_plain_jpeg", lambda *_: None)
        return decode_image(data)


def same(one, other) -> bool:
    (pixels, *rest), (others, *other_rest) = one, other
    equal = pixels is others if pixels is None or others is None else torch.equal(pixels, others)
    return equal and rest == other_rest


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_plain_jpegs_have_the_pixels_that_pillow_gives(subsampling, progressive, monkeypatch):
    for quality, size in ((30, 47), (75, 64), (95, 33)):
        jpeg = encoded(
            random_image(size, size), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive
        )
        with Image.open(io.BytesIO(jpeg)) as image:
            assert images._plain_jpeg(image, jpeg) is not None
        assert same(decode_image(jpeg), by_pillow(monkeypatch, jpeg))


def test_damaged_jpegs_end_as_pillow_ends_them(monkeypatch):
    """Bits are turned and ends cut off: decoded after all, or given up with Pillow's words."""
    rng = np.random.default_rng(0)
    decoded = 0
    for number in range(200):
        jpeg = bytearray(encoded(random_image(number, 40), "JPEG", quality=80, progressive=number % 2 == 0))
        for place in rng.integers(150, len(jpeg), 1 + number % 3):
            jpeg[place] ^= 1 << number % 8
        damaged = bytes(jpeg if number % 4 else jpeg[:-50])
        found = decode_image(damaged)
        assert same(found, by_pillow(monkeypatch, damaged))
        decoded += found[0] is not None
    assert 40 < decoded < 160


@pytest.mark.parametrize("entry", image_cases())
def test_every_hostile_image_ends_as_pillow_ends_it(entry, monkeypatch):
    data = (HOSTILE / entry["file"]).read_bytes()
    assert same(decode_image(data), by_pillow(monkeypatch, data))


def test_a_sample_without_a_usable_image_keeps_its_reason():
    broken = decode_sample(Sample(7, "k", (), image=b"not an image"))
    assert (broken.index, broken.status, broken.pixels) == (7, "undecodable", None)
    assert broken.reason == (
        "not an image in any of the formats JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF, or too damaged to tell"
    )
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


def test_on_another_device_images_arrive_in_the_same_shape_and_layout():
    pixels = [torch.from_numpy(random_image(seed, 20).copy()).permute(2, 0, 1) for seed in range(3)]
    here, there = (to_batch(pixels, 16, "squash", torch.device(name)) for name in ("cpu", "meta"))
    assert (there.shape, there.dtype, there.stride()) == (here.shape, here.dtype, here.stride())
    assert here.is_contiguous(memory_format=torch.channels_last)


def test_images_of_the_right_size_are_not_touched():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    assert torch.equal((to_batch([image], 16, "squash", CPU)[0] * 255).round().byte(), image)


@pytest.mark.parametrize("height", [20, 61, 300])
def test_bytes_are_resized_to_what_floats_would_be_but_for_rounding(height):
    pixels = torch.from_numpy(random_image(1, 300)[:height].copy()).permute(2, 0, 1)
    exact = functional.interpolate(pixels[None].float(), (64, 64), mode="bilinear", antialias=True)[0]
    found = resized(pixels, 64, "squash")
    assert found.dtype == torch.uint8
    difference = (found - exact).abs()
    assert difference.max() < 1.01  # each of two directions is rounded
    assert difference.mean() < 0.4


def test_rounding_after_resizing_hardly_moves_an_embedding():
    torch.manual_seed(0)
    encoder = Encoder(build_backbone(SPEC), SPEC).eval()
    pixels = torch.stack([torch.from_numpy(random_image(seed, 60).copy()).permute(2, 0, 1) for seed in range(16)])
    exact = functional.interpolate(pixels.float() / 255, (SPEC.image_size,) * 2, mode="bilinear", antialias=True)
    with torch.no_grad():
        ours, theirs = encoder(to_batch(list(pixels), SPEC.image_size, "squash", CPU)), encoder(exact)
    assert functional.cosine_similarity(ours, theirs).min() > 0.9999


def test_a_cropped_image_does_not_keep_the_rest_of_it_in_memory():
    wide = torch.randint(0, 256, (16, 4000, 3), dtype=torch.uint8).permute(2, 0, 1)
    square = resized(wide, 16, "crop")
    assert torch.equal(square, wide[:, :, 1992:2008])
    assert square.untyped_storage().nbytes() == 3 * 16 * 16


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (5000, 3), (1, 1), (17, 300)])
def test_images_of_any_shape_are_resized_to_what_floats_would_be_but_for_rounding(shape):
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).permute(2, 0, 1)
    exact = functional.interpolate(pixels[None].float(), (32, 32), mode="bilinear", antialias=True)[0]
    assert (resized(pixels, 32, "squash") - exact).abs().max() < 1.6


def test_squash_shows_the_border_that_crop_hides():
    image = torch.zeros(3, 16, 64, dtype=torch.uint8)
    image[:, :, -8:] = 255
    assert to_batch([image], 16, "squash", CPU).max() > 0.9
    assert to_batch([image], 16, "crop", CPU).max() == 0
