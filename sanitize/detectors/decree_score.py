"""The sample score derived from DECREE (ours, not the paper's): cosine with what the inverted trigger maps to."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sanitize.config_loading import from_mapping
from sanitize.detectors.decree.config import DecreeConfig, recommended
from sanitize.detectors.decree.inversion import generator_for, invert, stamped_embeddings
from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.stages.encoders import device_of


def fit(reference_set: ReferenceSet, encoder: nn.Module, seed: int, **settings: Any) -> Score:
    """The "DECREE-derived" sample score (ours, not the paper's): cosine with what the found trigger maps to.

    The trigger is inverted on a seeded part of the reference set's images, t is the mean normalised embedding of those images when
    stamped, and score(images, embeddings) = cos(embeddings, t), in [-1, 1]. All zero when no trigger was found.
    settings: of DecreeConfig; the defaults fit the reference set's image size.
    """
    values = recommended(reference_set.images.shape[-1]) | settings | {"seed": seed}
    config = from_mapping(DecreeConfig, values, "settings of decree")
    rows = torch.randperm(len(reference_set.images), generator=generator_for(seed))[: config.pool]
    images = reference_set.images[rows]
    best = invert(images, encoder, config).best
    if best is None:
        return lambda _images, embeddings: torch.zeros(len(embeddings))
    stamped = stamped_embeddings(images.to(device_of(encoder)), encoder, best)
    target = functional.normalize(stamped, dim=1).mean(dim=0, keepdim=True)
    return lambda _images, embeddings: functional.cosine_similarity(embeddings.float().cpu(), target, dim=1)
