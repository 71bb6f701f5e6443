"""What one detector gives one victim's images, computed or from an earlier run; the benchmark draws its pools from these."""

import dataclasses
import hashlib
import io
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import red_team
from pipelines.benchmark_config import BenchmarkConfig, DetectorConfig
from pipelines.data import load_images
from sanitize import runtime, storage
from sanitize.artifacts.detector_folder import (
    FORMAT_VERSION,
    Detector,
    load_detector,
    load_matching_encoder,
    make_scorer,
)
from sanitize.commands.fit import fit
from sanitize.config import FitConfig
from sanitize.config_loading import from_mapping, load_encoder_spec, overlay, to_mapping
from sanitize.detectors import fit_detector
from sanitize.detectors.reference_set import ReferenceSet
from sanitize.errors import check
from sanitize.presets import preset
from sanitize.records import DecodedImage
from sanitize.stages.adaptation import reason_not_to_adapt
from sanitize.stages.agreement import IMAGE_HASH, NONE, POOL, RESIDUALS, Departures, agreement_test, quantised
from sanitize.stages.clean_reference import adapted, embedding_statistics
from sanitize.stages.encoders import Encoder, embed_in_batches, load_encoder
from sanitize.stages.evidence import AGREEMENT, PREDICTION, combination
from sanitize.stages.evidence_adaptation import trusted_agreement, trusted_evidence, values_of
from sanitize.stages.images import DECODE_PATH
from sanitize.stages.perturbations import CHANGE_COLUMNS, encoder_passes

Floats = NDArray[np.float32]


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
    backdoored_accuracy: float


@dataclass(frozen=True)
class DetectorScores:
    """Scores, and their cost.

    triggered_target: (0,) for baselines
    statistics: (N, V + 2) of clean, then triggered images, of the scorers `reaction` and `evidence`; NaN where not perturbed; else (0, 0)
    residuals (N, k + 1), hashes (N,), energy (N,): likewise of the scorer `evidence`, what pass 2 compares samples by; else empty
    passes: encoder passes an image, on average
    """

    clean: Floats
    triggered: Floats
    triggered_target: Floats
    statistics: Floats
    fit_seconds: float
    images_per_second: float
    residuals: NDArray[np.int8] = field(default_factory=lambda: NONE.residuals)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: NONE.hashes)
    passes: float = 1.0
    energy: Floats = field(default_factory=lambda: np.empty(0, np.float32))

    def of(self, members: NDArray[np.int64]) -> "DetectorScores":
        """Of some of the clean, then triggered images: all in `clean`."""
        arrays = {name: getattr(self, name) for name in ("statistics", "residuals", "hashes", "energy")}
        chosen = {name: array[members] if len(array) else array for name, array in arrays.items()}
        scores = np.concatenate([self.clean, self.triggered])[members]
        return replace(self, clean=scores, triggered=scores[:0], **chosen)


def score_victim(
    config: BenchmarkConfig,
    victim: Victim,
    kind: str,
    aux: str,
    seed: int,
    detector: str,
    settings: DetectorConfig,
    pool_rate: float = 0,
) -> DetectorScores:
    """Of one encoder (kind: backdoored or clean), auxiliary set and seed: from an earlier run, or computed now.

    pool_rate: of the pool that the victim's triggered images make, for detectors that see each pool by itself
    """
    name = settings.scorer or detector
    key = _key(config, settings, pool_rate)
    path = Path(config.out) / victim.name / f"{kind}-{aux}-{seed}" / f"{name}-{key}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        compute = score_with_product if settings.scorer else score_with_baseline
        result = compute(config, victim, kind, aux, seed, settings)
        unscored = int((~np.isfinite(np.concatenate([result.clean, result.triggered]))).sum())
        check(
            unscored == 0,
            f"{victim.name}, {kind} encoder, {aux} auxiliary set, seed {seed}: {unscored} of "
            f"{len(result.clean) + len(result.triggered)} scores of {name} are not finite. Nothing was kept; "
            "mend the detector, or take it out of `detectors`.",
        )
        buffer = io.BytesIO()
        np.savez(buffer, **dataclasses.asdict(result))
        storage.write_bytes(str(path), buffer.getvalue())
    with np.load(path) as arrays:
        return DetectorScores(
            clean=arrays["clean"],
            triggered=arrays["triggered"],
            triggered_target=arrays["triggered_target"],
            statistics=arrays["statistics"],
            fit_seconds=float(arrays["fit_seconds"]),
            images_per_second=float(arrays["images_per_second"]),
            residuals=arrays["residuals"],
            hashes=arrays["hashes"],
            passes=float(arrays["passes"]),
            energy=arrays["energy"],
        )


