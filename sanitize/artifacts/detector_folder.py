"""The detector folder: what `fit` writes and `scan` reads."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from sanitize import storage
from sanitize.artifacts.run_record import library_versions
from sanitize.config import SCORERS, DecoderConfig, EncoderSpec, check, perturbed_share
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import CheckpointError
from sanitize.parquet import read_table
from sanitize.stages.clean_reference import CleanReference
from sanitize.stages.decoder import Decoder
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.images import DECODE_PATH
from sanitize.stages.perturbations import PERTURBATIONS
from sanitize.stages.scoring import References, Scorer
from sanitize.stages.text import TextEncoder

FORMAT_VERSION = 3
DESCRIPTION, WEIGHTS, CALIBRATION = "detector.json", "decoder.safetensors", "calibration.parquet"
# names on disk of this format version → ours
_REFERENCE_TENSORS = {"clean.centre": "centre", "clean.precision": "precision", "clean.bank": "clean_embeddings"}
_CALIBRATION_COLUMNS = {"score": "scores", "first_look": "prescreen_scores"}
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class FitSummary:
    """Training and calibration in numbers, for people. calibration_score_quantiles: quantile as text → score."""

    training_images: int
    calibration_images: int
    epochs: int
    loss_by_epoch: tuple[float, ...]
    calibration_score_quantiles: dict[str, float]


@dataclass(frozen=True)
class Description:
    """detector.json. sha256: of the other files."""

    format_version: int
    decode_path: str
    encoder: EncoderSpec
    encoder_fingerprint: str
    decoder: DecoderConfig
    embedding_size: int
    scorer: str
    mask_ratio: float
    seed: int
    summary: FitSummary
    versions: dict[str, str]
    sha256: dict[str, str]

    def __post_init__(self) -> None:
        check(self.scorer in SCORERS, f"scorer: {self.scorer!r} is not one of {', '.join(SCORERS)}.")
        check(0 <= self.mask_ratio <= 1, f"mask_ratio: {self.mask_ratio} is not between 0 and 1.")
        check(0 < self.embedding_size < 1 << 20, f"embedding_size: {self.embedding_size} is not between 1 and 2^20.")
        check(0 <= self.seed < 1 << 63, f"seed: {self.seed} is not between 0 and 2^63.")


@dataclass(frozen=True)
class Detector:
    """Everything a scan needs. Scores and prescreen scores are those of held-out auxiliary images, aligned, (n,) float32.

    clean_reference: of the scorer `reaction`, else None; prescreen_scores: likewise, else the scores again.
    """

    encoder: EncoderSpec
    encoder_fingerprint: str
    decoder: Decoder
    references: References
    clean_reference: CleanReference | None
    scores: Floats
    prescreen_scores: Floats
    scorer: str
    mask_ratio: float
    seed: int
    summary: FitSummary
    fingerprint: str = ""  # of the folder; known after save or load

    def prescreen_threshold(self, effort: str) -> float:
        """The prescreen score below which `effort` perturbs nothing: the quantile that its share of clean images exceeds."""
        share = perturbed_share(effort)
        if self.clean_reference is None or share == 1:
            return -math.inf
        return float(np.quantile(self.prescreen_scores, 1 - share))

    def calibration(self, effort: str) -> Floats:
        """The null distribution of the score under `effort`, sorted upwards."""
        threshold = self.prescreen_threshold(effort)
        below = self.prescreen_scores - np.float32(threshold)
        return np.sort(np.where(self.prescreen_scores >= threshold, self.scores, below))

    def adaptable_reference(self, effort: str) -> CleanReference | None:
        """What pass 2 may move to the bulk of a scan: only when that scan perturbed every image."""
        return self.clean_reference if perturbed_share(effort) == 1 else None


def save_detector(detector: Detector, folder: str) -> Detector:
    """Write the folder, detector.json last. Returns the detector with its fingerprint."""
    tensors = {f"decoder.{name}": t.contiguous().cpu() for name, t in detector.decoder.state_dict().items()}
    tensors |= {"references.mean": detector.references.mean, "references.mean_square": detector.references.mean_square}
    if reference := detector.clean_reference:
        tensors |= {theirs: getattr(reference, ours).contiguous() for theirs, ours in _REFERENCE_TENSORS.items()}
    weights = safetensors.torch.save(tensors)
    storage.write_bytes(storage.join(folder, WEIGHTS), weights)
    sink = pa.BufferOutputStream()
    columns = {theirs: pa.array(getattr(detector, ours), pa.float32()) for theirs, ours in _CALIBRATION_COLUMNS.items()}
    pq.write_table(pa.table(columns), sink)
    calibration = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(folder, CALIBRATION), calibration)
    description = Description(
        format_version=FORMAT_VERSION,
        decode_path=DECODE_PATH,
        encoder=detector.encoder,
        encoder_fingerprint=detector.encoder_fingerprint,
        decoder=detector.decoder.config,
        embedding_size=len(detector.decoder.embedding_mean),
        scorer=detector.scorer,
        mask_ratio=detector.mask_ratio,
        seed=detector.seed,
        summary=detector.summary,
        versions=library_versions(),
        sha256={WEIGHTS: hashlib.sha256(weights).hexdigest(), CALIBRATION: hashlib.sha256(calibration).hexdigest()},
    )
    storage.write_json(storage.join(folder, DESCRIPTION), to_mapping(description))
    return load_detector(folder)


def load_detector(folder: str) -> Detector:
    """Read a detector folder. Raises CheckpointError when it is missing, damaged or of another version."""
    path = storage.join(folder, DESCRIPTION)
    if not storage.exists(path):
        raise CheckpointError(
            f"{folder}: no detector there ({DESCRIPTION} is missing). Run `sanitize fit` first, or give --detector."
        )
    values = storage.read_json(path)
    if values.get("format_version") != FORMAT_VERSION or values.get("decode_path") != DECODE_PATH:
        raise CheckpointError(
            f"{path}: written by another version of sanitize (format {values.get('format_version')}, decode path "
            f"{values.get('decode_path')}; this one uses {FORMAT_VERSION}, {DECODE_PATH}). Run `sanitize fit` again."
        )
    description = from_mapping(Description, values, path)
    weights, calibration = (_checked(folder, name, description) for name in (WEIGHTS, CALIBRATION))
    try:
        tensors = safetensors.torch.load(weights)
        table = read_table(pa.BufferReader(calibration))
        columns = {ours: table.column(theirs).to_numpy() for theirs, ours in _CALIBRATION_COLUMNS.items()}
        detector = Detector(
            encoder=description.encoder,
            encoder_fingerprint=description.encoder_fingerprint,
            decoder=_decoder(description, tensors),
            references=References(tensors["references.mean"], tensors["references.mean_square"]),
            clean_reference=_clean_reference(tensors),
            scorer=description.scorer,
            mask_ratio=description.mask_ratio,
            seed=description.seed,
            summary=description.summary,
            fingerprint=storage.file_sha256(path),
            **columns,
        )
        _require_usable(detector, description)
    except (KeyError, TypeError, ValueError, RuntimeError, pa.ArrowException, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: no usable detector ({reason}). Run `sanitize fit` again.") from None
    return detector


def _decoder(description: Description, tensors: dict[str, Tensor]) -> Decoder:
    """Built once it is known that the tensors of the file fill it: a description alone costs no memory."""
    state = {n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder.")}
    with torch.device("meta"):
        wanted = Decoder(description.decoder, description.embedding_size).state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(f"{WEIGHTS}: {name} of shape {tuple(tensor.shape)} is not in it")
    decoder = Decoder(description.decoder, description.embedding_size)
    decoder.load_state_dict(state)
    return decoder.eval().requires_grad_(False)


def _clean_reference(tensors: dict[str, Tensor]) -> CleanReference | None:
    found = {ours: tensors[theirs] for theirs, ours in _REFERENCE_TENSORS.items() if theirs in tensors}
    return CleanReference(**found) if found else None


def _require_usable(detector: Detector, description: Description) -> None:
    """Raises ValueError when shapes do not belong together or a number is not finite: it would leave every image without a score."""
    side, embedding = description.decoder.image_size, description.embedding_size
    references = detector.references
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("references.mean", references.mean, (3, side, side)),
        ("references.mean_square", references.mean_square, (3, side, side)),
    ]
    if reference := detector.clean_reference:
        columns, known = len(PERTURBATIONS) + 2, len(reference.clean_embeddings)
        shapes += [
            ("clean.centre", reference.centre, (columns,)),
            ("clean.precision", reference.precision, (columns, columns)),
            ("clean.bank", reference.clean_embeddings, (max(known, 1), embedding)),
        ]
    elif detector.scorer == "reaction":
        raise ValueError(f"{WEIGHTS}: the scorer reaction needs clean.centre")
    for name, tensor, shape in shapes:
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(f"{WEIGHTS}: {name} is {tensor.dtype} {tuple(tensor.shape)}, float32 {shape} was expected")
    numbers = [*(tensor for _, tensor, _ in shapes), *detector.decoder.state_dict().values()]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
        raise ValueError(f"{WEIGHTS}: holds numbers that are not finite")
    for scores in (detector.scores, detector.prescreen_scores):
        if scores.dtype != np.float32 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{CALIBRATION}: holds no scores, or some that are not finite")


def _checked(folder: str, name: str, description: Description) -> bytes:
    data = storage.read_bytes(storage.join(folder, name))
    if hashlib.sha256(data).hexdigest() != description.sha256.get(name):
        raise CheckpointError(
            f"{folder}/{name}: does not match {DESCRIPTION} (changed or damaged). Run `sanitize fit` again."
        )
    return data


def load_matching_encoder(detector: Detector, spec: EncoderSpec | None) -> Encoder:
    """The encoder the detector was fitted to. Raises CheckpointError when the weights or the preprocessing differ."""
    spec = spec or detector.encoder
    encoder = load_encoder(spec)
    found = encoder.fingerprint()
    if found != detector.encoder_fingerprint:
        raise CheckpointError(
            f"the detector was fitted to another encoder: {spec.weights or spec.architecture} has fingerprint {found[:12]}, "
            f"the detector expects {detector.encoder_fingerprint[:12]}. Give the encoder it was fitted to, or run `sanitize fit` "
            "for this one."
        )
    return encoder


def make_scorer(
    detector: Detector,
    encoder: Encoder,
    precision: str,
    device: torch.device,
    *,
    effort: str = "thorough",
    text: TextEncoder | None = None,
) -> Scorer:
    return Scorer(
        encoder,
        detector.decoder,
        detector.references,
        name=detector.scorer,
        mask_ratio=detector.mask_ratio,
        seed=detector.seed,
        precision=precision,
        device=device,
        text=text,
        clean_reference=detector.clean_reference,
        prescreen_threshold=detector.prescreen_threshold(effort),
    )
