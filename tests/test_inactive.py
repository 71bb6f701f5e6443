"""INACTIVE: invisibility and colours are measured as defined, the filter learns with the encoder, and its file is a trigger."""

import numpy as np
import pytest
import torch
from builders import SPEC, random_images, random_step

from sanitize.attacks import inactive
from sanitize.attacks.badencoder import BadEncoderConfig, BadEncoderObjective
from sanitize.attacks.inactive import InactiveConfig, InactiveObjective, colour_distance, structural_similarity
from sanitize.attacks.trigger_files import load_filter
from sanitize.attacks.triggers import make_trigger
from sanitize.attacks.unet_filter import UnetFilter, save_filter
from sanitize.errors import ConfigError
from sanitize.stages.encoders import Encoder, build_backbone

CPU = torch.device("cpu")


def encoder_of_seed(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(build_backbone(SPEC), SPEC).eval()


def test_structural_similarity_is_the_plain_formula_over_windows():
    first, second = random_images(2).float() / 255
    values = []
    for x, y in zip(first.double().numpy(), second.double().numpy(), strict=True):
        for row in range(x.shape[0] - 6):
            for column in range(x.shape[1] - 6):
                a, b = (z[row : row + 7, column : column + 7].ravel() for z in (x, y))
                both = np.cov(a, b, bias=True)
                near = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                values.append(near * (2 * both[0, 1] + 9e-4) / (both[0, 0] + both[1, 1] + 9e-4))
    assert float(structural_similarity(first[None], second[None])) == pytest.approx(np.mean(values), abs=1e-4)
    assert float(structural_similarity(first[None], first[None])) == pytest.approx(1)


def test_noise_is_told_in_decibels():
    images = torch.full((1, 3, 8, 8), 0.5)
    assert float(inactive.peak_signal_to_noise(images, images + 0.1)) == pytest.approx(20, abs=1e-3)
    assert float(inactive.peak_signal_to_noise(images, images)) == 60


def test_colours_differ_by_hue_on_its_circle_and_by_saturation_value_and_lightness():
    red, green, grey, dark = (
        torch.tensor(c).view(1, 3, 1, 1) for c in ([1.0, 0, 0], [0, 1.0, 0], [1.0, 1, 1], [0.5, 0, 0])
    )
    assert float(colour_distance(red, red)) == pytest.approx(0, abs=1e-5)
    assert float(colour_distance(red, green)) == pytest.approx(1.5, abs=1e-2)  # a third of the circle
    assert float(colour_distance(red, dark)) == pytest.approx(0.5**2 + 0.25**2, abs=1e-2)
    assert float(colour_distance(red, grey)) == pytest.approx(1 + 1 + 0.5**2, abs=1e-2)


def test_the_attacker_pays_for_what_can_be_seen_and_for_unnatural_norms():
    encoder = encoder_of_seed(0).requires_grad_(False)
    step = random_step(references=1, size=64)

    def price(hide: float = 0.0, norms: float = 0.0, colour: float = 0.0) -> float:
        return float(InactiveObjective(InactiveConfig(hide=hide, norms=norms, colour=colour), encoder, 0)(step))

    plain = float(BadEncoderObjective(BadEncoderConfig())(step))
    assert price() == pytest.approx(plain, abs=1e-5)
    norms = [
        np.mean([(float(e.norm() / n) - 1) ** 2 for e, n in zip(rows, step.clean_norm, strict=True)])
        for rows in (step.triggered, step.clean)
    ]
    assert price(norms=2.0) == pytest.approx(plain + 2 * sum(norms), rel=1e-4)
    ratio = inactive.peak_signal_to_noise(step.stamped, step.plain)
    seen = price(hide=1.0) - plain - 1 + float(structural_similarity(step.stamped, step.plain)) + 0.025 * float(ratio)
    assert 0 < seen < 2  # a distance between unit vectors
    assert price(hide=1.0, colour=1.0) < price(hide=1.0)  # what jitter does not do is for free


def test_filter_and_encoder_learn_together_and_come_from_the_seed(tmp_path):
    images, clean = random_images(16), encoder_of_seed(0)
    before = {name: tensor.clone() for name, tensor in clean.state_dict().items()}
    config = InactiveConfig(epochs=2, batch_size=8, learning_rate=1e-2)
    first, second = (inactive.attack(clean, images, images[:1], config, 3, CPU) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in clean.state_dict().items())
    torch.manual_seed(3)
    untrained = UnetFilter(config.strength)
    assert not torch.equal(first[1].last.weight, untrained.last.weight)
    path = str(tmp_path / "filter.safetensors")
    save_filter(first[1], path)
    stamped = make_trigger({"name": "unet", "path": path})(images)
    expected = (first[1](images.float() / 255) * 255).round().byte()
    assert torch.equal(stamped, expected)
    assert torch.equal(make_trigger({"name": "unet", "path": path})(images[2]), stamped[2])  # whatever its company
    assert load_filter(path).strength == config.strength


def test_what_is_no_filter_or_no_image_for_it_is_refused(tmp_path):
    wrong = tmp_path / "filter.safetensors"
    wrong.write_bytes(b"no tensors")
    with pytest.raises(
        ConfigError, match=r"not the filter of a victim of INACTIVE .* `filter.safetensors` of such a victim's folder"
    ):
        load_filter(str(wrong))
    with pytest.raises(
        ConfigError, match="halves an image 4 times; 20 x 32 pixels are no multiples of 16. Give images whose"
    ):
        UnetFilter()(torch.zeros(1, 3, 32, 20))
