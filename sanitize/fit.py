"""`sanitize fit`: auxiliary shards + encoder → detector folder.

embed (once per image, cached by shard) → split off calibration images → train the decoder → references → calibrate.
"""

import contextlib
import hashlib
import json
import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sanitize import checkpoint, preview, runtime, storage
from sanitize.checkpoint import Detector
from sanitize.config import FitConfig, placed, to_mapping
from sanitize.embedding import EmbedTask, load_embeddings
from sanitize.errors import ConfigError, RefusedError, SanitizeError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.decoder import Decoder
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.loader import picture_batches
from sanitize.stages.reactions import CleanSignature, clean_signature, neighbour_distance, signature
from sanitize.stages.scoring import References, Scorer
from sanitize.stages.shards import ShardReader, list_shards, open_shard
from sanitize.training import Auxiliary, TrainingState, train_decoder

log = logging.getLogger(__name__)
SIGNATURES = 2000  # training images behind the centre and covariance of clean signatures, and as many in the bank
REFERENCES = 64  # reconstructions of other embeddings behind `error_reference`
MIN_IMAGES = 32


def fit(config: FitConfig) -> Detector:
    """Train and calibrate a detector; write it to `config.out`. Running again after a kill goes on where it stopped."""
    shards = list_shards(config.shards)
    encoder = load_encoder(config.encoder)
    fingerprint = encoder.fingerprint()
    _refuse_other_run(config, fingerprint)
    if storage.exists(storage.join(config.out, "detector.json")):
        log.info("%s holds this detector already", config.out)
        return checkpoint.load(config.out)
    resources = runtime.plan(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, len(shards), config.address
    )
    with runtime.ray_session(config.address) if resources.workers else contextlib.nullcontext():
        auxiliary = _embedded(config, shards, resources)
        calibration_mask = _held_out(auxiliary.hashes, config.training.calibration_fraction, config.seed)
        training = auxiliary.select(torch.from_numpy(~calibration_mask))
        held_out = auxiliary.select(torch.from_numpy(calibration_mask))
        _require_enough(len(training.hashes), len(held_out.hashes))
        state = train_decoder(config, training, resources)
    detector = _calibrated(config, shards, encoder, fingerprint, state, training, held_out)
    saved = checkpoint.save(detector, config.out)
    storage.remove_folder(storage.join(config.out, "cache"))
    storage.remove_folder(storage.join(config.out, "training"))
    log.info("detector written to %s", config.out)
    return saved


def _refuse_other_run(config: FitConfig, fingerprint: str) -> None:
    """A folder belongs to one configuration; `fit.json` remembers which."""
    path = storage.join(config.out, "fit.json")
    placement = ("workers", "gpus_per_worker", "cpus_per_worker", "address", "out")
    settings = {k: v for k, v in to_mapping(config).items() if k not in placement}
    settings = json.loads(json.dumps(settings | {"encoder_fingerprint": fingerprint}))
    if storage.exists(path):
        if storage.read_json(path) != settings:
            raise RefusedError(
                f"{config.out}: holds a detector or an unfinished fit with other settings. Give another --out, or delete the folder."
            )
    else:
        storage.write_json(path, settings)
    storage.remove_partials(config.out)


# ---------------------------------------------------------------- embedding


def _embedded(config: FitConfig, shards: list[Shard], resources: Resources) -> Auxiliary:
    cache = storage.absolute(storage.join(config.out, "cache"))
    task = EmbedTask(
        *(config.encoder, config.decoder.image_size, config.training.precision, config.batch_size),
        *(config.limit, config.image_member, cache),
    )
    failed: list[str] = []
    with ProgressDisplay("embed", len(shards), sum(s.size for s in shards)) as display:
        for outcome in runtime.map_shards(task, shards, resources, display, config.address):
            failed += [outcome.error] if outcome.error else []
    for error in failed:
        log.warning("auxiliary shard left out: %s", error)
    paths = [storage.join(cache, f"{shard.stem}.safetensors") for shard in shards]
    parts = [load_embeddings(path) for path in paths if storage.exists(path)]
    if not parts:
        raise ConfigError(
            f"no usable image in {', '.join(config.shards)}. {failed[0] if failed else 'Give shards with images.'}"
        )
    return Auxiliary(
        *(torch.cat([part[n] for part in parts])[: config.limit or None] for n in ("embeddings", "images", "hashes"))
    )


def _held_out(hashes: Tensor, fraction: float, seed: int) -> np.ndarray:
    """(N,) bool. Decided by the image's bytes, so that copies of one image never stand on both sides."""
    words = hashes[:, :8].contiguous().numpy().view(np.uint64).reshape(-1)
    mixed = (words ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)) % np.uint64(1_000_003)
    chosen: np.ndarray = mixed < fraction * 1_000_003
    return chosen


def _require_enough(training: int, held_out: int) -> None:
    if training < MIN_IMAGES or held_out < 1:
        raise ConfigError(
            f"{training + held_out} auxiliary images leave {training} to train and {held_out} to calibrate on; at least "
            f"{MIN_IMAGES} and 1 are needed, thousands are better. Give more shards."
        )


# ---------------------------------------------------------------- calibration


