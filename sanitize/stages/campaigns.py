"""Flagged samples grouped by embedding: samples of one attack share a place that clean images do not.

Directions of embeddings are compared in the first principal components of kept ones, each scaled to deviation 1 there: what varies
much among clean images counts little. HDBSCAN (Campello, Moulavi and Sander 2013) finds groups of any density and leaves the rest
single; some kept samples among the flagged ones are what a group has to stand out from, also where all flagged ones are one group.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA

Floats = NDArray[np.float32]
Groups = NDArray[np.int64]
SINGLE = -1  # group of a sample that belongs to none
SMALLEST = 5  # flagged samples that make a group
COMPONENTS = 16
BACKGROUND = 200  # kept samples among the flagged ones
NEAREST = 8


@dataclass(frozen=True)
class Whitening:
    """Raw embeddings (N, D) → (N, k): directions less their mean over kept samples, on k axes (D, k) of deviation 1 there."""

    mean: Floats
    axes: Floats

    def __call__(self, embeddings: Floats) -> Floats:
        whitened: Floats = ((unit(embeddings) - self.mean) @ self.axes).astype(np.float32)
        return whitened


def unit(embeddings: Floats) -> Floats:
    """(N, D) → the same, each of length 1."""
    lengths = np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    units: Floats = (embeddings / lengths).astype(np.float32)
    return units


def fit_whitening(kept: Floats) -> Whitening:
    """From kept embeddings (M, D), at least one; at most a quarter as many axes."""
    units = unit(kept)
    mean = units.mean(axis=0)
    _, scales, axes = np.linalg.svd(units - mean, full_matrices=False)
    usable = max(min(COMPONENTS, len(kept) // 4, int((scales > 1e-4 * max(scales[0], 1e-12)).sum())), 1)
    deviations = np.maximum(scales[:usable] / np.sqrt(len(kept)), 1e-6)
    return Whitening(mean, (axes[:usable].T / deviations).astype(np.float32))


def group_by_embedding(flagged: Floats, kept: Floats, seed: int = 0) -> Groups:
    """(N,) group of each flagged embedding (N, D), 0 for the largest, SINGLE for those in none. kept: (M, D), at least one."""
    if len(flagged) < SMALLEST or not len(kept):
        return np.full(len(flagged), SINGLE, np.int64)
    background = kept[np.random.default_rng(seed).permutation(len(kept))[:BACKGROUND]]
    points = fit_whitening(kept)(np.concatenate([flagged, background]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, about defaults that will change
        found = HDBSCAN(min_cluster_size=SMALLEST, copy=True).fit_predict(points.astype(np.float64))
    return _numbered(found[: len(flagged)])


def _numbered(found: NDArray[np.int64]) -> Groups:
    """The same groups, largest first, without those of fewer than SMALLEST members."""
    sizes = Counter(found[found >= 0].tolist())
    order = [group for group, size in sizes.most_common() if size >= SMALLEST]
    numbers = {group: number for number, group in enumerate(order)}
    return np.array([numbers.get(group, SINGLE) for group in found.tolist()], np.int64)


def centre(members: Floats) -> Floats:
    """(D,) mean direction of embeddings (N, D)."""
    mean: Floats = unit(members).mean(axis=0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def nearest(embeddings: Floats, place: Floats, count: int = NEAREST) -> list[int]:
    """Positions of the embeddings (N, D) that are closest by cosine to a unit vector (D,), closest first."""
    return [int(position) for position in np.argsort(-(unit(embeddings) @ place), kind="stable")[:count]]


def share_within(kept: Floats, members: Floats, place: Floats) -> float:
    """Of kept embeddings, how many are as close to `place` as half of the members are: near 0 where a group is alone."""
    reach = float(np.median(unit(members) @ place))
    return float((unit(kept) @ place >= reach).mean())


def map_positions(embeddings: Floats) -> Floats:
    """(N, 2) in [0, 1]: directions of embeddings (N, D) in the plane in which they vary most."""
    if len(embeddings) < 2:
        return np.full((len(embeddings), 2), 0.5, np.float32)
    plane = PCA(min(2, embeddings.shape[1]), svd_solver="randomized", random_state=0).fit_transform(unit(embeddings))
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    low, high = plane.min(axis=0), plane.max(axis=0)
    scaled: Floats = ((plane - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
    return scaled


def common_words(captions: Sequence[str], usual: Sequence[str], count: int = 8) -> list[tuple[str, float, float]]:
    """(word, share of captions with it, share of the usual ones), of words that are more frequent, the largest difference first."""
    own, theirs = (_words(texts) for texts in (captions, usual))
    shares = [(word, n / len(captions), theirs[word] / max(len(usual), 1)) for word, n in own.items() if n > 1]
    above = [entry for entry in shares if entry[1] > entry[2] + 0.05]
    return sorted(above, key=lambda entry: (entry[2] - entry[1], entry[0]))[:count]


def _words(texts: Sequence[str]) -> Counter[str]:
    """In how many texts each word of three letters or more is."""
    return Counter(word for text in texts for word in set(text.lower().split()) if len(word) > 2)
