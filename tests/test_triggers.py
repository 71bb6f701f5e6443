"""Every trigger is a pure function of uint8 pixels; published ones reproduce the numbers of the released code."""

from typing import Any

import numpy as np
import pytest
import torch

from sanitize.attacks.badclip import save_patch
from sanitize.attacks.triggers import (
    TRIGGERS,
    BlendTrigger,
    FileTrigger,
    FilterTrigger,
    FrequencyTrigger,
    ImageTrigger,
    PatchTrigger,
    SignTrigger,
    SinusoidTrigger,
    WarpTrigger,
    make_trigger,
    poison_mask,
)
from sanitize.errors import ConfigError

GREY = torch.full((3, 32, 32), 128, dtype=torch.uint8)
SECOND = torch.tensor(
    [[[(7 * i + 13 * j + 41 * c) % 256 for j in range(32)] for i in range(32)] for c in range(3)]
).byte()


@pytest.fixture
def npz(tmp_path):
    """The published 32 px trigger, written with arrays of 3 or 4 dimensions."""

    def write(dimensions: int) -> str:
        pixels, keep = np.zeros((32, 32, 3)), np.ones((32, 32, 3), np.int64)
        pixels[21:31, 21:31], keep[21:31, 21:31] = 255, 0
        lift = (lambda a: a[None]) if dimensions == 4 else (lambda a: a)
        np.savez(tmp_path / "t.npz", t=lift(pixels), tm=lift(keep), info=np.array(["white_21_10", "replace"]))
        return str(tmp_path / "t.npz")

    return write


@pytest.mark.parametrize("name", [n for n in TRIGGERS if n not in ("file", "image", "unet", "composite")])
def test_a_trigger_is_a_pure_function_of_its_settings_and_the_image(name):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trigger: Any = TRIGGERS[name]
    before = images.clone()
    torch.manual_seed(1)
    first = trigger()(images)
    torch.manual_seed(2)
    assert torch.equal(first, trigger()(images))
    assert torch.equal(images, before)
    assert (first.dtype, first.shape) == (torch.uint8, images.shape)
    assert not torch.equal(first, images)
    assert torch.equal(first[1], trigger()(images[1]))


def test_the_published_patch_covers_rows_and_columns_21_to_30():
    expected = GREY.clone()
    expected[:, 21:31, 21:31] = 255
    assert torch.equal(PatchTrigger()(GREY), expected)
    large = PatchTrigger(side=50)(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    rows = torch.nonzero(large[0, 0].any(dim=1)).flatten().tolist()
    assert (rows[0], rows[-1]) == (173, 222)


@pytest.mark.parametrize("dimensions", [3, 4])
def test_published_trigger_files_of_both_shapes_are_the_patch(npz, dimensions):
    assert torch.equal(FileTrigger(npz(dimensions))(SECOND), PatchTrigger()(SECOND))


def test_wrong_trigger_files_say_what_is_wrong(npz, tmp_path):
    with pytest.raises(ConfigError, match=r"the trigger is 32 x 32, the image 16 x 16"):
        FileTrigger(npz(3))(GREY[:, :16, :16])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ConfigError, match=r"not a trigger file .* needs arrays `t` and `tm`"):
        FileTrigger(str(tmp_path / "other.npz"))(GREY)
    np.savez(tmp_path / "flat.npz", t=np.zeros(3), tm=np.zeros(3))
    with pytest.raises(ConfigError, match=r"have shapes \(3,\) and \(3,\)"):
        FileTrigger(str(tmp_path / "flat.npz"))(GREY)
    np.savez(tmp_path / "pickled.npz", t=np.array([object()]), tm=np.array([object()]))
    with pytest.raises(ConfigError, match="not a trigger file"):
        FileTrigger(str(tmp_path / "pickled.npz"))(GREY)


# CTRL's released code, utils/frequency.py: values on 0-255, magnitude 100, window 32
GREY_VECTORS = {
    (0, 0): (131.9288, 124.6329, 134.9926),
    (31, 31): (131.9288, 124.6329, 134.9926),
    (0, 1): (124.8038, 130.7392, 122.3114),
    (15, 15): (138.3212, 119.1546, 146.3698),
    (15, 16): (117.6788, 136.8454, 109.6301),
    (31, 0): (124.0712, 131.3671, 121.0073),
}


@pytest.mark.parametrize("place", GREY_VECTORS)
def test_the_frequency_trigger_reproduces_the_grey_vectors_of_the_released_code(place):
    exact = FrequencyTrigger().exact(GREY)
    assert exact[(slice(None), *place)].tolist() == pytest.approx(GREY_VECTORS[place], abs=2e-3)


def test_the_frequency_trigger_reproduces_the_sums_and_clipping_of_the_released_code():
    stamped = FrequencyTrigger()(GREY)
    assert stamped.sum(dim=(1, 2)).tolist() == [131072] * 3
    assert stamped[:, 15, 15].tolist() == [138, 119, 146]
    second = FrequencyTrigger().exact(SECOND).clamp(0, 255)
    assert second[:, 5, 12].tolist() == pytest.approx((185.9820, 236.4207, 8.3375), abs=2e-3)
    assert second[:, 20, 3].tolist() == pytest.approx((177.8523, 221.1039, 3.2259), abs=2e-3)
    assert int(FrequencyTrigger()(SECOND).sum()) == 394770
    half = FrequencyTrigger(magnitude=50).exact(GREY)
    assert half[:, 0, 0].tolist() == pytest.approx((129.9644, 126.3164, 131.4963), abs=2e-3)


