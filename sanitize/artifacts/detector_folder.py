"""The detector folder: what `fit` writes and `scan` reads."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from sanitize import storage
from sanitize.artifacts.detector_description import Description, FitSummary
from sanitize.artifacts.predictor_tensors import (
    departures_of,
    filled_predictor,
    named_tensors,
    shape_of,
)
from sanitize.artifacts.run_record import library_versions
from sanitize.config import EncoderSpec, perturbed_share
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import CheckpointError
from sanitize.parquet import read_table
from sanitize.profile import Profile
from sanitize.stages.agreement import IMAGE_HASH, NONE, RESIDUALS, Departures
from sanitize.stages.clean_reference import CleanReference
from sanitize.stages.decoder import Decoder
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.evidence import CHOOSES, KINDS, PREDICTION, REACTION, WHEREABOUTS, Evidence, combination
from sanitize.stages.folding import folded
from sanitize.stages.images import DECODE_PATH
from sanitize.stages.perturbations import PERTURBATIONS
from sanitize.stages.prediction import Predictor
from sanitize.stages.scoring import References, Scorer, Witnesses
from sanitize.stages.text import TextEncoder

FORMAT_VERSION = 4
DESCRIPTION, WEIGHTS, CALIBRATION = "detector.json", "decoder.safetensors", "calibration.parquet"
# names on disk of this format version → ours
_REFERENCE_TENSORS = {"clean.centre": "centre", "clean.precision": "precision", "clean.bank": "clean_embeddings"}
_CALIBRATION_COLUMNS = {"score": "scores", "first_look": "prescreen_scores"}
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Detector:
    """Everything a scan needs. Scores and prescreen scores are those of held-out auxiliary images, aligned, (n,) float32.

    clean_reference: of the scorers `evidence` and `reaction`, else None; prescreen_scores: of their one pass, else the scores again.
    predictor: of the scorer `evidence`, if it is worth anything; reference: the encoder through which it sees images, if any.
    evidence: of the scorer `evidence`, kind → its values on the same images; empty for the others. departures: likewise, with a predictor.
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
    predictor: Predictor | None = None
    reference: EncoderSpec | None = None
    reference_fingerprint: str = ""
    evidence: Mapping[str, Floats] = field(default_factory=dict)
    departures: Departures = NONE
    fingerprint: str = ""  # of the folder; known after save or load

    @property
    def default_effort(self) -> str:
        """`evidence` whose predictor sees enough: 1 + 4 x 0.075 = 1.3 encoder passes an image. The others as much as they use: else norm
        and neighbour distance alone would choose what is perturbed, and an attacker imitates these for nothing."""
        sees = self.predictor is not None and self.predictor.explained >= CHOOSES
        return "0.075" if self.evidence and sees else "thorough"

    def undecided(self, effort: str) -> tuple[float, float]:
        """Lowest and highest score of the one pass with which `effort` perturbs an image. The lowest: the quantile that its share of clean
        images exceeds. The highest, of `evidence`: more than any clean image had, so that nothing more needs to be known."""
        share = perturbed_share(effort)
        if self.clean_reference is None or share == 1:
            return -math.inf, math.inf
        highest = float(self.prescreen_scores.max()) if self.evidence else math.inf
        return float(np.quantile(self.prescreen_scores, 1 - share)), highest

    def calibration(self, effort: str) -> Floats:
        """The null distribution of the score under `effort`, sorted upwards."""
        return np.sort(self.calibration_scores(effort))

    def calibration_scores(self, effort: str) -> Floats:
        """The same, image by image."""
        low, high = self.undecided(effort)
        first = self.prescreen_scores if self.evidence else self.prescreen_scores - np.float32(low)
        perturbed = (self.prescreen_scores >= low) & (self.prescreen_scores <= high)
        scores: Floats = np.where(perturbed, self.scores, first)
        return scores

    def combination(self) -> Evidence:
        """Of the scorer `evidence`."""
        explained = self.predictor.explained if self.predictor else None
        return combination(self.evidence, explained)

    def adaptable_reference(self, effort: str) -> CleanReference | None:
        """What pass 2 may move to the bulk of a scan: only of `reaction`, when that scan perturbed every image."""
        return self.clean_reference if perturbed_share(effort) == 1 and not self.evidence else None