DECIDING = ("only", "adapt", "agreement", "kinds")  # settings that scores of images do not depend on


def _key(config: BenchmarkConfig, settings: DetectorConfig, pool_rate: float) -> str:
    values = {name: value for name, value in to_mapping(settings).items() if name not in DECIDING}
    return storage.json_sha256([values, pool_rate, config.fit, config.auxiliary_images, config.test_images])[:8]


# ---------------------------------------------------------------- scorers of `sanitize fit`


def score_with_product(
    config: BenchmarkConfig, victim: Victim, kind: str, aux: str, seed: int, settings: DetectorConfig
) -> DetectorScores:
    """Fitted and scored by the product's own functions."""
    detector, seconds = fit_scorer(config, victim, kind, aux, seed, settings)
    encoder = load_matching_encoder(detector, None)
    scorer = make_scorer(detector, encoder, "auto", runtime.device(), effort=settings.effort)
    counts = [len(victim.test), len(victim.triggered), len(victim.triggered_target)]
    images = torch.cat([victim.test, victim.triggered, victim.triggered_target])
    start = time.monotonic()
    batches = [scorer(as_decoded(part)) for part in images.split(256)]
    rate = len(images) / (time.monotonic() - start)
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    statistics = np.empty((0, 0), np.float32)
    if CHANGE_COLUMNS[0] in columns:
        changes = torch.from_numpy(np.stack([columns[name] for name in CHANGE_COLUMNS], axis=1))
        norms, distances = (torch.from_numpy(columns[name]) for name in ("embedding_norm", "neighbour_distance"))
        statistics = embedding_statistics(changes, norms, distances).numpy()[: counts[0] + counts[1]]
    clean, triggered, target = np.split(columns[settings.column], np.cumsum(counts)[:2])
    pool = counts[0] + counts[1]
    residuals, hashes = NONE.residuals, NONE.hashes
    if RESIDUALS in columns:
        residuals = quantised(columns[RESIDUALS][:pool])
        hashes = np.ascontiguousarray(columns[IMAGE_HASH][:pool].astype(np.uint8)).view("<u8").reshape(-1)
    passes = encoder_passes({name: values[:pool] for name, values in columns.items()})
    energy = columns.get("prediction_energy", np.full(len(images), np.nan, np.float32))[:pool]
    return DetectorScores(clean, triggered, target, statistics, seconds, rate, residuals, hashes, passes, energy)


def fit_scorer(
    config: BenchmarkConfig, victim: Victim, kind: str, aux: str, seed: int, settings: DetectorConfig
) -> tuple[Detector, float]:
    """The detector and the seconds its fit took. Equal encoders, auxiliary sets and settings share a folder."""
    spec = load_encoder_spec(victim.encoders[kind])
    values = overlay(overlay(preset(settings.preset), config.fit), settings.fit)
    values |= {"scorer": settings.scorer, "limit": config.auxiliary_images, "seed": seed, "workers": 0}
    identity = [storage.file_sha256(spec.weights), victim.auxiliary[aux], values, FORMAT_VERSION, DECODE_PATH]
    folder = Path(config.out) / "detectors" / storage.json_sha256(identity)[:12]
    timer = folder / "seconds.json"
    if not timer.exists():
        start = time.monotonic()
        shards = {"shards": [victim.auxiliary[aux]], "encoder": spec, "out": str(folder)}
        fit(from_mapping(FitConfig, values | shards, "fit"))
        storage.write_json(str(timer), {"seconds": time.monotonic() - start})
    return load_detector(str(folder)), float(storage.read_json(str(timer))["seconds"])


def as_decoded(images: Tensor) -> list[DecodedImage]:
    """(B, 3, H, W) uint8 as a scan would have decoded them."""
    height, width = images.shape[-2:]
    return [DecodedImage(i, str(i), "00" * 32, image, width, height, "ok", "") for i, image in enumerate(images)]


def decided(detector: Detector, settings: DetectorConfig, found: DetectorScores) -> tuple[Floats, Floats]:
    """What pass 2 of a scan of these images would decide by (deciding.py), and its null distribution, sorted upwards. found: of the
    pool, all in `clean`."""
    effort, scores = settings.effort, found.clean
    calibration, reference = detector.calibration(effort), detector.adaptable_reference(effort)
    if detector.evidence:
        return _decided_by_evidence(detector, settings, found)
    if not settings.adapt or reference is None or reason_not_to_adapt(scores, calibration):
        return scores, calibration
    return adapted(reference, found.statistics).distance(torch.from_numpy(found.statistics)).numpy(), calibration


