"""`sanitize fit`: auxiliary shards + encoder → detector folder.

embed (once per image, cached by shard) → split off calibration images → train the decoder → references → train the predictor →
calibrate.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sanitize import plots, runtime, storage, workers
from sanitize.artifacts import run_record
from sanitize.artifacts.detector_description import FitSummary
from sanitize.artifacts.detector_folder import DESCRIPTION, FORMAT_VERSION, Detector, load_detector, save_detector
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.config import FitConfig, ThresholdPolicy
from sanitize.config_loading import to_mapping, with_absolute_paths
from sanitize.errors import ConfigError, SanitizeError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.clean_reference import CleanReference, fit_clean_reference
from sanitize.stages.decoder import Decoder
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.evidence import PREDICTION, REACTION, WHEREABOUTS, combination
from sanitize.stages.images import DECODE_PATH
from sanitize.stages.preprocessing import complete_spec
from sanitize.stages.scoring import Floats, References, Scorer
from sanitize.stages.shards import head_tails, list_shards
from sanitize.stages.tails import extrapolated
from sanitize.stages.thresholds import fewest_for, is_counted, lowest_rate
from sanitize.training import split
from sanitize.training.calibration import StatisticsTask, measure_statistics, rows_of
from sanitize.training.decoder import Auxiliary, TrainingState, train_decoder
from sanitize.training.embedding_cache import EmbedTask, load_embeddings
from sanitize.training.prediction import NO_PREDICTION, Prediction, learn_to_predict, reference_fingerprint

log = logging.getLogger(__name__)
REFERENCE_IMAGES = 2000  # training images behind the centre and covariance of clean statistics, and as many embeddings
RECONSTRUCTIONS = 64  # of other embeddings, behind `error_reference`
MIN_IMAGES = 32
# what says where and how a fit runs, not what it gives
PLACEMENT = ("workers", "gpus_per_worker", "cpus_per_worker", "address", "out", "batch_size")


def fit(config: FitConfig) -> Detector:
    """Train and calibrate a detector; write it to `config.out`. Running again after a kill goes on where it stopped."""
    shards = list_shards(config.shards)
    config = dataclasses.replace(config, encoder=complete_spec(config.encoder))
    encoder = load_encoder(config.encoder)
    fingerprint = encoder.fingerprint()
    if config.reference:
        config = dataclasses.replace(config, reference=complete_spec(config.reference))
    identity = _identity(config, fingerprint, shards)
    with folder_lock(config.out, "fit"):
        run_record.claim_folder(config.out, "fit.json", identity, "a fit", inputs=("inputs",))
        if storage.exists(storage.join(config.out, DESCRIPTION)):
            log.info("%s holds this detector already", config.out)
            run_record.remove_scaffolding(config.out)
            return load_detector(config.out)
        resources = runtime.plan(
            config.workers, config.cpus_per_worker, config.gpus_per_worker, len(shards), config.address
        )
        with runtime.session_for(resources, config.address):
            auxiliary, used = _embed(config, shards, resources)
            mask = split.held_out(auxiliary.hashes, config.training.calibration_fraction, config.seed)
            training, held_out = auxiliary.select(~mask), auxiliary.select(mask)
            _require_enough(len(training.hashes), len(held_out.hashes), config.training.calibration_fraction)
            state = train_decoder(config, training, resources)
            scorer = _scorer(config, encoder, state.decoder, training)
            scores, reconstructions = _reconstruction_scores(scorer, held_out)
            calibrated, reference, prediction = Calibration(scores.numpy(), scores.numpy()), None, NO_PREDICTION
            if config.scorer in ("evidence", "reaction"):
                reference, calibrated = _calibrate(config, used, training, held_out, resources)
            calibrated = calibrated.without_poison(config.contamination)
            if config.scorer == "evidence":
                prediction = learn_to_predict(config, used, training.hashes, held_out.hashes, resources)
                calibrated = _combine(calibrated, prediction, config.contamination)
        _require_finite(calibrated.scores)
        detector = _detector(
            config, identity, state, scorer.references, reference, calibrated, prediction, len(training.hashes)
        )
        image = storage.join(config.out, "reconstructions.png")
        plots.write_reconstructions(image, held_out.images, reconstructions, scores)
        saved = save_detector(detector, config.out)
        run_record.remove_scaffolding(config.out)
        log.info("detector written to %s", config.out)
        return saved


def _identity(config: FitConfig, fingerprint: str, shards: list[Shard]) -> dict[str, Any]:
    """What makes this fit this fit: settings, encoder, code and inputs."""
    settings = {name: value for name, value in to_mapping(config).items() if name not in PLACEMENT}
    fingerprints = {
        "encoder_fingerprint": fingerprint,
        "reference_fingerprint": reference_fingerprint(config, fingerprint),
    }
    # what another version began, this one cannot go on with
    code = {"format_version": FORMAT_VERSION, "decode_path": DECODE_PATH}
    return settings | fingerprints | code | {"inputs": head_tails(shards)}


# ---------------------------------------------------------------- embedding


def _embed(config: FitConfig, shards: list[Shard], resources: Resources) -> tuple[Auxiliary, list[Shard]]:
    """All usable auxiliary images up to the limit, and the shards they are in."""
    cache = storage.absolute(storage.join(config.out, "cache", "embeddings"))
    task = EmbedTask(
        encoder=config.encoder,
        image_size=config.decoder.image_size,
        precision=config.training.precision,
        batch_size=config.batch_size,
        limit=config.limit,
        image_member=config.image_member,
        cache=cache,
    )
    failed: list[str] = []
    with ProgressDisplay("embed", len(shards), sum(s.size for s in shards)) as display:
        for outcome in workers.map_shards(task, shards, resources, display, config.address):
            failed += [outcome.error] if outcome.error else []
    for error in failed:
        log.warning("auxiliary shard left out: %s", error)
    parts: dict[Shard, dict[str, Tensor]] = {}
    for shard in shards:
        path = storage.join(cache, f"{shard.stem}.safetensors")
        if storage.exists(path) and not 0 < config.limit <= sum(len(part["hashes"]) for part in parts.values()):
            parts[shard] = load_embeddings(path)
    if not parts:
        raise ConfigError(
            f"no usable image in {', '.join(map(str, config.shards))}. {failed[0] if failed else 'Give shards with images.'}"
        )
    embeddings, images, hashes = (
        torch.cat([part[name] for part in parts.values()])[: config.limit or None]
        for name in ("embeddings", "images", "hashes")
    )
    return Auxiliary(embeddings, images, hashes), list(parts)


def _require_enough(training: int, held_out: int, fraction: float) -> None:
    if training < MIN_IMAGES or held_out < 1:
        raise ConfigError(
            f"{training + held_out} auxiliary images leave {training} to train and {held_out} to calibrate on; at least "
            f"{MIN_IMAGES} and 1 are needed, thousands are better. Give more shards."
        )
    fpr, total = ThresholdPolicy.fpr, training + held_out
    if is_counted(held_out, fpr):
        return
    needed = fewest_for(fpr, counted=True)
    share = 1.2 * needed / total
    more = f", or hold out more of them (--set training.calibration_fraction={share:.2g})" if share <= 0.5 else ""
    advice = f"Give about {math.ceil(1.1 * needed / fraction)} images{more}, so that the cut is counted"
    if held_out >= fewest_for(fpr):
        log.warning(
            "%d of %d auxiliary images are held out to calibrate on, few for the default --fpr %g of a scan: its cut will be taken from a "
            "tail fitted to their scores. %s",
            held_out,
            total,
            fpr,
            advice,
        )
    else:
        log.warning(
            "%d of %d auxiliary images are held out to calibrate on, too few for the default --fpr %g of a scan (%d). %s; else scan with "
            "--fpr %.2g or more",
            held_out,
            total,
            fpr,
            fewest_for(fpr),
            advice,
            lowest_rate(held_out),
        )


# ---------------------------------------------------------------- scores of the reconstruction


def _scorer(config: FitConfig, encoder: Encoder, decoder: Decoder, training: Auxiliary) -> Scorer:
    """The scan's scorer of reconstructions, with the decoder just trained."""
    device = runtime.device()
    decoder = decoder.to(device).eval().requires_grad_(False)
    return Scorer(
        encoder,
        decoder,
        _references(decoder, training, config.seed, device),
        name=config.scorer,
        mask_ratio=config.test_mask_ratio,
        seed=config.seed,
        precision=config.training.precision,
        device=device,
    )