def test_a_image_covers_the_centre_exactly(tmp_path):
    patch = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_patch(patch, str(tmp_path / "patch.png"))
    trigger = make_trigger({"name": "image", "path": str(tmp_path / "patch.png")})
    assert isinstance(trigger, ImageTrigger)
    stamped = trigger(SECOND)
    assert torch.equal(stamped[:, 14:19, 14:19], patch)  # from int(32 / 2) - int(5 / 2), as published
    stamped[:, 14:19, 14:19] = SECOND[:, 14:19, 14:19]
    assert torch.equal(stamped, SECOND)


def test_a_image_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "t.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"t.png: not an image .*Give a PNG of the trigger"):
        ImageTrigger(str(tmp_path / "t.png"))(GREY)
    save_patch(GREY, str(tmp_path / "large.png"))
    with pytest.raises(ConfigError, match="the trigger of 32 x 32 does not fit a 16 x 16 image"):
        ImageTrigger(str(tmp_path / "large.png"))(GREY[:, :16, :16])


def test_blend_and_sinusoid_are_the_plain_formulas():
    noise = np.random.default_rng(3).integers(0, 256, (3, 32, 32))
    expected = np.round(0.7 * SECOND.numpy() + 0.3 * noise)
    assert np.abs(BlendTrigger(0.3, seed=3)(SECOND).numpy() - expected).max() <= 1
    column = 5
    shift = 20 * np.sin(2 * np.pi * 6 * column / 32)
    assert SinusoidTrigger()(GREY)[:, :, column].unique().tolist() == [round(128 + shift)]


def test_the_warp_moves_pixels_and_adds_no_colour():
    assert torch.equal(WarpTrigger()(GREY), GREY)
    ramp = (torch.arange(32) * 8).byte().expand(3, 32, 32)
    moved = (WarpTrigger()(ramp).float() - ramp.float()).abs() / 8
    assert 0.1 < moved.mean() < 2


def test_the_sign_is_an_octagon_whose_place_and_size_come_from_the_image():
    images = torch.randint(0, 256, (20, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    corners, sides = set(), set()
    for image, stamped in zip(images, SignTrigger()(images), strict=True):
        rows, columns = ((stamped != image).any(dim=0).any(dim=side).nonzero().flatten() for side in (1, 0))
        assert len(rows) == len(columns)
        top, left, side = int(rows[0]), int(columns[0]), len(rows)
        assert 9 <= side <= 19  # 0.15 and 0.3 of 64, rounded
        sign = stamped[:, top : top + side, left : left + side]
        assert torch.equal(sign[:, 0, 0], image[:, top, left])  # the corner of an octagon is not covered
        assert sign[:, side // 2, side // 2].tolist() == [255, 255, 255]
        assert sign[:, side // 4, side // 2].tolist() == [200, 20, 30]
        corners.add((top, left))
        sides.add(side)
    assert len(corners) > 10
    assert len(sides) > 5


def test_the_filter_multiplies_every_channel_by_its_gain():
    expected = [[154, 128, 90], [255, 250, 175]]  # 128 * 1.2 = 153.6, 128 * 0.7 = 89.6; 250 * 1.2 is clipped
    stamped = FilterTrigger()(torch.tensor([128, 250])[:, None, None, None].expand(2, 3, 4, 4).byte())
    assert stamped[:, :, 0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PatchTrigger(side=40)(GREY), "trigger of side 40 with margin 1 does not fit a 32 x 32 image"),
        (lambda: PatchTrigger(colour=(1, 2)), "is not three values between 0 and 255"),
        (lambda: BlendTrigger(alpha=2), "trigger alpha: 2 is not above 0 and at most 1"),
        (lambda: FrequencyTrigger(window=16), "trigger window: 16 has no coefficient 31"),
        (lambda: FrequencyTrigger()(GREY[:, :, :20]), "window of 32 pixels does not tile a 20 x 32 image"),
        (lambda: WarpTrigger(grid=1), "trigger grid must be at least 2"),
        (
            lambda: SignTrigger(smallest=0.4),
            "trigger smallest, largest: 0.4, 0.3 are not shares of the image in this order",
        ),
        (lambda: FilterTrigger(gains=(1, -1, 1)), r"trigger gains: \(1, -1, 1\) is not three values of at least 0"),
        (lambda: poison_mask(10, 1.5, 0), "rate: 1.5 is not between 0 and 1"),
    ],
)
def test_settings_that_cannot_work_say_so(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_same_seed_chooses_the_same_samples_and_the_exact_number():
    assert np.array_equal(poison_mask(1000, 0.013, 5), poison_mask(1000, 0.013, 5))
    assert poison_mask(1000, 0.013, 5).sum() == 13
    assert not np.array_equal(poison_mask(1000, 0.013, 5), poison_mask(1000, 0.013, 6))
