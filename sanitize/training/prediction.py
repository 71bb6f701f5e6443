"""Queries → predictor: a student trained from scratch, or a ridge regression on the features of a reference encoder."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sanitize import runtime, storage
from sanitize.config import FitConfig
from sanitize.config_models import PredictionConfig
from sanitize.errors import ConfigError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.agreement import NONE, Departures, quantised
from sanitize.stages.encoders import load_encoder
from sanitize.stages.evidence import WORTHLESS
from sanitize.stages.prediction import (
    EYE,
    LinearEye,
    Predictor,
    Student,
    explained,
    fit_departure,
    fit_target,
)
from sanitize.stages.tails import Floats
from sanitize.training import split
from sanitize.training.crowd import Crowd, find_crowd
from sanitize.training.queries import Queries, QueryTask, ask

log = logging.getLogger(__name__)
HELD_OUT = 0.2  # of the training images: R² and residuals are measured on them
FEWEST = 50  # of them
TRIMMED = 3  # times the contamination: of a batch of 128 at 1 %, hardly one in fifty has more poison than that
PENALTIES = tuple(10.0**power for power in range(-6, 3))  # of the ridge, relative to the mean eigenvalue


@dataclass(frozen=True)
class Prediction:
    """predictor: None when there is none, or when it is worth nothing. Of the calibration images: energy (n,) float32, and what pass 2
    compares samples by. crowded: share of the changed views that came to a crowded place (crowd.py); None: not looked for."""

    predictor: Predictor | None
    energy: Floats
    departures: Departures
    explained: float | None
    crowded: float | None = None


_NOTHING = np.empty(0, np.float32)
NO_PREDICTION = Prediction(None, _NOTHING, NONE, None)


def reference_fingerprint(config: FitConfig, fingerprint: str) -> str:
    """Of the reference encoder, "" without one. fingerprint: of the suspect. Raises ConfigError when both are one, or see other images."""
    if config.reference is None:
        return ""
    name, found = (
        config.reference.weights or config.reference.architecture,
        load_encoder(config.reference).fingerprint(),
    )
    if found == fingerprint:
        raise ConfigError(
            f"reference {name}: is the encoder under test itself, which would vouch for itself. Give one that its maker does not "
            "control, best the public encoder it was fine-tuned from, or leave --reference out."
        )
    if config.reference.image_size != config.encoder.image_size:
        raise ConfigError(
            f"reference {name}: sees images of {config.reference.image_size} pixels, the encoder under test {config.encoder.image_size}. "
            f"Set `image_size: {config.encoder.image_size}` in the reference's YAML if it is convolutional, or give another reference."
        )
    return found


def learn_to_predict(
    config: FitConfig, shards: Sequence[Shard], training: Tensor, calibration: Tensor, resources: Resources
) -> Prediction:
    """training, calibration: (n, 32) SHA-256 of their images. A fifth of the training images is kept out to judge the predictor."""
    chosen = training[: config.prediction.images]
    judging = split.held_out(chosen, HELD_OUT, config.seed + 1)
    if not config.views:
        return NO_PREDICTION
    if (count := int(judging.sum())) < FEWEST:
        needed = math.ceil(1.1 * FEWEST / HELD_OUT / (1 - config.training.calibration_fraction))
        log.warning(
            "no prediction: %d auxiliary images leave %d to judge a predictor by, %d are needed. Give about %d images; the scores rest on "
            "where embeddings lie and how they react, which an informed attacker can imitate",
            len(training) + len(calibration),
            count,
            FEWEST,
            needed,
        )
        return NO_PREDICTION
    task = QueryTask(
        encoder=config.encoder,
        reference=config.reference,
        eye_size=min(config.encoder.image_size, EYE),
        views=config.views,
        seed=config.seed,
        precision=config.training.precision,
        batch_size=config.batch_size,
        image_member=config.image_member,
        wanted=torch.cat([chosen, calibration]),
        cache=storage.absolute(storage.join(config.out, "cache", "queries")),
    )
    queries = ask(task, shards, resources, config.address)
    row = {bytes(name): position for position, name in enumerate(queries.hashes.numpy())}
    of_training, of_judging, of_calibration = (
        queries.select(torch.tensor([row[bytes(name)] for name in names.numpy()]))
        for names in (chosen[~judging], chosen[judging], calibration)
    )
    predictor, crowd = fit_predictor(
        of_training, of_judging, config.prediction, config.seed, runtime.device(), config.contamination
    )
    crowded = (crowd.share if crowd else 0.0) if config.views > 1 else None
    if crowd:
        log.warning(
            "%.1f %% of the benignly changed images have embeddings that crowd one place, where their content does not put them: benign "
            "changes seem to trigger a backdoor. The predictor learns from the others; see `sanitize inspect`",
            100 * crowd.share,
        )
    if predictor.explained < WORTHLESS:
        log.warning(
            "no prediction: what was learnt explains %.2f of the encoder's embeddings of new images (R²), less than %g. Give --reference, "
            "best the encoder this one was fine-tuned from, or more auxiliary images; the scores rest on where embeddings lie and how they "
            "react, which an informed attacker can imitate",
            predictor.explained,
            WORTHLESS,
        )
        return Prediction(None, _NOTHING, NONE, predictor.explained, crowded)
    log.info("the predictor explains %.2f of the encoder's embeddings of new images (R²)", predictor.explained)
    energy, departures = _departures(predictor, of_calibration)
    departures = _without_the_worst(departures, energy, config.contamination, config.seed)
    return Prediction(predictor, energy, departures, predictor.explained, crowded)


@torch.inference_mode()
def _departures(predictor: Predictor, queries: Queries) -> tuple[Floats, Departures]:
    """Energy (N,) and departures of the plain views."""
    parts = zip(queries.embeddings[:, 0].split(1024), queries.seen[:, 0].split(1024), strict=True)
    found = [predictor(embeddings, _as_input(seen)) for embeddings, seen in parts]
    whitened, energy = (torch.cat(columns).numpy() for columns in zip(*found, strict=True))
    hashes = queries.image_hashes.numpy().view("<u8").reshape(-1)
    return energy, Departures(quantised(whitened), hashes)


def _without_the_worst(departures: Departures, energy: Floats, contamination: float, seed: int) -> Departures:
    """Of a share `contamination`, those of the highest energy (N,), nothing is known: they are replaced by those of other images."""
    count = math.ceil(contamination * len(energy))
    order, rows = np.argsort(energy, kind="stable"), np.arange(len(energy))
    if count:
        rows[order[-count:]] = np.random.default_rng(seed).choice(order[:-count], count)
    return Departures(departures.residuals[rows], departures.hashes[rows])


def fit_predictor(
    training: Queries,
    held_out: Queries,
    config: PredictionConfig,
    seed: int,
    device: torch.device,
    contamination: float = 0.0,
) -> tuple[Predictor, Crowd | None]:
    """training teaches the eye; held_out, images it never saw, gives R² and what residuals of clean images are like. Of neither do views
    count that lie in a crowd.

    contamination: share of both that may be poison: as many are left out, of those that are predicted worst
    """
    target = fit_target(training.embeddings[:, 0], config.components)
    eye_size = training.seen.shape[-1] if training.seen.ndim == 5 else 0
    targets, seen = target(training.embeddings.flatten(0, 1)), training.seen.flatten(0, 1)
    held_targets, held_seen = target(held_out.embeddings.flatten(0, 1)), held_out.seen.flatten(0, 1)
    crowd = find_crowd(targets.unflatten(0, training.embeddings.shape[:2]), training.image_hashes)
    if crowd:
        apart, held_apart = ~crowd.holds(targets), ~crowd.holds(held_targets)
        targets, seen = targets[apart], seen[apart]
        held_targets, held_seen = held_targets[held_apart], held_seen[held_apart]
    if eye_size:
        eye: Student | LinearEye = train_student(seen, targets, config, seed, device, contamination)
    else:
        eye = fit_ridge(seen, targets, held_seen, held_targets)
        if contamination:
            best = _predicted_best(targets, _predicted(eye, seen), contamination)
            eye = fit_ridge(seen[best], targets[best], held_seen, held_targets)
    predicted = _predicted(eye, held_seen)
    if contamination:
        best = _predicted_best(held_targets, predicted, contamination)
        held_targets, predicted = held_targets[best], predicted[best]
    departure = fit_departure(held_targets, predicted)
    return Predictor(eye, target, departure, explained(held_targets, predicted), eye_size), crowd


def _predicted_best(targets: Tensor, predicted: Tensor, contamination: float) -> Tensor:
    """Positions of all but a share `contamination` of (N, k + 1), in order."""
    errors = (targets - predicted).square().sum(dim=1)
    kept = len(errors) - math.ceil(contamination * len(errors))
    return errors.argsort()[:kept].sort().values


def train_student(
    images: Tensor,
    targets: Tensor,
    config: PredictionConfig,
    seed: int,
    device: torch.device,
    contamination: float = 0.0,
) -> Student:
    """images (N, 3, E, E) uint8, targets (N, k + 1) → student in eval mode, on the CPU.

    A trimmed loss: of every batch a share TRIMMED * contamination, the worst predicted, teaches nothing once the first epoch is through.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = Student(targets.shape[1], config.width).to(device).train()
    batch_size = min(config.batch_size, len(images))
    per_epoch = len(images) // batch_size
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(config.epochs * per_epoch, 2)
    )
    with ProgressDisplay("train the student", config.epochs, config.epochs * len(images)) as display:
        for epoch in range(config.epochs):
            for batch in split.shuffled_batches(len(images), batch_size, generator):
                predicted = student(images[batch].to(device).float() / 255)
                losses = functional.smooth_l1_loss(predicted, targets[batch].to(device), reduction="none").mean(dim=1)
                taught = batch_size - (math.ceil(TRIMMED * contamination * batch_size) if epoch else 0)
                loss = losses.topk(taught, largest=False).values.mean() if taught < batch_size else losses.mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            done = (epoch + 1) * len(images)
            display.update(epoch + 1, done, done)
    return student.cpu().eval().requires_grad_(False)