@torch.inference_mode()
def _references(decoder: Decoder, training: Auxiliary, seed: int, device: torch.device) -> References:
    drawn = torch.randperm(len(training.hashes), generator=_generator(seed))[:RECONSTRUCTIONS]
    reconstructions = decoder(training.embeddings[drawn].to(device)).float().cpu()
    return References(reconstructions.mean(dim=0), reconstructions.square().mean(dim=0))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.inference_mode()
def _reconstruction_scores(scorer: Scorer, auxiliary: Auxiliary) -> tuple[Tensor, Tensor]:
    """Scores (N,) of cached images and their reconstructions (N, 3, R, R) in [0, 1], by the scan's own functions."""
    encoder, scores, shown = scorer.encoder, [], []
    for begin in range(0, len(auxiliary.hashes), 256):
        part = slice(begin, begin + 256)
        targets = (auxiliary.images[part].to(scorer.device).float() - encoder.mean) / encoder.std
        hashes = [bytes(row).hex() for row in auxiliary.hashes[part].numpy()]
        reconstructions, hidden = scorer.reconstruct(auxiliary.embeddings[part].to(scorer.device), targets, hashes)
        scores.append(scorer.score(targets, reconstructions, hidden).cpu())
        shown.append((reconstructions * encoder.std + encoder.mean).clamp(0, 1).cpu().half())
    return torch.cat(scores), torch.cat(shown)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """Of held-out images, aligned, (n,) float32 each. prescreen_scores: of the one pass; evidence: of the scorer `evidence`."""

    scores: Floats
    prescreen_scores: Floats
    evidence: dict[str, Floats] = field(default_factory=dict)

    def without_poison(self, share: float) -> "Calibration":
        """The highest scores, a share of them, replaced by what the others let expect."""
        return Calibration(extrapolated(self.scores, share), extrapolated(self.prescreen_scores, share), self.evidence)


