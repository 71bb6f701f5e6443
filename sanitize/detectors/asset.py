"""ASSET (Pan et al., USENIX Security 2023, arXiv 2302.11408), label-free: what does not look like the base set?

inner:  the inner step alone: per batch, a fresh small network learns to tell the batch from the base (here: the reference set).
offset: our label-free reading of the full method: a detector network is pushed down on the base and up on the suspects.
Files named below are of the released code, reds-lab/ASSET.

Both are TRANSDUCTIVE by nature: a score depends on the samples scored in the same call, on their order and on the seed.
The reference set must be clean and of the same kind as what is scored: any other difference counts as poison.
"""

import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.errors import check
from sanitize.stages.encoders import Encoder

_SUSPECT = 2.0  # adjusted outlyingness above which the released code raises the loss
_AVERAGED = 3  # last passes of the detector network
_LEARNING_RATE = 1e-3


def fit(
    reference_set: ReferenceSet,
    encoder: Encoder,  # noqa: ARG001 every fit starts with reference set, encoder and seed
    seed: int,
    kind: str = "inner",
    batch_size: int = 256,
    steps: int = 100,
    passes: int = 6,
) -> Score:
    """Transductive, see above. What is scored is shuffled (seeded) and cut into equal batches of at most `batch_size`.

    kind: inner | offset; steps: pairs of steps of each inner network; passes: of the detector network (offset only)
    """
    check(kind in ("inner", "offset"), f"kind: {kind!r} is not inner or offset.")
    check(batch_size >= 2 and steps >= 1 and passes >= 1, "batch_size must be at least 2, steps and passes at least 1.")
    mean, std = reference_set.embeddings.mean(dim=0), reference_set.embeddings.std(dim=0, correction=0)
    std = std.clamp(
        min=1e-3 * float(std.mean()) + 1e-12
    )  # a unit that is dead on the reference set must not outshout the others
    base = (reference_set.embeddings - mean) / std

    def score(images: Tensor, embeddings: Tensor) -> Tensor:
        incoming = (embeddings.cpu() - mean) / std
        batches = equal_batches(len(incoming), batch_size, seed)
        values = [suspicion(incoming[batch], base, steps, _seed(seed, i)) for i, batch in enumerate(batches)]
        if kind == "offset":
            suspects = [batch[upper_outliers(value)] for batch, value in zip(batches, values, strict=True)]
            return offset(images.cpu(), batches, suspects, reference_set.images, passes, _seed(seed, len(batches)))
        scores = torch.empty(len(incoming))
        scores[torch.cat(batches)] = torch.cat([rank(value) for value in values])
        return scores

    return score


def equal_batches(count: int, batch_size: int, seed: int) -> list[Tensor]:
    """Indices of `count` samples, shuffled, in equal parts: sorted input would give one-class batches."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(max(1, math.ceil(count / batch_size))))


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


# ---------------------------------------------------------------- inner step


@torch.enable_grad()  # whoever scores may have switched gradients off
def suspicion(incoming: Tensor, base: Tensor, steps: int, seed: int) -> Tensor:
    """How surely a fresh network puts each sample in the batch and not in the base: (B,) float64 in [0, 1].

    incoming: (B, D) float32, base: (N, D) float32, both standardised by the base; B of the base are drawn, once.
    MSE and two optimisers as in ASSET_demo.ipynb; the learning rate is ours (there 1e-4).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = base[torch.randperm(len(base))[: len(incoming)]]
        network = nn.Sequential(
            nn.Linear(base.shape[1], 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 1),
        )
        up, down = (torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE) for _ in range(2))
        for _ in range(steps):
            _step(up, (1 - network(incoming).sigmoid()).square().mean())
            _step(down, network(drawn).sigmoid().square().mean())
    logits: Tensor = network(incoming).detach()[:, 0]
    return logits.double().sigmoid()  # float32 would round sure cases to 1, and ranks would tie


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, largest_norm: float = math.inf) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], largest_norm)
    optimizer.step()


def rank(values: Tensor) -> Tensor:
    """(B,) float32 rank in [0, 1], 1 = the largest; equal values share the mean of their ranks."""
    ranks = torch.from_numpy(rankdata(values.numpy())).float()
    return (ranks - 1) / max(len(values) - 1, 1)


# ---------------------------------------------------------------- suspects


