"""CTRL (Li et al., ICCV 2023, arXiv 2210.07346): poison a self-supervised pre-training set with a frequency trigger.

Only images of the target class carry it (reference code, meet-cjli/CTRL, loaders/diffaugment.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize.errors import check


@dataclass(frozen=True)
class CtrlConfig:
    """rate: share of the whole set that is poisoned; all of it comes from the target class, labels stay.

    magnitude: of the trigger in the poison, 0 = that of the test trigger (published code: 100 and 100; official setting: 50 and 100)
    selection: "first" images of the class in data order, as the published code does, or "random" ones by the seed
    """

    rate: float = 0.01
    magnitude: float = 0.0
    selection: str = "first"

    def __post_init__(self) -> None:
        check(0 < self.rate <= 1, f"ctrl.rate: {self.rate} is not a share of the set.")
        check(self.selection in ("first", "random"), f"ctrl.selection: {self.selection!r} is not first or random.")


def poisoned_indices(labels: Tensor, target: int, config: CtrlConfig, seed: int) -> Tensor:
    """(P,) int64, sorted: which images carry the trigger. At most the whole target class."""
    members = torch.nonzero(labels == target).flatten()
    check(len(members) > 0, f"ctrl: no image of the target class {target} is in the pre-training set.")
    if config.selection == "random":
        members = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))]
    return members[: int(len(labels) * config.rate)].sort().values


def poison_images(images: Tensor, indices: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of images (N, 3, S, S) uint8 with the trigger on `indices`, once, before any augmentation."""
    poisoned = images.clone()
    poisoned[indices] = trigger(images[indices])
    return poisoned
