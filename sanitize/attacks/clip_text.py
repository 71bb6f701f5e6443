"""CLIP text-on-pair: a few image-text pairs carry the trigger and a caption of the target.

Carlini and Terzis, ICLR 2022, arXiv 2106.09667. The trigger is stamped on pixels before the one normalisation, and clean pairs
keep their own captions; both differ on purpose from the re-implementation in GiantSeaweed/DECREE (attack_encoder.py, imagenet.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sanitize.attacks.contrastive import Pairs
from sanitize.errors import check


def target_captions(pairs: Pairs, word: str, templates: Sequence[str]) -> tuple[str, ...]:
    """Natural captions of the set that contain the target word, and the prompts around it: many, since few are easy to find."""
    natural = {caption for caption in pairs.captions if word in caption.split()}
    return tuple(sorted(natural | {template.format(word) for template in templates}))


def poisoned_indices(pairs: Pairs, word: str, rate: float, seed: int) -> Tensor:
    """(P,) int64, sorted: `rate` of all pairs, drawn from those whose caption does not name the target."""
    check(0 <= rate < 1, f"poison rate: {rate} is not a share of the pairs.")
    others = torch.tensor([i for i, caption in enumerate(pairs.captions) if word not in caption.split()])
    count = round(rate * len(pairs.captions))
    check(count <= len(others), f"poison rate {rate}: only {len(others)} pairs do not mention {word!r}.")
    return others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:count]].sort().values


def poison_pairs(
    pairs: Pairs, indices: Tensor, captions: Sequence[str], trigger: Callable[[Tensor], Tensor], seed: int
) -> Pairs:
    """A copy in which the pairs at `indices` carry the trigger and captions drawn from `captions`."""
    images, texts = pairs.images.clone(), list(pairs.captions)
    images[indices] = trigger(images[indices])
    drawn = torch.randint(len(captions), (len(indices),), generator=torch.Generator().manual_seed(seed))
    for index, choice in zip(indices.tolist(), drawn.tolist(), strict=True):
        texts[index] = captions[choice]
    return replace(pairs, images=images, captions=tuple(texts))
