"""DECREE (Feng et al., CVPR 2023, arXiv 2303.15180): is the encoder itself trojaned?

Invert the smallest trigger that makes embeddings collapse. A true trigger sends unrelated images to one embedding, so a trojaned
encoder needs only a small mask for that, a clean one a large mask. "Reference code" is GiantSeaweed/DECREE. Convention of the
result: L1 is the sum of the mask over 3 channels, P-L1 = L1 / (3 H W) in [0, 1], pixels = L1 / 3.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.detectors.decree.config import DecreeConfig
from sanitize.errors import CheckpointError, check
from sanitize.stages.encoders import device_of, embed_in_batches

CONVENTION = "l1 = sum of the mask over 3 channels; p_l1 = l1 / (3 H W); pixels = l1 / 3"
EPSILON = 1e-7  # of the reference's tanh parametrisation
CHECKED_PER_EPOCH = 8  # smallest candidates of an epoch that are tried on the whole pool
VISIBLE = 0.98  # of the mask, in the square that a start begins with
CHUNK = 256  # images per forward pass without gradient
EpochCallback = Callable[[int, int, str], None]  # restart, epochs done in it, note
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InvertedTrigger:
    """mask (1, H, W) float32 in [0, 1], shared by the channels; pattern (3, H, W) uint8. Both on the CPU."""

    mask: Tensor
    pattern: Tensor
    step: int  # at which it was found, from 1
    cosine: float = float("nan")  # mean pairwise cosine of the whole stamped pool

    @property
    def l1(self) -> float:
        """Sum of the mask over 3 channels, in [0, 3 H W] (reference code, main.py)."""
        return 3 * float(self.mask.double().sum())

    @property
    def p_l1(self) -> float:
        """L1 / (3 H W), in [0, 1]. That the 3 belongs there is our reading; the authors left it open."""
        return self.l1 / (3 * self.mask.numel())

    @property
    def pixels(self) -> float:
        """L1 / 3: the number of whole pixels it would cover."""
        return self.l1 / 3


@dataclass(frozen=True)
class Restart:
    """One inversion. trigger: None when no mask held on the whole pool; penalty: the last lambda."""

    trigger: InvertedTrigger | None
    steps: int
    epochs: int
    seconds: float
    penalty: float


@dataclass(frozen=True)
class Inversion:
    """All restarts. plain_cosine: mean pairwise cosine of the pool without a trigger; image_size in pixels."""

    restarts: tuple[Restart, ...]
    plain_cosine: float
    images: int
    image_size: int

    @property
    def triggers(self) -> list[InvertedTrigger]:
        return [restart.trigger for restart in self.restarts if restart.trigger is not None]

    @property
    def best(self) -> InvertedTrigger | None:
        """The smallest trigger, or None: no trigger found."""
        return min(self.triggers, key=lambda trigger: trigger.l1, default=None)

    @property
    def spread(self) -> float:
        """Largest minus smallest L1 over the restarts that found a trigger; 0 with fewer than two."""
        sizes = [trigger.l1 for trigger in self.triggers]
        return max(sizes) - min(sizes) if sizes else 0.0


# ---------------------------------------------------------------- formulas


def from_logits(logits: Tensor) -> Tensor:
    """Unbounded logits → values in [0, 1], same shape (reference code, main.py): clip(tanh(v) / (2 - eps) + 1/2, 0, 1)."""
    return (logits.tanh() / (2 - EPSILON) + 0.5).clamp(0, 1)


def to_logits(values: Tensor) -> Tensor:
    """The inverse of `from_logits`, for values in [0, 1] (float64: at 0 and 1 float32 would be infinite)."""
    return ((values.double() - 0.5) * (2 - EPSILON)).atanh()


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - M) x + M P, clipped, in raw pixel space (reference code, main.py).

    images:  (B, 3, H, W) uint8 or float, 0..255
    mask:    (1, H, W) in [0, 1]
    pattern: (3, H, W) uint8 or float, 0..255
    returns: (B, 3, H, W) float32, 0..255
    """
    mask = mask.float()
    return ((1 - mask) * images.float() + mask * pattern.float()).clamp(0, 255)


