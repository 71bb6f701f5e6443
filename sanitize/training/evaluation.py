"""How good a trained head or CLIP is on validation and triggered shards."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sanitize import metrics
from sanitize.config import EncoderSpec, FinetuneConfig
from sanitize.runtime import Resources
from sanitize.training.data import IndexedSource, embed_sources
from sanitize.training.embedding_cache import LabelledEmbeddings

Predict = Callable[[Tensor], NDArray[np.int64]]  # embeddings (B, D) → class numbers (B,)


def zero_shot(classes: Tensor) -> Predict:
    """classes: (C, D) unit embeddings of the class names"""

    def nearest(embeddings: Tensor) -> NDArray[np.int64]:
        predictions: NDArray[np.int64] = metrics.zero_shot_predictions(embeddings, classes).numpy()
        return predictions

    return nearest


def evaluate(
    config: FinetuneConfig,
    spec: EncoderSpec,
    fingerprint: str,
    predict: Predict,
    classes: int,
    sources: dict[str, IndexedSource],
    knn_features: LabelledEmbeddings | None,
    cache: str,
    resources: Resources,
) -> dict[str, float]:
    """The final weights on the sources `validation` and `triggered`, those of them that there are; rates in [0, 1].

    spec, fingerprint: of the encoder that goes with `predict`. knn_features: training embeddings for kNN, when there are any.
    """
    rates: dict[str, float] = {}
    measured = [source for name, source in sources.items() if name != "shards"]
    sets = embed_sources(config, spec, fingerprint, measured, cache, resources)
    if "validation" in sets:
        validation = sets["validation"]
        labels = validation.labels.numpy()
        rates["clean_accuracy"] = metrics.accuracy(predict(validation.embeddings), labels)
        if knn_features is not None:
            known, queries = (functional.normalize(f.embeddings, dim=1) for f in (knn_features, validation))
            votes = metrics.knn_predictions(known, knn_features.labels, queries, classes)
            rates["knn_accuracy"] = metrics.accuracy(votes.numpy(), labels)
    if "triggered" in sets:
        triggered = sets["triggered"]
        predictions = predict(triggered.embeddings)
        rates["attack_success"] = metrics.attack_success(predictions, triggered.labels.numpy(), config.target)
        rates["attack_success_with_target"] = metrics.attack_success_with_target(predictions, config.target)
    return rates
