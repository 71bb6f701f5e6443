"""An attacker who knows `evidence`: he also hides from a predictor of his own (our own; no paper).

He trains a student (stages/prediction.py) on queries to the clean encoder, as the defender will on queries to the backdoored one, and adds
to the objective of adaptive.py: triggered embeddings depart no further from what his student says of the triggered image than clean ones
do, and their departures have no common direction (stages/agreement.py).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanitize.attacks.adaptive import AdaptiveConfig, Perturbation
from sanitize.attacks.backdoor import Step, raw_embeddings
from sanitize.config_models import STUDENT_VIEWS, PredictionConfig
from sanitize.stages.benign_changes import change
from sanitize.stages.encoders import Encoder
from sanitize.stages.images import difference_hash, shrink
from sanitize.stages.prediction import EYE, Predictor
from sanitize.training.prediction import HELD_OUT, fit_predictor
from sanitize.training.queries import Queries


@dataclass(frozen=True)
class PredictiveConfig(AdaptiveConfig):
    """predict: weight of hiding from the student; scatter: of departures without a common direction; evade: of hiding from `reaction`."""

    predict: float = 0.03
    scatter: float = 0.03
    evade: float = 0.0


def own_queries(clean_encoder: Encoder, images: Tensor, views: int, seed: int) -> Queries:
    """images (N, 3, S, S) uint8 and benign changes of each, and what the clean encoder makes of them."""
    plain, seen = images.float() / 255, [images]
    for view in range(1, views):
        changed = [
            change(image, other, np.random.default_rng([seed, view, n]))
            for n, (image, other) in enumerate(zip(plain, plain.roll(1, dims=0), strict=True))
        ]
        seen.append((torch.stack(changed) * 255).round().byte())
    embeddings = torch.stack([raw_embeddings(clean_encoder, view) for view in seen], dim=1)
    eyes = [eye_of(view.float() / 255) for view in seen]
    names = torch.zeros(len(images), 32, dtype=torch.uint8)
    return Queries(names, difference_hash(plain), embeddings, (torch.stack(eyes, dim=1) * 255).round().byte())


def eye_of(images: Tensor) -> Tensor:
    return shrink(images, min(images.shape[-1], EYE)).clamp(0, 1)


@dataclass(frozen=True)
class Usual:
    """Mean and deviation of a statistic of clean held-out images."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Tensor) -> "Usual":
        return cls(float(values.mean()), float(values.std()))

    def excess(self, values: Tensor) -> Tensor:
        """Of (B,): mean log(1 + what exceeds the mean, in deviations)."""
        return ((values - self.mean) / self.deviation).clamp(min=0).log1p().mean()


def kept_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of images to learn from, and of a fifth to judge by."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    judging, learning = order.tensor_split([int(HELD_OUT * count)])
    return learning, judging


class OwnPredictor:
    """departing: excess energy (prediction.py); agreeing: log(1 + excess of the mean departure). usual: energy of clean images."""

    perturbations: tuple[Perturbation, ...] = ()

    def __init__(self, predictor: Predictor, usual: Usual) -> None:
        self.predictor = predictor
        self.usual = usual

    def __call__(self, step: Step) -> dict[str, Tensor]:
        whitened, energy = self.predictor(step.triggered.float(), eye_of(step.stamped))
        common = whitened.mean(dim=0).square().sum() * len(whitened) / whitened.shape[1]  # of clean images 1 on average
        return {"departing": self.usual.excess(energy), "agreeing": (common - 1).clamp(min=0).log1p()}


def own_predictor(clean_encoder: Encoder, shadow: Tensor, seed: int, device: torch.device) -> OwnPredictor:
    """shadow: (N, 3, S, S) uint8, a fifth of which judges the student."""
    config = PredictionConfig()
    queries = own_queries(clean_encoder, shadow, STUDENT_VIEWS, seed)
    learning, judging = kept_out(len(shadow), seed)
    held_out = queries.select(judging)
    predictor, _ = fit_predictor(queries.select(learning), held_out, config, seed, device)
    _, energy = predictor(held_out.embeddings[:, 0], held_out.seen[:, 0].float() / 255)
    return OwnPredictor(predictor.to(device), Usual.of(energy))