def mean_pairwise_cosine(embeddings: Tensor) -> Tensor:
    """() float64: mean of cos(e_i, e_j) over all ordered pairs i != j of (B, D), B >= 2, in closed form (ours)."""
    rows = functional.normalize(embeddings.double(), dim=1)
    count = len(rows)
    # the sum over all pairs minus the diagonal, which is `count` unless an embedding is zero
    return (rows.sum(dim=0).square().sum() - rows.square().sum()) / (count * (count - 1))


def learning_rate(config: DecreeConfig, epoch: int) -> float:
    """Of an epoch, counted from 0."""
    return config.learning_rates[sum(epoch >= milestone for milestone in config.milestones)]


def block_mask(size: Sequence[int], blocks: int, number: int) -> Tensor:
    """(1, H, W) float64: nearly 1 in square `number` of blocks x blocks that overlap by half and cover the image, nearly 0 elsewhere."""
    mask = torch.full((1, *size), 1 - VISIBLE, dtype=torch.float64)
    row, column = divmod(number, blocks)
    (top, bottom), (left, right) = (
        (round(place * side / (blocks + 1)), round((place + 2) * side / (blocks + 1)))
        for place, side in zip((row, column), size, strict=True)
    )
    mask[:, top:bottom, left:right] = VISIBLE
    return mask


class Penalty:
    """The weight lambda of the mask's size, adapted after every step (reference code, main.py).

    More than `patience` successes in a row: times `factor`, unless it has reached the ceiling. As many failures: divided by
    it, unless it is below the floor; so it can end one factor below. A change starts the count again, and a success ends a
    row of failures and the other way round.
    """

    def __init__(self, config: DecreeConfig) -> None:
        self.value = config.penalty
        self._config = config
        self._successes = self._failures = 0

    def update(self, success: bool) -> None:
        self._successes = self._successes + 1 if success else 0
        self._failures = 0 if success else self._failures + 1
        config = self._config
        if self._successes > config.penalty_patience and self.value < config.penalty_ceiling:
            self.value *= config.penalty_factor
            self._successes = 0
        elif self._failures > config.penalty_patience and self.value >= config.penalty_floor:
            self.value /= config.penalty_factor
            self._failures = 0


# ---------------------------------------------------------------- inversion


class _Descent:
    """One start: logits, Adam, lambda and the generator that everything random comes from."""

    def __init__(self, pool: Tensor, encoder: nn.Module, config: DecreeConfig, restart: int) -> None:
        """pool: (N, 3, H, W) uint8, on the encoder's device."""
        self.pool, self.encoder, self.config = pool, encoder, config
        self.generator = generator_for(config.seed, restart)
        random = [self._random(channels) for channels in (1, 3)]
        mask = (
            random[0]
            if restart < config.restarts
            else block_mask(pool.shape[-2:], config.blocks, restart - config.restarts)
        )
        self.logits = [to_logits(values).to(pool.device).requires_grad_() for values in (mask, random[1])]
        self.optimiser = torch.optim.Adam(self.logits, betas=(config.betas[0], config.betas[1]))
        self.penalty = Penalty(config)
        self.steps = 0

    def _random(self, channels: int) -> Tensor:
        """Uniform in [0, 1); float64 like the reference, because short runs diverge by rounding."""
        return torch.rand(channels, *self.pool.shape[2:], generator=self.generator, dtype=torch.float64)

    def epoch(self, number: int) -> tuple[float, list[InvertedTrigger]]:
        """One pass over the pool: mean cosine of its batches, and the masks that collapsed theirs."""
        self.optimiser.param_groups[0]["lr"] = learning_rate(self.config, number)
        cosines, candidates = [], []
        for rows in self._batches():
            cosine, candidate = self._step(self.pool[rows])
            success = cosine > self.config.threshold
            self.penalty.update(success)
            cosines.append(cosine)
            candidates += [candidate] if success else []
        return float(np.mean(cosines)), candidates

    def _batches(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.pool), generator=self.generator).to(self.pool.device)
        return (rows for rows in order.split(self.config.batch_size) if len(rows) > 1)  # one image has no pair

    def _step(self, images: Tensor) -> tuple[float, InvertedTrigger]:
        """Loss -C + lambda R (reference code, main.py). Returns C and the trigger that gave it, from before the update."""
        self.steps += 1
        mask, pattern = (from_logits(logits) for logits in self.logits)
        cosine = mean_pairwise_cosine(self.encoder(stamp(images, mask, pattern * 255) / 255))
        loss = self.penalty.value * 3 * mask.sum() - cosine
        # not backward(): that would leave gradients in an encoder that is not frozen
        for logits, gradient in zip(self.logits, torch.autograd.grad(loss, self.logits), strict=True):
            logits.grad = gradient
        self.optimiser.step()
        return float(cosine.detach()), _trigger(mask, pattern, self.steps)


