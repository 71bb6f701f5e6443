"""Pictures + encoder + decoder → one score per picture. Higher = more suspicious, everywhere.

`paper`: the reference score of DeDe, sum of squared differences over hidden pixels in normalised units (card section 4).
`lowres`: mean squared difference at the decoder's (low) resolution.
`reaction`: how unlike clean pictures' the embedding lies and reacts to alterations of the picture (stages/reactions.py); a picture
that looks clean by where it lies alone (first look below a gate) is not altered, its score is first look - gate, below every distance.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sanitize.records import Picture
from sanitize.stages.decoder import Decoder, hidden_pixels, patch_order, visible_count
from sanitize.stages.encoders import Encoder
from sanitize.stages.images import shrink, to_batch
from sanitize.stages.reactions import ALTERATIONS, CleanSignature, neighbour_distance, reactions, signature
from sanitize.stages.text import TextEncoder

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Columns of one batch, each (B,) float32; NaN where the model gave no finite number or had no memory for the picture.

    text_similarity: cosine of image and caption embeddings, NaN as well where there is no caption.
    neighbour_distance: of the embedding to clean ones, NaN but for the scorer `reaction`; reactions: (V, B), one row for each
    alteration, NaN as well where the picture was not altered.
    """

    score: Floats
    error: Floats
    error_reference: Floats
    embedding_norm: Floats
    text_similarity: Floats
    neighbour_distance: Floats
    reactions: Floats


@dataclass(frozen=True)
class References:
    """Mean and mean square of reconstructions of other embeddings, (3, R, R) each, computed once by fit."""

    mean: Tensor
    mean_square: Tensor

    def to(self, device: torch.device) -> "References":
        return References(self.mean.to(device), self.mean_square.to(device))


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


# what is computed from the reconstruction alone
SCORERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "paper": paper_score,
    "lowres": mean_score,
    "reaction": mean_score,
}
# score, error, error_reference, embedding_norm, text_similarity, neighbour_distance, reactions
COLUMNS = 6 + len(ALTERATIONS)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the hardware multiplies it natively, else fp32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def normalised(images: Tensor, encoder: Encoder, size: int) -> Tensor:
    """What the decoder reconstructs: the encoder's input at the decoder's resolution, (B, 3, R, R)."""
    return (shrink(images, size) - encoder.mean) / encoder.std