def _calibrate(
    config: FitConfig, shards: list[Shard], training: Auxiliary, held_out: Auxiliary, resources: Resources
) -> tuple[CleanReference, Calibration]:
    """From two halves of the training images: embeddings of one, statistics of the other; then scores of held-out images."""
    order = torch.randperm(len(training.hashes), generator=_generator(config.seed))[: 2 * REFERENCE_IMAGES]
    kept, sample = order.chunk(2)
    clean_embeddings = functional.normalize(training.embeddings[kept].float(), dim=1)
    task = StatisticsTask(
        encoder=config.encoder,
        precision=config.training.precision,
        batch_size=config.batch_size,
        image_member=config.image_member,
        wanted=torch.cat([training.hashes[sample], held_out.hashes]),
        clean_embeddings=clean_embeddings,
        cache=storage.absolute(storage.join(config.out, "cache", "statistics")),
    )
    statistics = measure_statistics(task, shards, resources, config.address)
    reference = fit_clean_reference(rows_of(statistics, training.hashes[sample]), clean_embeddings, config.seed)
    observed = torch.from_numpy(rows_of(statistics, held_out.hashes))
    return reference, Calibration(reference.distance(observed).numpy(), reference.prescreen_score(observed).numpy())


def _combine(calibrated: Calibration, prediction: Prediction, contamination: float) -> Calibration:
    """Scores of `evidence`: of everything, and of what the one pass gives."""
    first = {WHEREABOUTS: calibrated.prescreen_scores}
    if prediction.predictor:
        first[PREDICTION] = extrapolated(prediction.energy, contamination)
    values = first | {REACTION: calibrated.scores}
    evidence = combination(values, prediction.predictor.explained if prediction.predictor else None)
    return Calibration(evidence.score(values), evidence.score(first), values)


def _require_finite(scores: Floats) -> None:
    if not np.isfinite(scores).all():
        raise SanitizeError(
            "training diverged: calibration scores are not finite. Lower training.learning_rate and fit again."
        )


def _detector(
    config: FitConfig,
    identity: Mapping[str, Any],
    state: TrainingState,
    references: References,
    reference: CleanReference | None,
    calibrated: Calibration,
    prediction: Prediction,
    training_images: int,
) -> Detector:
    quantiles = {f"{q:g}": float(np.quantile(calibrated.scores, q)) for q in (0.01, 0.5, 0.9, 0.99)}
    summary = FitSummary(
        training_images=training_images,
        calibration_images=len(calibrated.scores),
        epochs=config.training.epochs,
        loss_by_epoch=tuple(round(loss, 6) for loss in state.losses),
        calibration_score_quantiles=quantiles,
        prediction_explained=prediction.explained,
        prediction_crowded=prediction.crowded,
    )
    return Detector(
        encoder=with_absolute_paths(config.encoder),
        encoder_fingerprint=identity["encoder_fingerprint"],
        decoder=state.decoder.cpu(),
        references=references.to(torch.device("cpu")),
        clean_reference=reference,
        scores=calibrated.scores,
        prescreen_scores=calibrated.prescreen_scores,
        scorer=config.scorer,
        mask_ratio=config.test_mask_ratio,
        seed=config.seed,
        summary=summary,
        predictor=prediction.predictor,
        reference=with_absolute_paths(config.reference) if config.reference and prediction.predictor else None,
        reference_fingerprint=identity["reference_fingerprint"] if prediction.predictor else "",
        evidence=calibrated.evidence,
        departures=prediction.departures,
    )
