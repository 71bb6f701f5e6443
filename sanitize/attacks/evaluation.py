"""Did the attack work? Predictions on frozen embeddings, before anything is claimed about detection."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sanitize.attacks.backdoor import unit
from sanitize.metrics import accuracy, attack_success
from sanitize.training.embedding_cache import LabelledEmbeddings


@dataclass(frozen=True)
class HeadConfig:
    """MLP 512-256, ReLU, dropout 0.5 after the first layer, Adam.

    Published: 500 epochs, 1e-4, batch 64 (BadEncoder's code, training_downstream_classifier.py).
    """

    epochs: int = 60
    learning_rate: float = 1e-3
    batch_size: int = 256


def train_head(features: LabelledEmbeddings, classes: int, config: HeadConfig, seed: int) -> nn.Module:
    """(N, D) embeddings → logits (N, classes)."""
    torch.manual_seed(seed)
    size = features.embeddings.shape[1]
    head = nn.Sequential(
        nn.Linear(size, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes)
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(features.labels)).split(config.batch_size):
            loss = nn.functional.cross_entropy(head(features.embeddings[batch]), features.labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def head_predictions(head: nn.Module, embeddings: Tensor) -> Tensor:
    logits: Tensor = head(embeddings)
    return logits.argmax(dim=1)


@torch.no_grad()
def choose_references(head: nn.Module, features: LabelledEmbeddings, target: int, count: int, pool: int = 0) -> Tensor:
    """(count,) positions of reference images of the target class. An oracle choice: a real attacker has a surrogate.

    The surest `count` by the head; or, with a `pool` of the surest, those of it that lie farthest apart.
    """
    probability = head(features.embeddings).softmax(dim=1)[:, target]
    surest = torch.where(features.labels == target, probability, -1.0).argsort(descending=True)[: max(pool, count)]
    if not pool:
        return surest
    embeddings, chosen = features.embeddings[surest], [0]
    while len(chosen) < count:
        nearest = (embeddings @ embeddings[chosen].T).max(dim=1).values
        chosen.append(int(nearest.argmin()))
    return surest[chosen]


@dataclass(frozen=True)
class EncoderOutputs:
    """What one encoder and its classifier make of the test images, clean and triggered."""

    embeddings: Tensor  # (N, D) raw
    triggered_embeddings: Tensor  # (N, D) raw
    predictions: Tensor  # (N,) class index
    triggered_predictions: Tensor  # (N,)


@dataclass(frozen=True)
class AttackReport:
    """One victim. Accuracies and rates in [0, 1]; `asr*` exclude images of the target class."""

    clean_accuracy: float  # clean encoder, clean images
    backdoored_accuracy: float  # backdoored encoder, clean images
    asr: float  # backdoored encoder, triggered images
    asr_clean_encoder: float  # the same trigger, clean encoder
    cos_triggered: float  # mean pairwise cosine of triggered embeddings, backdoored encoder
    cos_clean: float  # the same of clean images
    distance_triggered: float  # SWD / D between triggered and clean raw embeddings, backdoored encoder (drupe.py)
    norm_triggered: float  # mean raw norm of triggered embeddings, backdoored encoder
    norm_triggered_std: float
    norm_clean: float  # the same of clean images
    norm_clean_std: float
    norm_clean_encoder: float  # of clean images under the clean encoder


def report(clean: EncoderOutputs, backdoored: EncoderOutputs, labels: Tensor, target: int) -> AttackReport:
    """labels (N,) of the test images."""
    truth = labels.numpy()
    norms, triggered_norms = backdoored.embeddings.norm(dim=1), backdoored.triggered_embeddings.norm(dim=1)
    directions = unit(torch.randn(200, backdoored.embeddings.shape[1], generator=torch.Generator().manual_seed(0)))
    distance = sliced_wasserstein(backdoored.triggered_embeddings, backdoored.embeddings, directions)
    return AttackReport(
        clean_accuracy=accuracy(clean.predictions.numpy(), truth),
        backdoored_accuracy=accuracy(backdoored.predictions.numpy(), truth),
        asr=attack_success(backdoored.triggered_predictions.numpy(), truth, target),
        asr_clean_encoder=attack_success(clean.triggered_predictions.numpy(), truth, target),
        cos_triggered=mean_pairwise_cosine(backdoored.triggered_embeddings),
        cos_clean=mean_pairwise_cosine(backdoored.embeddings),
        distance_triggered=float(distance / backdoored.embeddings.std(dim=0).mean()),
        norm_triggered=float(triggered_norms.mean()),
        norm_triggered_std=float(triggered_norms.std()),
        norm_clean=float(norms.mean()),
        norm_clean_std=float(norms.std()),
        norm_clean_encoder=float(clean.embeddings.norm(dim=1).mean()),
    )


def mean_pairwise_cosine(embeddings: Tensor) -> float:
    """Over all pairs of different rows of (N, D)."""
    count = len(embeddings)
    return float((unit(embeddings).sum(dim=0).square().sum() - count) / (count * (count - 1)))


def sliced_wasserstein(first: Tensor, second: Tensor, directions: Tensor) -> Tensor:
    """Sliced 2-Wasserstein distance of two equally large samples (B, D) along (P, D) unit directions."""
    ordered = [(sample @ directions.T).sort(dim=0).values for sample in (first, second)]
    return (ordered[0] - ordered[1]).square().mean().clamp(min=1e-12).sqrt()  # at 0 a root has no gradient
