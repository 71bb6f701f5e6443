"""PatchSearch (Tejankar et al., CVPR 2023, arXiv 2304.01482): which images hold a patch that pulls others into their cluster?

For poisoned training sets of a model trained on them; it needs no clean images. (1) k-means of the embeddings. (2) The candidate
patch of an image: the window that its cluster hangs on. (3) Its poison score: how many test images of other clusters move into the
image's cluster when the patch is pasted on them. (4) Iterative search: a few images of each cluster are scored, the least poisonous
clusters are dropped, and so on. (5) A classifier learns to see the most poisonous patches and scores every image (patch_classifier.py).

Where it departs from the paper and its code (UCDvision/PatchSearch):
- (2) by occlusion, not Grad-CAM: an encoder here may be any module. The heat of a pixel is what covering it with the image's mean
  colour takes from the cosine with the centre of the image's cluster; as in the paper, the window of most heat is the candidate.
- (3) counts images that were elsewhere and arrive; the code takes the cluster's size after less its size before.
- Test images get the patch at random places, drawn once, so that candidates compare; the code draws anew for each. The paper's
  attack pastes its trigger anywhere. One that has a fixed place (BadEncoder's) does nothing elsewhere: `place: own` is our answer.
- (5) learns patches of at least half the highest score only: in thousands of images there may be fewer poisonous ones than its 20.
- Sizes are shares of the image (window 60 of 224 pixels), and by default fewer clusters, as for thousands of images.
What else the classifier leaves out is said there.

TRANSDUCTIVE: images are judged by each other; a score depends on the images scored in the same call, on their order and on the seed.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sanitize.detectors import patch_classifier
from sanitize.detectors.reference_set import Embed, ReferenceSet, Score, assign, cluster
from sanitize.errors import check
from sanitize.stages.encoders import Encoder, embed_in_batches

log = logging.getLogger(__name__)
_WINDOW = 60 / 224  # of the image's side
_POSITIONS = 6  # of the covering window, along each side
_SAMPLES = 2  # images scored of each cluster in each iteration
_DROPPED = 0.25  # share of the clusters after each iteration


@dataclass(frozen=True)
class Found:
    """What a search leaves: candidate patches, most poisonous first.

    images:  (T,) int64, which image each patch is from
    scores:  (T,) float32, test images of other clusters that it moves into its own
    patches: (T, 3, w, w) uint8
    tests:   how many test images there were
    """

    images: Tensor
    scores: Tensor
    patches: Tensor
    tests: int

    def of_images(self, count: int) -> Tensor:
        """(count,) float32 poison score of each image, 0 where none was tried."""
        return torch.zeros(count).index_put((self.images,), self.scores)


@dataclass(frozen=True)
class Patch:
    """pixels (3, w, w) uint8, and where in its image its top left corner was."""

    pixels: Tensor
    row: int
    column: int


@dataclass(frozen=True)
class Clusters:
    """of: (N,) int64, the cluster of each image; centres: (K, D) float64, of unit-norm embeddings."""

    of: Tensor
    centres: Tensor


@dataclass(frozen=True)
class Probes:
    """What patches are pasted on.

    images:        (M, 3, S, S) uint8
    clusters:      (M,) int64, theirs
    rows, columns: (M,) int64, where in each a patch goes; own_place: it goes where it came from instead
    """

    images: Tensor
    clusters: Tensor
    rows: Tensor
    columns: Tensor
    own_place: bool

    def with_patch(self, patch: Patch) -> Tensor:
        """(M, 3, S, S) uint8."""
        if self.own_place:
            return paste(
                self.images, patch.pixels, *(torch.full_like(self.rows, at) for at in (patch.row, patch.column))
            )
        return paste(self.images, patch.pixels, self.rows, self.columns)


def fit(
    reference_set: ReferenceSet,  # noqa: ARG001 not looked at: the method needs no clean images
    encoder: Encoder,
    seed: int,
    kind: str = "classifier",
    place: str = "random",
    clusters: int = 50,
    test_images: int = 150,
    window: int = 0,
    top_patches: int = 20,
    steps: int = 200,
) -> Score:
    """kind: classifier | search, the last step's score or the poison scores, which most images have none of (0).

    place: random | own, where a candidate patch is pasted: anywhere, as in the paper, or where it was in its own image
    clusters: of k-means; test_images: patches are pasted on; window: side of a patch in pixels, 0 = 60 / 224 of the image's;
    top_patches: the classifier learns to see, at most; steps: of its training
    """
    check(kind in ("classifier", "search"), f"kind: {kind!r} is not classifier or search.")
    check(place in ("random", "own"), f"place: {place!r} is not random or own.")
    check(clusters >= 2, f"clusters: {clusters} is below 2; a patch moves images from one to another.")
    check(min(test_images, top_patches, steps) >= 1, "test_images, top_patches and steps must be at least 1.")

    def score(images: Tensor, embeddings: Tensor) -> Tensor:
        images = images.cpu()
        side = window or round(_WINDOW * images.shape[-1])
        check(1 <= side < images.shape[-1], f"window: {side} pixels do not fit an image of {images.shape[-1]}.")
        found = search(images, embeddings, encoder, clusters, test_images, side, seed, own_place=place == "own")
        tried, moved = len(found.images), int(found.scores[0])
        log.info("patch_search: the most poisonous of %d patches moves %d of %d images", tried, moved, found.tests)
        if kind == "search":
            return found.of_images(len(images))
        patches = found.patches[found.scores >= found.scores[0] / 2][:top_patches]
        return patch_classifier.scores(images, found.of_images(len(images)), patches, steps, seed)

    return score


def search(
    images: Tensor,
    embeddings: Tensor,
    encoder: Embed,
    clusters: int,
    test_images: int,
    side: int,
    seed: int,
    *,
    own_place: bool = False,
) -> Found:
    """Iterative search (section 3 of the paper): images (N, 3, S, S) uint8, their raw embeddings (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    points = functional.normalize(embeddings.cpu().double(), dim=1)
    centres = cluster(points, min(clusters, len(points)), seed)
    groups = Clusters(assign(points, centres), centres)
    tests = choose_tests(images, points, groups, test_images, side, generator, own_place)
    shuffled = torch.randperm(len(images), generator=generator)
    queues = [shuffled[groups.of[shuffled] == number] for number in range(len(centres))]
    left, highest = list(range(len(centres))), [0] * len(centres)
    tried: list[tuple[int, int, Tensor]] = []
    while left:
        for number in left:
            drawn, queues[number] = queues[number][:_SAMPLES], queues[number][_SAMPLES:]
            for index in drawn.tolist():
                patch = candidate_patch(images[index], centres[number], encoder, side)
                score = poison_score(patch, number, tests, centres, encoder)
                highest[number] = max(highest[number], score)
                tried.append((index, score, patch.pixels))
        left.sort(key=lambda number: -highest[number])
        left = left[: len(left) - max(1, int(_DROPPED * len(left)))]
    tried.sort(key=lambda one: -one[1])
    indices, scores, patches = zip(*tried, strict=True)
    return Found(
        torch.tensor(indices), torch.tensor(scores, dtype=torch.float32), torch.stack(patches), len(tests.images)
    )


def choose_tests(
    images: Tensor,
    points: Tensor,
    groups: Clusters,
    count: int,
    side: int,
    generator: torch.Generator,
    own_place: bool,
) -> Probes:
    """As many of each cluster, those nearest to its centre; of random clusters when there are more clusters than `count`."""
    distances = (points - groups.centres[groups.of]).square().sum(dim=1)
    nearest = distances.argsort(stable=True)
    members = [nearest[groups.of[nearest] == number] for number in range(len(groups.centres))]
    chosen = torch.randperm(len(members), generator=generator)[:count].tolist()
    each = max(count // len(members), 1)
    indices = torch.cat([members[number][:each] for number in chosen])
    places = torch.randint(images.shape[-1] - side + 1, (2, len(indices)), generator=generator)
    return Probes(images[indices], groups.of[indices], places[0], places[1], own_place)


def candidate_patch(image: Tensor, centre: Tensor, encoder: Embed, side: int) -> Patch:
    """The (side, side) window of an image (3, S, S) with most heat: what its place near the centre (D,) of its cluster hangs on."""
    heat = heat_map(image, centre, encoder, side)
    sums = functional.avg_pool2d(heat[None, None], side, stride=1)[0, 0]  # one for each window
    most = (sums > sums.max() - 1e-6).nonzero()  # several, where any covering of a trigger switches it off
    row, column = most[len(most) // 2].tolist()
    return Patch(image[:, row : row + side, column : column + side], row, column)


def heat_map(image: Tensor, centre: Tensor, encoder: Embed, side: int) -> Tensor:
    """(S, S) float64: how much lower the cosine with `centre` (D,) is when a pixel is covered, mean over the windows that cover it."""
    size = image.shape[-1]
    places = torch.linspace(0, size - side, _POSITIONS).round().long().unique()
    rows, columns = (place.flatten() for place in torch.meshgrid(places, places, indexing="ij"))
    colour = image.float().mean(dim=(1, 2)).round().to(torch.uint8)
    covered = paste(image.expand(len(rows), -1, -1, -1), colour[:, None, None].expand(-1, side, side), rows, columns)
    embeddings = embed_in_batches(encoder, torch.cat([image[None], covered])).double()
    cosines = functional.cosine_similarity(embeddings, centre[None], dim=1)
    total = torch.zeros(size, size, dtype=cosines.dtype)
    windows = torch.zeros_like(total)
    for row, column, drop in zip(rows.tolist(), columns.tolist(), cosines[0] - cosines[1:], strict=True):
        total[row : row + side, column : column + side] += drop
        windows[row : row + side, column : column + side] += 1
    return total / windows.clamp(min=1)


def poison_score(patch: Patch, number: int, tests: Probes, centres: Tensor, encoder: Embed) -> int:
    """How many test images of other clusters the patch moves into cluster `number`."""
    points = functional.normalize(embed_in_batches(encoder, tests.with_patch(patch)).double(), dim=1)
    return int(((assign(points, centres) == number) & (tests.clusters != number)).sum())


def paste(images: Tensor, patch: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A copy of (M, 3, S, S) images with the (3, side, side) patch, its top left corner at (rows, columns), each (M,)."""
    offsets = torch.arange(patch.shape[-1])
    pasted = images.clone()
    numbers = torch.arange(len(images))[:, None, None]
    row, column = (rows[:, None] + offsets)[:, :, None], (columns[:, None] + offsets)[:, None, :]
    pasted[numbers, :, row, column] = patch.permute(1, 2, 0)  # an indexed dimension goes first: (M, side, side, 3)
    return pasted
