"""Controls and baselines: each a function from images or embeddings to one score per sample, higher = more suspicious.

Adding one: a file with `fit(reference_set, encoder, seed, **settings) -> Score`, and a line in DETECTORS (docs/extending.md).
DECREE (decree/) stands apart: it judges encoders; `decree_score` is the sample score derived from it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sanitize.detectors import (
    activation_clustering,
    asset,
    backdoor_ids,
    cross_encoder,
    decree_score,
    density,
    energy,
    isolation_forest,
    lorex,
    norm,
    patch_search,
    spectral,
    whitened_norm,
)
from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.errors import ConfigError
from sanitize.stages.encoders import Encoder

DETECTORS: dict[str, Callable[..., Score]] = {
    "activation_clustering": activation_clustering.fit,
    "asset": asset.fit,
    "backdoor_ids": backdoor_ids.fit,
    "cross_encoder": cross_encoder.fit,
    "decree": decree_score.fit,
    "density": density.fit,
    "energy": energy.fit,
    "isolation_forest": isolation_forest.fit,
    "lorex": lorex.fit,
    "norm": norm.fit,
    "patch_search": patch_search.fit,
    "spectral": spectral.fit,
    "whitened_norm": whitened_norm.fit,
}


def check_detector(name: str, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a detector that is not known, and for a setting that it does not have."""
    if name not in DETECTORS:
        raise ConfigError(f"detector {name!r} is not known. Use one of {', '.join(DETECTORS)}.")
    parameters = inspect.signature(DETECTORS[name]).parameters.values()
    known = [parameter.name for parameter in parameters][3:]  # after reference set, encoder and seed
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)  # checks them itself
    if unknown := [setting for setting in settings if setting not in known and not open_ended]:
        raise ConfigError(
            f"detector {name}: unknown setting {', '.join(map(repr, unknown))}. It has: {', '.join(known) or 'none'}."
        )


def fit_detector(
    name: str, reference_set: ReferenceSet, encoder: Encoder, seed: int, settings: Mapping[str, Any]
) -> Score:
    """Raises ConfigError as `check_detector` does."""
    check_detector(name, settings)
    return DETECTORS[name](reference_set, encoder, seed, **settings)
