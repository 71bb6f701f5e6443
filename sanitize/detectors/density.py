"""Local density against a bank: k-distance, LID, SLOF and DAO (Huang et al., ICLR 2025; CLIP card sections 4 and 7).

The clean definitions, without the deviations of the reference code (card section 5): a bank image is never its own
neighbour, and a neighbour's density is looked up under the neighbour's own index.

Duplicates: every distance is floored at 1/1000 of the bank's median k-distance, and LID at most 1000 (it is infinite when
all neighbours are equally far). So more than k identical embeddings give finite scores; a copy of them looks dense.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sanitize.config import check
from sanitize.detectors.bank import Bank, Score
from sanitize.stages.encoders import Encoder

_QUERIES_AT_ONCE = 256
_FLOOR = 1e-3  # of the bank's median k-distance
_LARGEST_LID = 1000.0


def nearest(queries: Tensor, bank: Tensor, count: int, *, within: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` nearest bank rows of each query, tiled over queries.

    queries: (B, D) float64, bank: (m, D) float64; within: the queries are the bank's rows, and none is its own neighbour
    returns: (B, count) float64 distances, ascending; (B, count) int64 rows of the bank
    """
    rows = torch.arange(len(queries))
    tiles = [
        _nearest(part, bank, count, own if within else None)
        for part, own in zip(queries.split(_QUERIES_AT_ONCE), rows.split(_QUERIES_AT_ONCE), strict=True)
    ]
    distances, neighbours = zip(*tiles, strict=True)
    return torch.cat(distances), torch.cat(neighbours)


def _nearest(queries: Tensor, bank: Tensor, count: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    squared = queries.square().sum(1, keepdim=True) + bank.square().sum(1) - 2 * queries @ bank.T
    if own is not None:
        squared[torch.arange(len(own)), own] = torch.inf
    chosen = squared.topk(count, dim=1, largest=False).indices
    # the product form cancels for close pairs: the chosen few again, exactly
    exact = torch.stack([torch.linalg.vector_norm(queries - bank[row], dim=1) for row in chosen.T], dim=1)
    distances, order = exact.sort(dim=1, stable=True)
    return distances, chosen.gather(1, order)


def lid(distances: Tensor) -> Tensor:
    """(B,) local intrinsic dimension by maximum likelihood from (B, k + 1) ascending distances above 0."""
    logs = (distances[:, :-1] / distances[:, -1:]).log().sum(dim=1)
    count = distances.shape[1] - 1
    return -count / logs.clamp(max=-count / _LARGEST_LID)


def slof(kd: Tensor, around: Tensor) -> Tensor:
    """(B,) mean over neighbours o of kd(q) / kd(o); kd (B,), around (B, k) the neighbours' k-distances."""
    return (kd[:, None] / around).mean(dim=1)


def dao(kd: Tensor, around: Tensor, around_lid: Tensor) -> Tensor:
    """(B,) mean over neighbours o of LID(o) log(kd(q) / kd(o)): the log form, the power form explodes (card section 4)."""
    return (around_lid * (kd[:, None] / around).log()).mean(dim=1)


# each: (B, k + 1) ascending distances, (B, k) k-distances and LIDs of the neighbours → (B,)
_KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kdistance": lambda distances, _around, _around_lid: distances[:, -2],
    "lid": lambda distances, _around, _around_lid: lid(distances),
    "slof": lambda distances, around, _around_lid: slof(distances[:, -2], around),
    "dao": lambda distances, around, around_lid: dao(distances[:, -2], around, around_lid),
}


def fit(
    bank: Bank,
    encoder: Encoder,  # noqa: ARG001 every fit starts with bank, encoder and seed
    seed: int,  # noqa: ARG001
    kind: str = "dao",
    k: int = 16,
    unit: bool = False,
) -> Score:
    """kind: kdistance | lid | slof | dao; k: neighbours; unit: compare directions only, raw embeddings otherwise."""
    check(kind in _KINDS, f"kind: {kind!r} is not one of {', '.join(_KINDS)}.")
    size = len(bank.embeddings)
    check(1 <= k <= size - 2, f"k: {k} neighbours in a bank of {size} images; give 1 to {size - 2}, or a larger bank.")
    centre = bank.embeddings.double().mean(dim=0) * (not unit)

    def points(embeddings: Tensor) -> Tensor:
        embeddings = embeddings.cpu().double()
        return functional.normalize(embeddings, dim=1) if unit else embeddings - centre

    reference = points(bank.embeddings)
    distances, _ = nearest(reference, reference, k + 1, within=True)
    floor = smallest_distance(distances[:, k - 1])
    distances = distances.clamp(min=floor)
    bank_kd, bank_lid = distances[:, k - 1], lid(distances)

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        distances, neighbours = nearest(points(embeddings), reference, k + 1)
        around = neighbours[:, :k]
        return _KINDS[kind](distances.clamp(min=floor), bank_kd[around], bank_lid[around]).float()

    return score


def smallest_distance(kd: Tensor) -> float:
    """The floor of all distances, from the bank's (m,) k-distances; those of duplicates (0) do not count."""
    positive = kd[kd > 0]
    return _FLOOR * float(positive.median()) if len(positive) else 1.0
