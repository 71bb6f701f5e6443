"""INACTIVE (Zhang et al. 2024, arXiv 2405.14672): BadEncoder whose trigger is a filter of every image's own, learnt with the encoder.

The filter (unet_filter.py) is to move colours where the augmentations of self-supervised training do not (disentangled), and to stay
invisible. Its terms are those of the released code (Zhang-Henry/INACTIVE: util.py, loss.py) but for LPIPS, whose network is in no package,
and for hues, which are compared on their circle. Ours: the term of raw norms, which the paper's leaves free to give the attack away, and
that filter and encoder learn together from the start.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sanitize.attacks.augment import colour_jitter
from sanitize.attacks.backdoor import FineTuneConfig, Step, fine_tune, unit
from sanitize.attacks.badencoder import Losses, losses
from sanitize.attacks.evaluation import sliced_wasserstein
from sanitize.attacks.unet_filter import UnetFilter
from sanitize.stages.encoders import Encoder

DIRECTIONS = 50  # of the sliced Wasserstein distance


@dataclass(frozen=True)
class InactiveConfig(FineTuneConfig):
    """hide: weight of invisibility (published 0.2 of L0's); colour: of disentanglement within it; norms: of natural raw norms.

    filter_rate: of the filter's Adam; strength: the most that it adds to a pixel, of 1.
    """

    lambda1: float = 1.0
    lambda2: float = 1.0
    hide: float = 0.2
    colour: float = 0.1
    norms: float = 1.0
    filter_rate: float = 3e-3
    strength: float = 0.5


def structural_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean SSIM (Wang et al. 2004, uniform window of 7 pixels) of (B, C, H, W) in [0, 1]."""

    def smooth(images: Tensor) -> Tensor:
        return functional.avg_pool2d(images, 7, stride=1)

    means = smooth(first), smooth(second)
    squares = means[0].square(), means[1].square()
    variances = smooth(first.square()) - squares[0], smooth(second.square()) - squares[1]
    covariance = smooth(first * second) - means[0] * means[1]
    c1, c2 = 0.01**2, 0.03**2
    near = (2 * means[0] * means[1] + c1) / (squares[0] + squares[1] + c1)
    return (near * (2 * covariance + c2) / (variances[0] + variances[1] + c2)).mean()


def peak_signal_to_noise(first: Tensor, second: Tensor) -> Tensor:
    """In dB, of images in [0, 1]; at most 60."""
    return -10 * torch.log10((first - second).square().mean().clamp(min=1e-6))


def colour_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean over pixels of (B, 3, H, W) in [0, 1]: 1 - cosine of hues, and squared differences of saturation, value and lightness."""
    (hue, *rest), (other_hue, *others) = _colours(first), _colours(second)
    apart = 1 - functional.cosine_similarity(hue, other_hue, dim=1, eps=1e-3)
    distance: Tensor = (
        apart.mean() + torch.stack([(a - b).square().mean() for a, b in zip(rest, others, strict=True)]).sum()
    )
    return distance


def _colours(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hue as a vector (B, 2, H, W) in the plane of chroma; saturation, value, lightness (B, H, W)."""
    red, green, blue = images.unbind(dim=1)
    most, least = images.amax(dim=1), images.amin(dim=1)
    hue = torch.stack([2 * red - green - blue, 3**0.5 * (green - blue)], dim=1)
    return hue, (most - least) / most.clamp(min=1e-3), most, (most + least) / 2


class InactiveObjective:
    """L0 + lambda1 L1 + lambda2 L2 of BadEncoder + norms N + hide (1 - SSIM - 0.025 PSNR + W - colour C).

    N: squared relative errors of raw norms, triggered and clean; W: sliced Wasserstein distance of filtered from plain images to the clean
    encoder; C: distance in colour between filtered and augmented images.
    """

    perturbations: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __init__(self, config: InactiveConfig, clean_encoder: Encoder, seed: int) -> None:
        self.config = config
        self.clean_encoder = clean_encoder
        self.generator = torch.Generator().manual_seed(seed)
        self.last: tuple[Losses, dict[str, Tensor]] | None = None

    def __call__(self, step: Step) -> Tensor:
        config, terms = self.config, losses(step)
        hidden = self.hidden(step)
        both = torch.stack([step.triggered, step.clean]).float()
        norms: Tensor = (both.norm(dim=-1) / step.clean_norm - 1).square().mean(dim=1).sum()
        self.last = terms, hidden | {"norms": norms}
        attack = terms.effectiveness + config.lambda1 * terms.reference + config.lambda2 * terms.utility
        invisible = 1 - hidden["SSIM"] - 0.025 * hidden["PSNR"] + hidden["W"] - config.colour * hidden["C"]
        return attack + config.norms * norms + config.hide * invisible

    def hidden(self, step: Step) -> dict[str, Tensor]:
        size = step.clean_target.shape[1]
        directions = unit(torch.randn(DIRECTIONS, size, generator=self.generator)).to(step.stamped.device)
        seen = unit(self.clean_encoder(step.stamped))
        return {
            "SSIM": structural_similarity(step.stamped, step.plain),
            "PSNR": peak_signal_to_noise(step.stamped, step.plain),
            "W": sliced_wasserstein(seen, step.clean_target, directions),
            "C": colour_distance(step.stamped, colour_jitter(step.plain, self.generator)),
        }

    def end_epoch(self) -> str:
        assert self.last is not None
        terms, hidden = self.last
        named = {"L0": terms.effectiveness, "L1": terms.reference, "L2": terms.utility} | hidden
        return " ".join(f"{name} {value:.3f}" for name, value in named.items())


def attack(
    clean_encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    config: InactiveConfig,
    seed: int,
    device: torch.device,
) -> tuple[Encoder, UnetFilter]:
    """shadow (N, 3, S, S) and references (R, 3, S, S) uint8 → backdoored encoder and filter, both in eval mode."""
    clean_encoder.requires_grad_(False).eval().to(device)
    objective = InactiveObjective(config, clean_encoder, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trigger = UnetFilter(config.strength).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(trigger.parameters(), config.filter_rate)
    encoder = fine_tune(
        clean_encoder, shadow, references, trigger, objective, config, seed, device, trigger_optimizer=optimizer
    )
    return encoder, trigger.eval().requires_grad_(False)
