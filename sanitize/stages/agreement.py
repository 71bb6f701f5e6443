"""Density inside the scan: do samples depart from their prediction in the same direction, more than clean ones do?

Whoever backdoors an encoder for one target pushes the embeddings of all triggered images there. However well each one hides, what is
left after its own content is predicted away points to the target for all of them. The statistic of a sample is the mean of its 8 largest
inner products with the whitened residuals (prediction.py) of other images of the scan. Copies of one image share a residual innocently,
so images that look alike (difference hash, at most 8 of 64 bits apart) do not count for each other.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sanitize.stages.tails import Floats, Tail, fit_tail

RESIDUALS, IMAGE_HASH = "residuals", "image_hash"  # columns of vectors in score tables: whitened residuals, 8 bytes
STEP = 1 / 8  # of a quantised residual; a clean image's coordinates have deviation 1
NEIGHBOURS = 8
CANDIDATES = 4 * NEIGHBOURS  # whose images are compared
ALIKE = 8  # bits; of two unrelated photographs 32 differ on average
POOL = 10_000  # residuals that every sample is compared with: half a megabyte that goes to every worker
BLOCK = 256

Bytes = NDArray[np.int8]


def quantised(residuals: Floats) -> Bytes:
    """Whitened residuals (N, k + 1) in one byte a coordinate; beyond 15.9 deviations they are clipped."""
    return np.clip(np.round(np.nan_to_num(residuals) / STEP), -127, 127).astype(np.int8)


@dataclass(frozen=True)
class Departures:
    """Of N images: residuals (N, k + 1) int8 in steps of STEP, hashes (N,) uint64 of what they look like."""

    residuals: Bytes
    hashes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.hashes)

    def longest(self, count: int) -> "Departures":
        """The `count` longest residuals, each hash once; the same whatever the order of the samples."""
        lengths = (self.residuals.astype(np.int32) ** 2).sum(axis=1)
        order = np.lexsort((self.hashes, -lengths))
        _, first = np.unique(self.hashes[order], return_index=True)
        chosen = order[np.sort(first)[:count]]
        return Departures(self.residuals[chosen], self.hashes[chosen])

    def as_bytes(self) -> dict[str, list[bytes]]:
        """RESIDUALS and IMAGE_HASH of each image, as tables hold them."""
        return {
            RESIDUALS: [row.tobytes() for row in self.residuals],
            IMAGE_HASH: [row.tobytes() for row in self.hashes.astype("<u8")],
        }

    @classmethod
    def from_bytes(cls, residuals: Sequence[bytes], hashes: Sequence[bytes]) -> "Departures":
        """Raises ValueError when they differ in length."""
        if not residuals:
            return NONE
        lengths = {len(row) for row in residuals}, {len(row) for row in hashes}
        if lengths != ({len(residuals[0])}, {8}) or len(residuals) != len(hashes):
            raise ValueError("residuals or image hashes of several lengths")
        values = np.frombuffer(b"".join(residuals), np.int8).reshape(len(residuals), -1)
        return cls(values, np.frombuffer(b"".join(hashes), "<u8"))

    def joined(self, other: "Departures") -> "Departures":
        if not len(self) or not len(other):
            return other if not len(self) else self
        return Departures(
            np.concatenate([self.residuals, other.residuals]), np.concatenate([self.hashes, other.hashes])
        )


NONE = Departures(np.empty((0, 0), np.int8), np.empty(0, np.uint64))


def agreement(samples: Departures, pool: Departures) -> Floats:
    """(N,) float32: mean of the NEIGHBOURS largest inner products with images of the pool (more than that) that look otherwise."""
    known = _in_deviations(pool.residuals).T
    found = np.zeros(len(samples), np.float32)
    for start in range(0, len(samples), BLOCK):
        part = slice(start, start + BLOCK)
        products = _in_deviations(samples.residuals[part]) @ known
        largest, positions = products.topk(min(CANDIDATES, len(pool)), dim=1)
        largest[alike(samples.hashes[part, None], pool.hashes[positions.numpy()])] = 0
        found[part] = largest.topk(NEIGHBOURS, dim=1).values.mean(dim=1).numpy()
        few = (largest != 0).sum(dim=1) < NEIGHBOURS  # so many look like the image that others may lie behind them
        for row in few.nonzero()[:, 0]:
            products[row][alike(samples.hashes[start + row], pool.hashes)] = 0
            found[start + row] = products[row].topk(NEIGHBOURS).values.mean()
    return found


def _in_deviations(residuals: Bytes) -> Tensor:
    return torch.from_numpy(residuals.astype(np.float32) * STEP)


def alike(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> Tensor:
    """Of image hashes, broadcast: at most ALIKE bits apart."""
    return torch.from_numpy(np.bitwise_count(one ^ other) <= ALIKE)


@dataclass(frozen=True)
class AgreementTest:
    """pool: of the scan; tail: of the agreement of clean held-out images with it; weight: of this p-value in the combined score."""

    pool: Departures
    tail: Tail
    weight: float

    def combined(self, scores: Floats, samples: Departures) -> Floats:
        """Scores of pass 1 (N,), -log10 of a harmonic mean p-value (evidence.py), joined by this evidence; NaN stays NaN."""
        p = self.tail.p_values(agreement(samples, self.pool))
        total = (1 - self.weight) * 10 ** scores.astype(np.float64) + self.weight / p
        return np.log10(total).astype(np.float32)

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(self.pool.residuals.tobytes() + self.pool.hashes.tobytes())
        digest.update(self.tail.calibration.tobytes() + f"{self.tail.start} {self.tail.scale} {self.weight}".encode())
        return digest.hexdigest()[:12]


def agreement_test(pool: Departures, clean: Departures, weight: float) -> AgreementTest:
    """clean: held-out auxiliary images, which agree with the pool as much as clean scanned ones do."""
    return AgreementTest(pool, fit_tail(agreement(clean, pool)), weight)