def _decided_by_evidence(detector: Detector, settings: DetectorConfig, found: DetectorScores) -> tuple[Floats, Floats]:
    assert detector.clean_reference
    evidence, scores, null = detector.combination(), found.clean, detector.calibration_scores(settings.effort)
    values = values_of(detector.clean_reference, found.statistics, found.energy)
    if settings.kinds:
        known = {kind: detector.evidence[kind] for kind in settings.kinds}
        evidence = combination(
            known, detector.predictor.explained if PREDICTION in known and detector.predictor else None
        )
        scores, null = evidence.score(values), evidence.score(detector.evidence)
    calibration = np.sort(null)
    if settings.adapt:
        moved = trusted_evidence(evidence, values, scores, calibration)
        scores = moved.score(values) if moved else scores
    if not settings.agreement or not len(detector.departures):
        return scores, calibration
    departures = Departures(found.residuals, found.hashes)
    test = agreement_test(NONE.joined(departures).longest(POOL), detector.departures, AGREEMENT)
    trusted = trusted_agreement(test, departures) if settings.adapt else test
    if not trusted:
        return scores, calibration
    return trusted.combined(scores, departures), np.sort(test.combined(null, detector.departures))


# ---------------------------------------------------------------- files of sanitize/detectors


def score_with_baseline(
    config: BenchmarkConfig, victim: Victim, kind: str, aux: str, seed: int, settings: DetectorConfig
) -> DetectorScores:
    """In memory; it sees what a fit would see. Embedding the images counts as its time."""
    encoder = load_encoder(load_encoder_spec(victim.encoders[kind])).to(runtime.device())
    size = encoder.spec.image_size
    values: dict[str, Any] = dict(settings.settings)
    if settings.other:
        values["other"] = independent_encoder(config, victim, settings.other, size)
    known, seen, fit_seconds = embed_auxiliary(
        victim.encoders[kind], victim.auxiliary[aux], config.auxiliary_images, size
    )
    images = torch.cat([victim.test, victim.triggered])
    embeddings, seconds = embed_pool(victim, kind)
    start = time.monotonic()
    reference_set = ReferenceSet(images, embeddings) if settings.fit_on_pool else ReferenceSet(known, seen)
    score = fit_detector(settings.detector, reference_set, encoder, seed, values)
    fit_seconds += time.monotonic() - start
    start = time.monotonic()
    scores = score(images, embeddings).numpy().astype(np.float32)
    rate = len(images) / (seconds + time.monotonic() - start)
    count = len(victim.test)
    nothing = np.empty(0, np.float32)
    return DetectorScores(scores[:count], scores[count:], nothing, nothing.reshape(0, 0), fit_seconds, rate)


def independent_encoder(config: BenchmarkConfig, victim: Victim, path: str, size: int) -> Encoder:
    """The clean one of another victim."""
    folder, _ = red_team.make(path, config.preset, config.zoo)
    other = load_encoder(load_encoder_spec(storage.join(folder, "clean", "encoder.yaml")))
    check(
        other.spec.image_size == size,
        f"{path}: its encoder sees {other.spec.image_size} pixels, victim {victim.name} {size}. "
        "Name an independent encoder of the victim's size, or leave this victim out with `only: {attacks: [...]}`.",
    )
    return other


@lru_cache(maxsize=2)
def embed_auxiliary(encoder: str, pattern: str, limit: int, size: int) -> tuple[Tensor, Tensor, float]:
    """Auxiliary images, their embeddings, and the seconds the embedding took."""
    known = load_images((pattern,), limit, size, labelled=False).pixels
    start = time.monotonic()
    seen = embed_in_batches(load_encoder(load_encoder_spec(encoder)).to(runtime.device()), known)
    return known, seen, time.monotonic() - start


KEPT = 8  # pools in memory
POOLS: dict[tuple[str, str, bytes], tuple[Tensor, float]] = {}


def embed_pool(victim: Victim, kind: str) -> tuple[Tensor, float]:
    """Embeddings of the clean and triggered test images, computed once, and the seconds that took."""
    key = victim.name, kind, hashlib.sha256(victim.triggered.numpy().tobytes()).digest()
    if key not in POOLS:
        if len(POOLS) >= KEPT:
            POOLS.clear()
        encoder = load_encoder(load_encoder_spec(victim.encoders[kind])).to(runtime.device())
        start = time.monotonic()
        POOLS[key] = embed_in_batches(encoder, torch.cat([victim.test, victim.triggered])), time.monotonic() - start
    return POOLS[key]