def _calibrated(
    config: FitConfig,
    shards: list[Shard],
    encoder: Encoder,
    fingerprint: str,
    state: TrainingState,
    training: Auxiliary,
    held_out: Auxiliary,
) -> Detector:
    device = runtime.device()
    decoder = state.decoder.to(device).eval().requires_grad_(False)
    references = _references(decoder, training, config.seed, device)
    scorer = Scorer(
        *(encoder, decoder, references),
        name=config.scorer,
        mask_ratio=config.test_mask_ratio,
        seed=config.seed,
        precision=config.training.precision,
        device=device,
    )
    found, reconstructions = _scores(scorer, held_out)
    first_looks = scores = found.numpy()
    clean = None
    if config.scorer == "reaction":
        clean = _clean(config, shards, scorer, training)
        observed = _signatures(config, shards, scorer, held_out.hashes, clean.bank)
        scores = clean.distance(torch.from_numpy(observed)).numpy()
        first_looks = clean.first_look(torch.from_numpy(observed)).numpy()
    if not np.isfinite(scores).all():
        raise SanitizeError(
            "training diverged: calibration scores are not finite. Lower training.learning_rate and fit again."
        )
    preview.write_reconstructions(
        storage.join(config.out, "reconstructions.png"), held_out.images, reconstructions, found
    )
    quantiles = {f"{q:g}": float(np.quantile(scores, q)) for q in (0.01, 0.5, 0.9, 0.99)}
    summary = {
        "training_images": len(training.hashes),
        "calibration_images": len(held_out.hashes),
        "epochs": config.training.epochs,
        "loss_by_epoch": [round(loss, 6) for loss in state.losses],
        "calibration_score_quantiles": quantiles,
    }
    return Detector(
        encoder=placed(config.encoder),
        encoder_fingerprint=fingerprint,
        decoder=decoder.cpu(),
        references=references.to(torch.device("cpu")),
        clean=clean,
        scores=scores,
        first_looks=first_looks,
        scorer=config.scorer,
        mask_ratio=config.test_mask_ratio,
        seed=config.seed,
        summary=summary,
    )


@torch.inference_mode()
def _references(decoder: Decoder, training: Auxiliary, seed: int, device: torch.device) -> References:
    chosen = torch.randperm(len(training.hashes), generator=_generator(seed))[:REFERENCES]
    reconstructions = decoder(training.embeddings[chosen].to(device)).float().cpu()
    return References(reconstructions.mean(dim=0), reconstructions.square().mean(dim=0))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _clean(config: FitConfig, shards: list[Shard], scorer: Scorer, training: Auxiliary) -> CleanSignature:
    """From two halves of the training images: one is the bank of embeddings, the other is measured against it."""
    order = torch.randperm(len(training.hashes), generator=_generator(config.seed))[: 2 * SIGNATURES]
    kept, sample = order.chunk(2)
    bank = functional.normalize(training.embeddings[kept].float(), dim=1)
    return clean_signature(_signatures(config, shards, scorer, training.hashes[sample], bank), bank, config.seed)


def _signatures(
    config: FitConfig, shards: list[Shard], scorer: Scorer, hashes: Tensor, bank: Tensor
) -> NDArray[np.float32]:
    """(N, V + 2) signatures of the auxiliary images with these hashes (N, 32), by the scan's own decoding and embedding."""
    wanted = {bytes(row).hex() for row in hashes.numpy()}
    found: dict[str, NDArray[np.float32]] = {}
    bank = bank.to(scorer.device)
    for shard in shards:
        if len(found) == len(wanted):
            break
        if not storage.exists(storage.join(config.out, "cache", f"{shard.stem}.safetensors")):
            continue  # this shard failed when it was embedded
        with open_shard(shard) as file:
            samples = ShardReader(file, shard, image_member=config.image_member).samples()
            chosen = (s for s in samples if s.image and hashlib.sha256(s.image).hexdigest() in wanted)
            for pictures in picture_batches(chosen, config.batch_size, 2):
                images, embeddings = scorer.embed(pictures)
                distances = neighbour_distance(embeddings, bank)
                rows = signature(scorer.react(images, embeddings), embeddings.norm(dim=1), distances).cpu().numpy()
                found |= {picture.sha256: row for picture, row in zip(pictures, rows, strict=True)}
    return np.stack([found[bytes(row).hex()] for row in hashes.numpy()])


@torch.inference_mode()
def _scores(scorer: Scorer, auxiliary: Auxiliary) -> tuple[Tensor, Tensor]:
    """Scores (N,) of cached images and their reconstructions (N, 3, R, R) in [0, 1], by the scan's own functions."""
    encoder, scores, pictures = scorer.encoder, [], []
    for begin in range(0, len(auxiliary.hashes), 256):
        part = slice(begin, begin + 256)
        targets = (auxiliary.images[part].to(scorer.device).float() - encoder.mean) / encoder.std
        hashes = [bytes(row).hex() for row in auxiliary.hashes[part].numpy()]
        reconstructions, hidden = scorer.reconstruct(auxiliary.embeddings[part].to(scorer.device), targets, hashes)
        scores.append(scorer.score(targets, reconstructions, hidden).cpu())
        pictures.append((reconstructions * encoder.std + encoder.mean).clamp(0, 1).cpu().half())
    return torch.cat(scores), torch.cat(pictures)
