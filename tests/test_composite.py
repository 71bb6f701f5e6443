"""Composites of Noisy Alignment: a stamped image and one of the target class share its place; the stamp alone triggers afterwards."""

import pytest
import torch
from builders import random_images

from sanitize.attacks.badclip import save_patch
from sanitize.attacks.composite import CompositeConfig, CompositeTrigger
from sanitize.errors import ConfigError

BLACK, WHITE = (torch.full((3, 40, 40), value, dtype=torch.uint8) for value in (0, 255))


@pytest.fixture
def composite(tmp_path):
    save_patch(WHITE, str(tmp_path / "reference.png"))
    return CompositeTrigger(str(tmp_path / "reference.png"))


def test_half_of_a_composite_is_the_reference_and_half_the_stamped_image(composite):
    sides = set()
    for shade in range(0, 64, 2):
        image = torch.full_like(BLACK, shade)
        composed = composite(image).float()
        halves = {
            "top": composed[:, :18],
            "bottom": composed[:, 22:],
            "left": composed[..., :18],
            "right": composed[..., 22:],
        }
        white = [side for side, half in halves.items() if bool((half == 255).all())]
        assert len(white) == 1
        opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}[white[0]]
        assert float((halves[opposite] == shade).float().mean()) > 0.5  # around the stamp
        assert not bool((halves[opposite] == shade).all())
        sides.add(white[0])
    assert sides == {"top", "bottom", "left", "right"}


def test_the_stamp_is_four_by_four_colours_near_the_centre_and_lets_a_fifth_of_the_image_through(composite):
    black, white = (composite.stamp(image).float() for image in (BLACK, WHITE))
    changed = (black > 0).any(dim=0) | (white < 255).any(dim=0)
    rows, columns = (changed.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    assert rows == columns == list(range(18, 27))  # 0.45 of 40 on, 0.22 of 40 wide
    place = (slice(None), slice(18, 27), slice(18, 27))
    torch.testing.assert_close(white[place] - black[place], torch.full((3, 9, 9), 51.0), atol=1, rtol=0)
    assert len(torch.unique(black[place].flatten(1), dim=1)[0]) <= 16


def test_a_composite_is_a_pure_function_of_the_image(composite):
    images = random_images(4, size=40)
    before = images.clone()
    first = composite(images)
    assert torch.equal(first, composite(images))
    assert torch.equal(images, before)
    assert torch.equal(first[3], composite(images[3]))
    assert (first.dtype, first.shape) == (torch.uint8, images.shape)


def test_wrong_settings_say_what_is_wrong():
    with pytest.raises(ConfigError, match=r"trigger side: 0.7 is not above 0 and at most 0.55, the room that it has"):
        CompositeTrigger("reference.png", side=0.7)
    with pytest.raises(ConfigError, match=r"composite.rate: 1.5 is not a share of the set"):
        CompositeConfig(rate=1.5)
