"""What one detector gives one victim's images, computed or from an earlier run; the benchmark draws its pools from these."""

import dataclasses
import hashlib
import io
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import red_team
from pipelines.data import load_images
from sanitize import checkpoint, runtime, storage
from sanitize.checkpoint import Detector
from sanitize.config import (
    FitConfig,
    ThresholdPolicy,
    altered_share,
    check,
    from_mapping,
    load_encoder_spec,
    overlay,
    preset,
)
from sanitize.detectors import bank
from sanitize.detectors.bank import Bank
from sanitize.fit import fit
from sanitize.judge import distrust
from sanitize.records import Picture
from sanitize.stages.encoders import load_encoder
from sanitize.stages.reactions import adapted, signature

Floats = NDArray[np.float32]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Settings that all detectors share. out: folder of scores and fits; fit: settings of FitConfig."""

    out: str
    zoo: str
    preset: str
    auxiliary_images: int
    test_images: int
    fit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Victim:
    """One attack with its data in memory; images (N, 3, S, S) uint8."""

    name: str
    encoders: dict[str, str]  # "backdoored", "clean" → encoder.yaml
    test: Tensor
    labels: Tensor  # of the test images
    target: int
    triggered: Tensor  # the test images of other classes than the target, in order
    triggered_target: Tensor  # those of the target class, kept apart
    auxiliary: dict[str, str]  # name → shard pattern
    asr: float
    clean_accuracy: float


@dataclass(frozen=True)
class Scored:
    """Scores, and their cost.

    triggered_target: (0,) for baselines
    signatures: (N, V + 2) of clean, then triggered images, of the scorer `reaction` when it altered every image; else (0, 0)
    """

    clean: Floats
    triggered: Floats
    triggered_target: Floats
    signatures: Floats
    fit_seconds: float
    images_per_second: float


def scored(study: Study, victim: Victim, kind: str, aux: str, seed: int, detector: str, settings: Settings) -> Scored:
    """Of one encoder (kind: backdoored or clean), auxiliary set and seed: from an earlier run, or computed now."""
    name = settings.get("scorer", detector)
    path = Path(study.out) / victim.name / f"{kind}-{aux}-{seed}" / f"{name}-{_key(study, settings)}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        compute = product if "scorer" in settings else baseline
        result = compute(study, victim, kind, aux, seed, settings)
        unscored = int((~np.isfinite(np.concatenate([result.clean, result.triggered]))).sum())
        check(
            unscored == 0,
            f"{victim.name}, {kind} encoder, {aux} auxiliary set, seed {seed}: {unscored} of "
            f"{len(result.clean) + len(result.triggered)} scores of {name} ({settings}) are not finite. Nothing was kept; "
            "mend the detector, or take it out of `detectors`.",
        )
        buffer = io.BytesIO()
        np.savez(buffer, **dataclasses.asdict(result))
        storage.write_bytes(str(path), buffer.getvalue())
    with np.load(path) as arrays:
        return Scored(
            *(arrays["clean"], arrays["triggered"], arrays["triggered_target"], arrays["signatures"]),
            *(float(arrays["fit_seconds"]), float(arrays["images_per_second"])),
        )


def _key(study: Study, settings: Settings) -> str:
    settings = {name: value for name, value in settings.items() if name not in ("only", "adapt")}
    return storage.json_sha256([settings, study.fit, study.auxiliary_images, study.test_images])[:8]


# ---------------------------------------------------------------- scorers of `sanitize fit`


def product(study: Study, victim: Victim, kind: str, aux: str, seed: int, settings: Settings) -> Scored:
    """Fitted and scored by the product's own functions."""
    detector, seconds = fitted(study, victim, kind, aux, seed, settings)
    encoder = checkpoint.load_matching_encoder(detector, None)
    scorer = checkpoint.scorer(detector, encoder, "auto", runtime.device(), effort=settings.get("effort", "thorough"))
    counts = [len(victim.test), len(victim.triggered), len(victim.triggered_target)]
    images = torch.cat([victim.test, victim.triggered, victim.triggered_target])
    start = time.monotonic()
    found = [scorer(pictures(part)) for part in images.split(256)]
    rate = len(images) / (time.monotonic() - start)
    scores = np.concatenate([getattr(batch, settings.get("column", "score")) for batch in found])
    signatures = np.empty((0, 0), np.float32)
    if detector.clean and altered_share(settings.get("effort", "thorough")) == 1:
        columns = (
            torch.from_numpy(np.concatenate([getattr(batch, name) for batch in found]))
            for name in ("embedding_norm", "neighbour_distance")
        )
        observed = torch.from_numpy(np.concatenate([batch.reactions for batch in found], axis=1).T)
        signatures = signature(observed, *columns).numpy()[: counts[0] + counts[1]]
    clean, triggered, target = np.split(scores, np.cumsum(counts)[:2])
    return Scored(clean, triggered, target, signatures, seconds, rate)