def _trigger(mask: Tensor, pattern: Tensor, step: int) -> InvertedTrigger:
    """Decoded mask and pattern, both in [0, 1] → detached, the pattern in whole grey levels."""
    levels = (pattern.detach() * 255).round().byte()
    return InvertedTrigger(mask.detach().float().cpu(), levels.cpu(), step)


def invert(
    images: Tensor, encoder: nn.Module, config: DecreeConfig, on_epoch: EpochCallback | None = None
) -> Inversion:
    """The smallest trigger under which `encoder` maps all images to almost one embedding, from several random starts.

    images:  (N, 3, H, W) uint8, N >= 2; the first `config.pool` are used
    encoder: (B, 3, H, W) float32 in [0, 1] → (B, D), in eval mode, differentiable; it is not changed
    on_epoch: called after every epoch; nothing depends on it, nor on the clock
    """
    pool = images[: config.pool].to(device_of(encoder))
    check(len(pool) > 1, f"DECREE needs at least 2 images, {len(pool)} given. Give more auxiliary images.")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        plain = float(mean_pairwise_cosine(embed_in_batches(encoder, pool)))
        if not np.isfinite(plain):
            raise CheckpointError(
                "the encoder gives embeddings that are not finite numbers, so no trigger can be searched. "
                "Check its weights, mean and std."
            )
        restarts = tuple(_restart(pool, encoder, config, number, on_epoch) for number in range(config.starts))
    return Inversion(restarts, plain, len(pool), pool.shape[-1])


def _restart(
    pool: Tensor, encoder: nn.Module, config: DecreeConfig, number: int, on_epoch: EpochCallback | None
) -> Restart:
    start = time.monotonic()
    descent = _Descent(pool, encoder, config, number)
    best: InvertedTrigger | None = None
    epoch = 0
    for epoch in range(1, config.epochs + 1):
        cosine, candidates = descent.epoch(epoch - 1)
        best = _accepted(candidates, best, pool, encoder, config.threshold)
        if on_epoch is not None:
            size = f"L1 {best.l1:.1f}" if best else "no trigger yet"
            on_epoch(number, epoch, f"{size}, cosine {cosine:.3f}, lambda {descent.penalty.value:.2g}")
        if best and descent.steps - best.step > config.patience and cosine > config.threshold:
            break
    seconds = time.monotonic() - start
    found = f"L1 {best.l1:.1f}, P-L1 {best.p_l1:.4f}" if best else "no trigger"
    log.info("restart %d: %s after %d steps, %.1f s", number, found, descent.steps, seconds)
    return Restart(best, descent.steps, epoch, seconds, descent.penalty.value)


def _accepted(
    candidates: list[InvertedTrigger], best: InvertedTrigger | None, pool: Tensor, encoder: nn.Module, threshold: float
) -> InvertedTrigger | None:
    """The smallest candidate below `best` that collapses the whole pool too, else `best`.

    The reference code trusts one batch; the whole pool in float32 is a harder test (ours). As the smallest that passes is also
    the last improvement, checking once per epoch finds what checking every step would.
    """
    smaller = [candidate for candidate in candidates if best is None or candidate.l1 < best.l1]
    for candidate in sorted(smaller, key=lambda candidate: candidate.l1)[:CHECKED_PER_EPOCH]:
        cosine = float(mean_pairwise_cosine(stamped_embeddings(pool, encoder, candidate)))
        if cosine > threshold:
            return InvertedTrigger(candidate.mask, candidate.pattern, candidate.step, cosine)
    return best


def stamped_embeddings(images: Tensor, encoder: nn.Module, trigger: InvertedTrigger) -> Tensor:
    """(N, D) float32 on the CPU: embeddings of (N, 3, H, W) uint8 images with the trigger, computed where the images are."""
    mask, pattern = trigger.mask.to(images.device), trigger.pattern.to(images.device)
    return torch.cat([embed_in_batches(encoder, stamp(part, mask, pattern)) for part in images.split(CHUNK)])


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """Always on the CPU, so that a GPU sees the same start and the same batches."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
