"""Local density against a reference set: k-distance, LID, SLOF and DAO (Huang et al., ICLR 2025, arXiv 2502.01385).

DAO is of Anderberg et al., SDM 2024, arXiv 2401.05453. Huang et al. compare within a batch; for unusual poison rates they advise
a clean reference set (App. B.5), which is what is used here.

The clean definitions, without the deviations of the reference code (backdoor_sample_detector/*.py in
HanxunH/Detect-CLIP-Backdoor-Samples): a reference image is never its own neighbour, and a neighbour's density is looked up under
the neighbour's own index.

Duplicates: every distance is floored at 1/1000 of the reference set's median k-distance, and LID at most 1000 (it is infinite when
all neighbours are equally far). So more than k identical embeddings give finite scores; a copy of them looks dense.
"""

from collections.abc import Callable

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.errors import check
from sanitize.stages.encoders import Encoder

_FLOOR = 1e-3  # of the reference set's median k-distance
_LARGEST_LID = 1000.0


def nearest(reference: Tensor, count: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` nearest reference rows of each query; without queries, of each reference row, none its own neighbour.

    reference: (m, D) float64, queries: (B, D) float64
    returns: (B, count) float64 distances, ascending; (B, count) int64 rows of the reference
    """
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(reference.numpy())
    rows = torch.from_numpy(search.kneighbors(None if queries is None else queries.numpy(), return_distance=False))
    queries = reference if queries is None else queries
    # scikit-learn's product form cancels for close pairs: the few that it found again, exactly
    exact = torch.stack([torch.linalg.vector_norm(queries - reference[row], dim=1) for row in rows.T], dim=1)
    distances, order = exact.sort(dim=1, stable=True)
    return distances, rows.gather(1, order)


def lid(distances: Tensor) -> Tensor:
    """(B,) local intrinsic dimension by maximum likelihood from (B, k + 1) ascending distances above 0."""
    logs = (distances[:, :-1] / distances[:, -1:]).log().sum(dim=1)
    count = distances.shape[1] - 1
    return -count / logs.clamp(max=-count / _LARGEST_LID)


def slof(kd: Tensor, around: Tensor) -> Tensor:
    """(B,) mean over neighbours o of kd(q) / kd(o); kd (B,), around (B, k) the neighbours' k-distances."""
    return (kd[:, None] / around).mean(dim=1)


def dao(kd: Tensor, around: Tensor, around_lid: Tensor) -> Tensor:
    """(B,) mean over neighbours o of LID(o) log(kd(q) / kd(o)): the log, as in the reference code (dao.py); the power explodes."""
    return (around_lid * (kd[:, None] / around).log()).mean(dim=1)


# each: (B, k + 1) ascending distances, (B, k) k-distances and LIDs of the neighbours → (B,)
_KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kdistance": lambda distances, _around, _around_lid: distances[:, -2],
    "lid": lambda distances, _around, _around_lid: lid(distances),
    "slof": lambda distances, around, _around_lid: slof(distances[:, -2], around),
    "dao": lambda distances, around, around_lid: dao(distances[:, -2], around, around_lid),
}


def fit(
    reference_set: ReferenceSet,
    encoder: Encoder,  # noqa: ARG001 every fit starts with reference set, encoder and seed
    seed: int,  # noqa: ARG001
    kind: str = "dao",
    k: int = 16,
    unit: bool = False,
) -> Score:
    """kind: kdistance | lid | slof | dao; k: neighbours; unit: compare directions only, raw embeddings otherwise."""
    check(kind in _KINDS, f"kind: {kind!r} is not one of {', '.join(_KINDS)}.")
    size = len(reference_set.embeddings)
    check(
        1 <= k <= size - 2,
        f"k: {k} neighbours in a reference set of {size} images; give 1 to {size - 2}, or a larger set.",
    )
    centre = reference_set.embeddings.double().mean(dim=0) * (not unit)

    def points(embeddings: Tensor) -> Tensor:
        embeddings = embeddings.cpu().double()
        return functional.normalize(embeddings, dim=1) if unit else embeddings - centre

    reference = points(reference_set.embeddings)
    distances, _ = nearest(reference, k + 1)
    floor = smallest_distance(distances[:, k - 1])
    distances = distances.clamp(min=floor)
    reference_kd, reference_lid = distances[:, k - 1], lid(distances)

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        distances, neighbours = nearest(reference, k + 1, points(embeddings))
        around = neighbours[:, :k]
        return _KINDS[kind](distances.clamp(min=floor), reference_kd[around], reference_lid[around]).float()

    return score


def smallest_distance(kd: Tensor) -> float:
    """The floor of all distances, from the reference set's (m,) k-distances; those of duplicates (0) do not count."""
    positive = kd[kd > 0]
    return _FLOOR * float(positive.median()) if len(positive) else 1.0