def medcouple(values: Tensor) -> Tensor:
    """() robust skewness in [-1, 1] of (N,) values: median of ((b - m) - (m - a)) / (b - a) over a <= m <= b, O(N^2)."""
    middle = values.median()
    high, low = (values[values >= middle] - middle).sort().values, (values[values <= middle] - middle).sort().values
    ties = int((values == middle).sum())
    gaps = high[:, None] - low
    kernel = torch.where(gaps > 0, (high[:, None] + low) / torch.where(gaps > 0, gaps, 1), 0)
    place = torch.arange(ties)  # pairs of values at the median: signs by their place, as many +1 as -1
    kernel[:ties, len(low) - ties :] = (place[:, None] + place - (ties - 1)).sign().to(kernel.dtype)
    return kernel.median()


def adjusted_outlyingness(values: Tensor) -> Tensor:
    """(N,) distance from the (lower) median in units of the skew-adjusted box plot's whisker on that side (new_poi_util.py)."""
    values = values.double()
    middle, skew = values.median(), float(medcouple(values))
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype))
    below, above = (-4, 3) if skew > 0 else (-3, 4)
    lower = low - 1.5 * math.exp(below * skew) * (high - low)
    upper = high + 1.5 * math.exp(above * skew) * (high - low)
    whisker = torch.where(values > middle, upper - middle, middle - lower)
    return (values - middle).abs() / whisker.clamp(min=1e-12)  # 1e-12: half of the values may be equal


def upper_outliers(values: Tensor) -> Tensor:
    """(N,) bool: outlying on the upper side. The released rule is two-sided and also takes the most base-like samples."""
    return (values > values.median()) & (adjusted_outlyingness(values) > _SUSPECT)


# ---------------------------------------------------------------- offset


@torch.enable_grad()
def offset(
    images: Tensor, batches: list[Tensor], suspects: list[Tensor], base: Tensor, passes: int, seed: int
) -> Tensor:
    """(N,) float32 spread of the detector network's outputs per image, mean of its last passes (ours).

    images: (N, 3, S, S) uint8, base: (M, 3, S, S) uint8; batches, suspects: indices of images, suspects part of their batch.
    The inner step sees constant embeddings, so its suspects are found once and serve every pass.
    """
    order, kept = torch.cat(batches), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = detector_network()
        down, up = (torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE) for _ in range(2))
        for number in range(passes):
            for batch, suspect in zip(batches, suspects, strict=True):
                drawn = base[torch.randperm(len(base))[: len(batch)]]
                _step(down, spread(network, drawn).mean(), largest_norm=1)
                if len(suspect) >= 2:
                    _step(up, -spread(network, images[suspect]).mean(), largest_norm=1)
            if number >= passes - _AVERAGED:
                kept.append(torch.cat([spread(network, images[batch]).detach() for batch in batches]))
    scores = torch.empty(len(images))
    scores[order] = torch.stack(kept).mean(dim=0)
    return scores


def detector_network() -> nn.Module:
    """(B, 3, S, S) → (B, 10). GroupNorm: what an image scores must not depend on a batch's statistics."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def spread(network: nn.Module, images: Tensor) -> Tensor:
    """(B,) variance over the network's outputs for (B, 3, S, S) uint8 images: the loss without labels, and the score."""
    outputs: Tensor = network(images.float() / 255)
    return outputs.var(dim=1)


# ---------------------------------------------------------------- threshold


def gaussian_threshold(scores: Tensor, epsilon: float = 1e-3, form: str = "released") -> float:
    """Cut-off from a Gaussian on the lower half of (N,) scores (new_poi_util.py); flag scores at or above it.

    released: the formula of the published code; intended: where the Gaussian's density is `epsilon`, of which it looks a slip.
    """
    check(form in ("released", "intended"), f"form: {form!r} is not released or intended.")
    check(0 < epsilon < 1, f"epsilon: {epsilon} is not between 0 and 1.")
    values = scores.double()
    half = values[values <= values.median()]
    mean, std = float(half.mean()), math.sqrt(float(half.var(correction=0)) + 1e-6)
    scale = std * math.sqrt(2 * math.pi)
    squared = -2 * math.log(epsilon) * scale if form == "released" else -2 * math.log(epsilon * scale)
    return mean + std * math.sqrt(max(squared, 0.0))