def fitted(study: Study, victim: Victim, kind: str, aux: str, seed: int, settings: Settings) -> tuple[Detector, float]:
    """The detector and the seconds its fit took. Equal encoders, auxiliary sets and settings share a folder."""
    spec = load_encoder_spec(victim.encoders[kind])
    values = overlay(overlay(preset(settings.get("preset", "default")), study.fit), settings.get("fit", {}))
    values |= {"scorer": settings["scorer"], "limit": study.auxiliary_images, "seed": seed, "workers": 0}
    identity = [storage.file_sha256(spec.weights), victim.auxiliary[aux], values]
    folder = Path(study.out) / "detectors" / storage.json_sha256(identity)[:12]
    timer = folder / "seconds.json"
    if not timer.exists():
        start = time.monotonic()
        shards = {"shards": [victim.auxiliary[aux]], "encoder": spec, "out": str(folder)}
        fit(from_mapping(FitConfig, values | shards, "fit"))
        storage.write_json(str(timer), {"seconds": time.monotonic() - start})
    return checkpoint.load(str(folder)), float(storage.read_json(str(timer))["seconds"])


def pictures(images: Tensor) -> list[Picture]:
    height, width = images.shape[-2:]
    return [Picture(i, str(i), "00" * 32, image, width, height, "ok", "") for i, image in enumerate(images)]


def adapted_to_pool(detector: Detector, scores: Floats, signatures: Floats) -> Floats:
    """What pass 2 of a scan of this pool would decide by (sanitize/judge.py)."""
    if detector.clean is None or distrust(scores, detector.calibration("thorough"), ThresholdPolicy()):
        return scores
    return adapted(detector.clean, signatures).distance(torch.from_numpy(signatures)).numpy()


# ---------------------------------------------------------------- files of sanitize/detectors


def baseline(study: Study, victim: Victim, kind: str, aux: str, seed: int, settings: Settings) -> Scored:
    """In memory; it sees what a fit would see. Embedding the images counts as its time."""
    ours = ("detector", "only", "each_pool", "rate", "bank")
    values = {name: value for name, value in settings.items() if name not in ours}
    encoder = load_encoder(load_encoder_spec(victim.encoders[kind])).to(runtime.device())
    size = encoder.spec.image_size
    if "other" in values:  # an independent encoder: the clean one of another victim
        other, _ = red_team.make(values["other"], study.preset, study.zoo)
        values["other"] = load_encoder(load_encoder_spec(storage.join(other, "clean", "encoder.yaml")))
        check(
            values["other"].spec.image_size == size,
            f"{settings['other']}: its encoder sees {values['other'].spec.image_size} pixels, victim {victim.name} {size}. "
            "Name an independent encoder of the victim's size, or leave this victim out with `only: {attacks: [...]}`.",
        )
    known, seen, fit_seconds = embedded(victim.encoders[kind], victim.auxiliary[aux], study.auxiliary_images, size)
    images = torch.cat([victim.test, victim.triggered])
    embeddings, seconds = embedded_pool(victim, kind)
    start = time.monotonic()
    fitted_on = Bank(images, embeddings) if settings.get("bank") == "pool" else Bank(known, seen)
    score = bank.load(settings["detector"])(fitted_on, encoder, seed, **values)
    fit_seconds += time.monotonic() - start
    start = time.monotonic()
    scores = score(images, embeddings).numpy().astype(np.float32)
    rate = len(images) / (seconds + time.monotonic() - start)
    count = len(victim.test)
    nothing = np.empty(0, np.float32)
    return Scored(scores[:count], scores[count:], nothing, nothing.reshape(0, 0), fit_seconds, rate)


@lru_cache(maxsize=2)
def embedded(encoder: str, pattern: str, limit: int, size: int) -> tuple[Tensor, Tensor, float]:
    """Auxiliary images, their embeddings, and the seconds the embedding took."""
    known = load_images((pattern,), limit, size, labelled=False).pixels
    start = time.monotonic()
    seen = bank.embed(load_encoder(load_encoder_spec(encoder)).to(runtime.device()), known)
    return known, seen, time.monotonic() - start


KEPT = 8  # pools in memory
POOLS: dict[tuple[str, str, bytes], tuple[Tensor, float]] = {}


def embedded_pool(victim: Victim, kind: str) -> tuple[Tensor, float]:
    """Embeddings of the clean and triggered test images, computed once, and the seconds that took."""
    key = victim.name, kind, hashlib.sha256(victim.triggered.numpy().tobytes()).digest()
    if key not in POOLS:
        if len(POOLS) >= KEPT:
            POOLS.clear()
        encoder = load_encoder(load_encoder_spec(victim.encoders[kind])).to(runtime.device())
        start = time.monotonic()
        POOLS[key] = bank.embed(encoder, torch.cat([victim.test, victim.triggered])), time.monotonic() - start
    return POOLS[key]