class Scorer:
    """Holds the frozen models; scores pictures in batches. A score does not depend on the other pictures of the batch."""

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
        clean: CleanSignature | None = None,
        gate: float = -math.inf,
    ) -> None:
        """clean, gate: of the scorer `reaction`; pictures whose first look is below `gate` are not altered."""
        self.device = device
        self.clean = clean.to(device) if clean else None
        self.gate = gate
        self.text = text.to(device) if text else None
        self.encoder = encoder.to(device)
        self.decoder = decoder.to(device)
        self.references = references.to(device)
        self.score = SCORERS[name]
        self.visible = visible_count(decoder.num_patches, mask_ratio)
        self.seed = seed
        self.dtype = resolve_precision(precision, device)
        self.largest = 0  # batch that fitted into memory; 0 = nothing was too large yet

    def __call__(self, pictures: Sequence[Picture]) -> Scores:
        """Score decodable pictures. A batch too large for the device is halved, down to single pictures."""
        size = min(len(pictures), self.largest or len(pictures))
        parts = [self._score_or_halve(pictures[i : i + size]) for i in range(0, len(pictures), max(size, 1))]
        columns = torch.cat(parts, dim=1).numpy() if parts else np.empty((COLUMNS, 0), np.float32)
        columns = np.where(np.isfinite(columns[:4]).all(axis=0), columns, np.float32("nan"))
        score, error, reference, norm, similarity, distance, *observed = columns
        return Scores(score, error, reference, norm, similarity, distance, np.stack(observed))

    def _score_or_halve(self, pictures: Sequence[Picture]) -> Tensor:
        try:
            return self._score(pictures).cpu()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if len(pictures) == 1:
            log.warning("sample %s does not fit into the memory of %s even alone", pictures[0].key, self.device)
            return torch.full((COLUMNS, 1), float("nan"))
        self.largest = len(pictures) // 2
        log.warning("out of memory on %s: batches of %d from now on", self.device, self.largest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = pictures[: self.largest], pictures[self.largest :]
        return torch.cat([self._score_or_halve(half) for half in halves], dim=1)

    @torch.inference_mode()
    def _score(self, pictures: Sequence[Picture]) -> Tensor:
        """(COLUMNS, B), in the order of that constant's comment."""
        images, embeddings = self.embed(pictures)
        targets = normalised(images, self.encoder, self.decoder.config.image_size)
        reconstructions, hidden = self.reconstruct(embeddings, targets, [p.sha256 for p in pictures])
        error = mean_score(targets, reconstructions, hidden)
        score, norms = self.score(targets, reconstructions, hidden), embeddings.norm(dim=1)
        observed, distances = self._unaltered(len(pictures)), torch.full_like(error, float("nan"))
        if self.clean:
            distances = neighbour_distance(embeddings, self.clean.bank)
            look = self.clean.first_look(signature(observed, norms, distances))
            passed = look >= self.gate
            observed[passed] = self.react(images[passed], embeddings[passed])
            found = signature(observed, norms, distances)
            score = torch.where(passed, self.clean.distance(found), look - self.gate)
        columns = (
            score,
            error,
            reference_error(targets, self.references, hidden),
            norms,
            self.text_similarity(embeddings, [p.caption for p in pictures]),
            distances,
        )
        return torch.cat([torch.stack(columns), observed.T])

    @torch.inference_mode()
    def react(self, images: Tensor, embeddings: Tensor) -> Tensor:
        """(B, V) reactions of pictures (B, 3, S, S) in [0, 1] with embeddings (B, D)."""
        if not len(images):
            return self._unaltered(0)
        return reactions(lambda altered: embed(self.encoder, altered, self.dtype), images, embeddings)

    def _unaltered(self, count: int) -> Tensor:
        return torch.full((count, len(ALTERATIONS)), float("nan"), device=self.device)

    def text_similarity(self, embeddings: Tensor, captions: Sequence[str]) -> Tensor:
        """(B,) cosine of each image with its own caption; NaN where the caption is "" or no text tower is loaded."""
        similarity = torch.full((len(captions),), float("nan"), device=embeddings.device)
        known = [position for position, caption in enumerate(captions) if caption]
        if self.text and known:
            texts = self.text([captions[position] for position in known])
            similarity[known] = functional.cosine_similarity(embeddings[known], texts)
        return similarity

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """images (B, 3, S, S) in [0, 1] and raw embeddings (B, D), both float32 on the device."""
        spec = self.encoder.spec
        pixels = [p.pixels for p in pictures if p.pixels is not None]
        images = to_batch(pixels, spec.image_size, spec.resize, self.device)
        return images, embed(self.encoder, images, self.dtype)

    @torch.inference_mode()
    def reconstruct(self, embeddings: Tensor, targets: Tensor, hashes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, R, R) and hidden pixels (B, 1, R, R); with nothing visible no permutation is drawn."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if not self.visible:
                hidden = torch.ones(len(targets), 1, *targets.shape[-2:], dtype=torch.bool, device=self.device)
                return self.decoder(embeddings).float(), hidden
            orders = np.stack([patch_order(sha256, self.decoder.num_patches, self.seed) for sha256 in hashes])
            order = torch.from_numpy(orders).to(self.device)
            reconstructions = self.decoder(embeddings, targets, order, self.visible).float()
        return reconstructions, hidden_pixels(order, self.visible, self.decoder.config)


def embed(encoder: Encoder, images: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, S, S) in [0, 1] → (B, D) float32, computed in `dtype`."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        embeddings: Tensor = encoder(images)
    return embeddings.float()


def out_of_memory(error: RuntimeError) -> bool:
    """CUDA has its own exception; the CPU allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
