"""Images + encoder + decoder → score columns. Higher = more suspicious, everywhere.

`paper`: DeDe's score, the sum of squared differences over hidden pixels in normalised units
(Hou et al., CVPR 2025; reference code, src/utils.py, MAE_error).
`lowres`: mean squared difference at the decoder's (low) resolution.
`reaction`: how unlike clean images' the embedding lies and changes under perturbations (clean_reference.py); an image that looks
clean by where it lies alone (prescreen score below a threshold) is not perturbed: its score is the difference, below every distance.
`evidence`: prediction (prediction.py) and where the embedding lies, both of the one encoder pass, and the reaction to
perturbations of images that these two leave undecided; combined by their p-values (evidence.py).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sanitize.profile import Profile
from sanitize.records import DecodedImage
from sanitize.stages.agreement import IMAGE_HASH, RESIDUALS
from sanitize.stages.clean_reference import CleanReference, embedding_statistics, neighbour_distance
from sanitize.stages.decoder import Decoder, hidden_pixels, patch_order, visible_count
from sanitize.stages.encoders import Encoder, embed
from sanitize.stages.evidence import PREDICTION, REACTION, WHEREABOUTS, Evidence
from sanitize.stages.images import difference_hash, shrink, to_batch
from sanitize.stages.perturbations import CHANGE_COLUMNS, PERTURBATIONS, embedding_changes
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.stages.prediction import Predictor
from sanitize.stages.text import TextEncoder

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
Columns = dict[str, Floats]  # score column (stages/score_table.py names them all) → (B,), of vectors (B, n); NaN = none
TensorColumns = dict[str, Tensor]
REQUIRED = ("score", "error", "error_reference", "embedding_norm")  # an image that lacks one has no score at all


@dataclass(frozen=True)
class References:
    """Mean and mean square of reconstructions of other embeddings, (3, R, R) each, computed once by fit."""

    mean: Tensor
    mean_square: Tensor

    def to(self, device: torch.device) -> "References":
        return References(self.mean.to(device), self.mean_square.to(device))


# ---------------------------------------------------------------- statistics of the reconstruction


def paper_score(images: Tensor, reconstructions: Tensor, hidden: Tensor) -> Tensor:
    """(B,) sum over channels and hidden pixels of (x - x_hat)^2; images, reconstructions (B, 3, R, R) normalised."""
    return ((images - reconstructions).square() * hidden).sum(dim=(1, 2, 3))


def mean_score(images: Tensor, reconstructions: Tensor, hidden: Tensor) -> Tensor:
    """(B,) mean over channels and hidden pixels of (x - x_hat)^2."""
    return paper_score(images, reconstructions, hidden) / (3 * hidden.sum(dim=(1, 2, 3)))


def reference_error(images: Tensor, references: References, hidden: Tensor) -> Tensor:
    """(B,) mean over references m and hidden pixels of (x - x_hat_m)^2, without forming the B x M differences."""
    squared = images.square() - 2 * images * references.mean + references.mean_square
    return (squared * hidden).sum(dim=(1, 2, 3)) / (3 * hidden.sum(dim=(1, 2, 3)))


# the score of the reconstruction alone; `evidence` and `reaction` replace it
SCORERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "paper": paper_score,
    "lowres": mean_score,
    "reaction": mean_score,
    "evidence": mean_score,
}


@dataclass(frozen=True)
class Witnesses:
    """What the scorer `evidence` holds besides the encoder. undecided: lowest and highest score of the one pass with which an image is
    perturbed; reference: the encoder through which the predictor sees images, None = it sees them itself."""

    evidence: Evidence
    undecided: tuple[float, float]
    predictor: Predictor | None = None
    reference: Encoder | None = None

    def to(self, device: torch.device) -> "Witnesses":
        predictor = self.predictor.to(device) if self.predictor else None
        return replace(self, predictor=predictor, reference=self.reference.to(device) if self.reference else None)


def normalised(images: Tensor, encoder: Encoder, size: int) -> Tensor:
    """What the decoder reconstructs: the encoder's input at the decoder's resolution, (B, 3, R, R)."""
    return (shrink(images, size) - encoder.mean) / encoder.std


# ---------------------------------------------------------------- the scorer


class Scorer:
    """Holds the frozen models; scores images in batches. A score does not depend on the other images of the batch."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        references: References,
        *,
        name: str,
        mask_ratio: float,
        seed: int,
        precision: str,
        device: torch.device,
        text: TextEncoder | None = None,
        clean_reference: CleanReference | None = None,
        prescreen_threshold: float = -math.inf,
        witnesses: Witnesses | None = None,
        profile: Profile | None = None,
    ) -> None:
        """clean_reference: of the scorers `evidence` and `reaction`; of the latter, images with a prescreen score below the threshold are
        not perturbed. witnesses: of the scorer `evidence`."""
        self.device = device
        self.profile = profile or Profile()
        self.clean_reference = clean_reference.to(device) if clean_reference else None
        self.prescreen_threshold = prescreen_threshold
        self.witnesses = witnesses.to(device) if witnesses else None
        self.text = text.to(device) if text else None
        self.encoder = encoder.to(device)
        self.decoder = decoder.to(device)
        self.references = references.to(device)
        self.score = SCORERS[name]
        self.visible = visible_count(decoder.num_patches, mask_ratio)
        self.seed = seed
        self.dtype = resolve_precision(precision, device)
        self.largest = 0  # batch that fitted into memory; 0 = nothing was too large yet

    def __call__(self, decoded: Sequence[DecodedImage]) -> Columns:
        """Score decodable images. A batch too large for the device is halved, down to single images."""
        with self.profile.of("scoring"):
            return self._columns(decoded)

    def _columns(self, decoded: Sequence[DecodedImage]) -> Columns:
        size = min(len(decoded), self.largest or len(decoded))
        parts = [self._score_or_halve(decoded[i : i + size]) for i in range(0, len(decoded), max(size, 1))]
        columns = {name: values.numpy() for name, values in _joined(parts).items()}
        unscored = ~np.all([np.isfinite(columns[name]) for name in REQUIRED if name in columns], axis=0)
        for values in columns.values():
            values[unscored] = np.float32("nan")
        return columns

    def _score_or_halve(self, decoded: Sequence[DecodedImage]) -> TensorColumns:
        try:
            return {name: values.cpu() for name, values in self._score(decoded).items()}
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if len(decoded) == 1:
            log.warning("sample %s does not fit into the memory of %s even alone", decoded[0].key, self.device)
            return {"score": torch.full((1,), float("nan"))}
        self.largest = len(decoded) // 2
        log.warning("out of memory on %s: batches of %d from now on", self.device, self.largest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return _joined([self._score_or_halve(half) for half in (decoded[: self.largest], decoded[self.largest :])])

    @torch.inference_mode()
    def _score(self, decoded: Sequence[DecodedImage]) -> TensorColumns:
        """Adding a statistic: a line here, and one in `score_table.STATISTICS` (docs/extending.md)."""
        images, embeddings = self.embed(decoded)
        targets = normalised(images, self.encoder, self.decoder.config.image_size)
        reconstructions, hidden = self.reconstruct(embeddings, targets, [image.sha256 for image in decoded])
        columns = {
            "score": self.score(targets, reconstructions, hidden),
            "error": mean_score(targets, reconstructions, hidden),
            "error_reference": reference_error(targets, self.references, hidden),
            "embedding_norm": embeddings.norm(dim=1),
            "text_similarity": self.text_similarity(embeddings, [image.caption for image in decoded]),
        }
        if self.clean_reference and self.witnesses:
            columns |= self._by_evidence(self.clean_reference, self.witnesses, images, embeddings)
        elif self.clean_reference:
            columns |= self._against_clean(self.clean_reference, images, embeddings)
        return columns

    def _by_evidence(
        self, reference: CleanReference, witnesses: Witnesses, images: Tensor, embeddings: Tensor
    ) -> TensorColumns:
        """The score of `evidence` and what it is made of; changes are NaN where an image was not perturbed."""
        norms, distances, prescreen = self._whereabouts(reference, embeddings)
        columns, values = {"neighbour_distance": distances}, {WHEREABOUTS: prescreen}
        if witnesses.predictor:
            whitened, energy = witnesses.predictor(embeddings, self._seen(witnesses, witnesses.predictor, images))
            columns |= {"prediction_residual": whitened.square().mean(dim=1), "prediction_energy": energy}
            columns |= {RESIDUALS: whitened, IMAGE_HASH: difference_hash(images).float()}
            values[PREDICTION] = energy
        first, (low, high) = _combined(witnesses.evidence, values), witnesses.undecided
        changes = self._changes_of(((first >= low) & (first <= high)).to(self.device), images, embeddings)
        values[REACTION] = reference.distance(embedding_statistics(changes, norms, distances))
        columns["score"] = _combined(witnesses.evidence, values).to(self.device)
        return columns | dict(zip(CHANGE_COLUMNS, changes.T, strict=True))

    def _seen(self, witnesses: Witnesses, predictor: Predictor, images: Tensor) -> Tensor:
        """What the predictor looks at: small images, or features of the reference encoder."""
        if witnesses.reference:
            return self._embed(witnesses.reference, images)
        return shrink(images, predictor.eye_size).clamp(0, 1)

    def _against_clean(self, reference: CleanReference, images: Tensor, embeddings: Tensor) -> TensorColumns:
        """The score of `reaction` and what it is made of; changes are NaN where an image was not perturbed."""
        norms, distances, prescreen = self._whereabouts(reference, embeddings)
        passed = prescreen >= self.prescreen_threshold
        changes = self._changes_of(passed, images, embeddings)
        distance = reference.distance(embedding_statistics(changes, norms, distances))
        columns = {
            "score": torch.where(passed, distance, prescreen - self.prescreen_threshold),
            "neighbour_distance": distances,
        }
        return columns | dict(zip(CHANGE_COLUMNS, changes.T, strict=True))

    def _whereabouts(self, reference: CleanReference, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norms, neighbour distances and prescreen scores, (B,) each."""
        norms, distances = embeddings.norm(dim=1), neighbour_distance(embeddings, reference.clean_embeddings)
        nothing = embeddings.new_empty(len(embeddings), 0)
        return norms, distances, reference.prescreen_score(embedding_statistics(nothing, norms, distances))

    def _changes_of(self, chosen: Tensor, images: Tensor, embeddings: Tensor) -> Tensor:
        """(B, V) changes of the images that are chosen, (B,) bool; NaN of the others, which cost no encoder pass."""
        changes = torch.full((len(images), len(PERTURBATIONS)), float("nan"), device=self.device)
        if chosen.any():
            changes[chosen] = self.changes(images[chosen], embeddings[chosen])
        return changes

    @torch.inference_mode()
    def changes(self, images: Tensor, embeddings: Tensor) -> Tensor:
        """(B, V) changes of the embeddings (B, D) when the images (B, 3, S, S) in [0, 1] are perturbed."""
        return embedding_changes(lambda perturbed: self._embed(self.encoder, perturbed), images, embeddings)

    def text_similarity(self, embeddings: Tensor, captions: Sequence[str]) -> Tensor:
        """(B,) cosine of each image with its own caption; NaN where the caption is "" or no text tower is loaded."""
        similarity = torch.full((len(captions),), float("nan"), device=embeddings.device)
        known = [position for position, caption in enumerate(captions) if caption]
        if self.text and known:
            texts = self.text([captions[position] for position in known])
            similarity[known] = functional.cosine_similarity(embeddings[known], texts)
        return similarity

    @torch.inference_mode()
    def embed(self, decoded: Sequence[DecodedImage]) -> tuple[Tensor, Tensor]:
        """images (B, 3, S, S) in [0, 1] and raw embeddings (B, D), both float32 on the device."""
        spec = self.encoder.spec
        pixels = [image.pixels for image in decoded if image.pixels is not None]
        with self.profile.of("transfer"):
            images = to_batch(pixels, spec.image_size, spec.resize, self.device)
        return images, self._embed(self.encoder, images)

    def _embed(self, encoder: Encoder, images: Tensor) -> Tensor:
        with self.profile.of("encoder"):
            return embed(encoder, images, self.dtype)

    @torch.inference_mode()
    def reconstruct(self, embeddings: Tensor, targets: Tensor, hashes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, R, R) and hidden pixels (B, 1, R, R); with nothing visible no permutation is drawn."""
        with autocast(self.device, self.dtype):
            if not self.visible:
                hidden = torch.ones(len(targets), 1, *targets.shape[-2:], dtype=torch.bool, device=self.device)
                return self.decoder(embeddings).float(), hidden
            orders = np.stack([patch_order(sha256, self.decoder.num_patches, self.seed) for sha256 in hashes])
            order = torch.from_numpy(orders).to(self.device)
            reconstructions = self.decoder(embeddings, targets, order, self.visible).float()
        return reconstructions, hidden_pixels(order, self.visible, self.decoder.config)


def _combined(evidence: Evidence, values: Mapping[str, Tensor]) -> Tensor:
    """(B,) on the CPU, where the calibration is: a few numbers an image."""
    return torch.from_numpy(evidence.score({kind: column.cpu().numpy() for kind, column in values.items()}))


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> TensorColumns:
    """Columns of several batches, one after the other; NaN where a batch has not all of them."""

    shapes = {name: values.shape[1:] for part in parts for name, values in part.items()}

    def column(part: Mapping[str, Tensor], name: str) -> Tensor:
        return part.get(name, torch.full((len(part["score"]), *shapes[name]), float("nan")))

    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([column(part, name) for part in parts]) for name in names} or {"score": torch.empty(0)}


def out_of_memory(error: RuntimeError) -> bool:
    """CUDA has its own exception; the CPU allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
