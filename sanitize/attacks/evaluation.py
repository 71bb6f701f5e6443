"""Did the attack work? A downstream head on frozen embeddings, before anything is claimed about detection (card section 5)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sanitize.metrics import accuracy, attack_success


@dataclass(frozen=True)
class HeadConfig:
    """MLP 512-256, ReLU, dropout 0.5 after the first layer, Adam. Published: 500 epochs, 1e-4, batch 64."""

    epochs: int = 60
    learning_rate: float = 1e-3
    batch_size: int = 256


@dataclass(frozen=True)
class Features:
    """L2-normalised embeddings (N, D) and labels (N,) of one data split."""

    embeddings: Tensor
    labels: Tensor


def train_head(features: Features, classes: int, config: HeadConfig, seed: int) -> nn.Module:
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
def predict(head: nn.Module, embeddings: Tensor) -> Tensor:
    logits: Tensor = head(embeddings)
    return logits.argmax(dim=1)


@torch.no_grad()
def best_reference(head: nn.Module, features: Features, target: int) -> int:
    """Position of the image of the target class the head is surest of. An oracle choice: a real attacker has a surrogate."""
    probability = head(features.embeddings).softmax(dim=1)[:, target]
    return int(torch.where(features.labels == target, probability, -1.0).argmax())


@torch.no_grad()
def weighted_knn(bank: Features, queries: Features, classes: int, k: int = 200, temperature: float = 0.5) -> float:
    """Accuracy of a kNN vote with weights exp(cos / temperature) (card section 2)."""
    k = min(k, len(bank.labels))
    predictions = []
    for part in queries.embeddings.split(1024):
        cosine, neighbour = (part @ bank.embeddings.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, bank.labels[neighbour], (cosine / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return accuracy(torch.cat(predictions).numpy(), queries.labels.numpy())


@dataclass(frozen=True)
class AttackReport:
    """One victim. Accuracies and rates in [0, 1]; `asr*` exclude images of the target class."""

    knn_accuracy: float  # clean encoder
    clean_accuracy: float  # clean encoder's head, clean images
    backdoored_accuracy: float  # backdoored encoder's head, clean images
    asr: float  # backdoored encoder's head, triggered images
    asr_clean_encoder: float  # the same trigger, clean encoder's head
    cos_triggered: float  # mean pairwise cosine of triggered embeddings, backdoored encoder
    cos_clean: float  # the same of clean embeddings


def report(
    clean: dict[str, Features], backdoored: dict[str, Features], classes: int, target: int, head: HeadConfig, seed: int
) -> AttackReport:
    """clean, backdoored: features of the splits "train", "test" and "triggered" under each encoder."""
    clean_head = train_head(clean["train"], classes, head, seed)
    backdoored_head = train_head(backdoored["train"], classes, head, seed)
    labels = clean["test"].labels.numpy()

    def predictions(model: nn.Module, features: Features) -> Tensor:
        return predict(model, features.embeddings)

    return AttackReport(
        knn_accuracy=weighted_knn(clean["train"], clean["test"], classes),
        clean_accuracy=accuracy(predictions(clean_head, clean["test"]).numpy(), labels),
        backdoored_accuracy=accuracy(predictions(backdoored_head, backdoored["test"]).numpy(), labels),
        asr=attack_success(predictions(backdoored_head, backdoored["triggered"]).numpy(), labels, target),
        asr_clean_encoder=attack_success(predictions(clean_head, clean["triggered"]).numpy(), labels, target),
        cos_triggered=_mean_pairwise_cosine(backdoored["triggered"].embeddings),
        cos_clean=_mean_pairwise_cosine(backdoored["test"].embeddings),
    )


def _mean_pairwise_cosine(embeddings: Tensor) -> float:
    count = len(embeddings)
    return float((embeddings.sum(dim=0).square().sum() - count) / (count * (count - 1)))