def save_detector(detector: Detector, folder: str) -> Detector:
    """Write the folder, detector.json last. Returns the detector with its fingerprint."""
    tensors = {f"decoder.{name}": t.contiguous().cpu() for name, t in detector.decoder.state_dict().items()}
    tensors |= {"references.mean": detector.references.mean, "references.mean_square": detector.references.mean_square}
    if reference := detector.clean_reference:
        tensors |= {theirs: getattr(reference, ours).contiguous() for theirs, ours in _REFERENCE_TENSORS.items()}
    if predictor := detector.predictor:
        tensors |= named_tensors(predictor)
    weights = safetensors.torch.save(tensors)
    storage.write_bytes(storage.join(folder, WEIGHTS), weights)
    sink = pa.BufferOutputStream()
    columns = {theirs: pa.array(getattr(detector, ours), pa.float32()) for theirs, ours in _CALIBRATION_COLUMNS.items()}
    columns |= {kind: pa.array(values, pa.float32()) for kind, values in detector.evidence.items()}
    if len(detector.departures):
        columns |= {name: pa.array(column, pa.binary()) for name, column in detector.departures.as_bytes().items()}
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
        predictor=shape_of(predictor) if predictor else None,
        reference=detector.reference,
        reference_fingerprint=detector.reference_fingerprint,
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
            f"{values.get('decode_path')}; this one uses {FORMAT_VERSION}, {DECODE_PATH}). Run `sanitize fit` "
            "again with another --out, or delete this folder first."
        )
    description = from_mapping(Description, values, path)
    weights, calibration = (_checked(folder, name, description) for name in (WEIGHTS, CALIBRATION))
    shape = description.predictor
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
            predictor=filled_predictor(shape, description.embedding_size, tensors) if shape else None,
            reference=description.reference,
            reference_fingerprint=description.reference_fingerprint,
            departures=departures_of(table),
            evidence={kind: table.column(kind).to_numpy() for kind in KINDS if kind in table.column_names},
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
    elif detector.scorer in ("reaction", "evidence"):
        raise ValueError(f"{WEIGHTS}: the scorer {detector.scorer} needs clean.centre")
    for name, tensor, shape in shapes:
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(f"{WEIGHTS}: {name} is {tensor.dtype} {tuple(tensor.shape)}, float32 {shape} was expected")
    numbers = [*(tensor for _, tensor, _ in shapes), *detector.decoder.state_dict().values()]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in numbers):
        raise ValueError(f"{WEIGHTS}: holds numbers that are not finite")
    if detector.scorer == "evidence" and not {WHEREABOUTS, REACTION} <= detector.evidence.keys():
        raise ValueError(f"{CALIBRATION}: the scorer evidence needs the columns {WHEREABOUTS} and {REACTION}")
    if (detector.predictor is None) != (PREDICTION not in detector.evidence):
        raise ValueError(f"{CALIBRATION}: a predictor needs the column {PREDICTION}, and that column a predictor")
    if detector.predictor and len(detector.departures) != len(detector.scores):
        raise ValueError(f"{CALIBRATION}: a predictor needs the columns {RESIDUALS} and {IMAGE_HASH}")
    if detector.predictor and (detector.predictor.eye_size == 0) != (detector.reference is not None):
        raise ValueError("a predictor sees small images or features of a reference encoder, one of both")
    for scores in (detector.scores, detector.prescreen_scores, *detector.evidence.values()):
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


def load_reference(detector: Detector) -> Encoder | None:
    """The encoder through which the predictor sees images; None when it sees them itself. Raises CheckpointError when it is another."""
    if detector.reference is None:
        return None
    encoder = load_encoder(detector.reference)
    if encoder.fingerprint() != detector.reference_fingerprint:
        name = detector.reference.weights or detector.reference.architecture
        raise CheckpointError(
            f"{name}: is not the reference encoder that the detector was fitted with. Restore that file, or run `sanitize fit` again."
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
    profile: Profile | None = None,
) -> Scorer:
    low, high = detector.undecided(effort)
    witnesses = None
    if detector.evidence:
        reference = load_reference(detector)
        seen_through = folded(reference) if reference else None
        witnesses = Witnesses(detector.combination(), (low, high), detector.predictor, seen_through)
    return Scorer(
        folded(encoder),
        detector.decoder,
        detector.references,
        name=detector.scorer,
        mask_ratio=detector.mask_ratio,
        seed=detector.seed,
        precision=precision,
        device=device,
        text=text,
        clean_reference=detector.clean_reference,
        prescreen_threshold=low,
        witnesses=witnesses,
        profile=profile,
    )