def fit_ridge(features: Tensor, targets: Tensor, held_features: Tensor, held_targets: Tensor) -> LinearEye:
    """features (N, F), targets (N, k + 1). The penalty is the one that predicts the held-out images best."""
    eye = LinearEye(features.shape[1], targets.shape[1])
    seen = eye.seen(features)
    eye.mean.copy_(seen.mean(dim=0))
    centred, level = (seen - eye.mean).double(), targets.double().mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    projected = vectors.T @ centred.T @ (targets.double() - level)
    best = -torch.inf
    for penalty in PENALTIES:
        weights = vectors @ (projected / (values.clamp(min=0) + penalty * values.clamp(min=0).mean())[:, None])
        candidate = LinearEye(features.shape[1], targets.shape[1])
        candidate.load_state_dict({"mean": eye.mean, "linear.weight": weights.T.float(), "linear.bias": level.float()})
        quality = explained(held_targets, _predicted(candidate, held_features))
        if quality > best:
            best, eye = quality, candidate
    return eye.eval().requires_grad_(False)


@torch.inference_mode()
def _predicted(eye: Student | LinearEye, seen: Tensor) -> Tensor:
    """(N, k + 1) of uint8 images or float32 features, on the CPU."""
    return torch.cat([eye(_as_input(part)) for part in seen.split(1024)])


def _as_input(seen: Tensor) -> Tensor:
    return seen.float() / 255 if seen.dtype == torch.uint8 else seen
