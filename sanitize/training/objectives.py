"""What each mode of `finetune` trains: a head on embeddings, encoder and head on streamed images, both towers of a CLIP."""

import contextlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.config import FinetuneConfig
from sanitize.errors import ConfigError
from sanitize.records import DecodedImage
from sanitize.stages.encoders import Encoder
from sanitize.stages.images import to_batch
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.stages.prefetch import AHEAD, decode_ahead
from sanitize.training.augment import random_views
from sanitize.training.clip import LARGEST_SCALE, Clip, info_nce
from sanitize.training.data_order import Order, lane_pieces, lanes_of
from sanitize.training.distributed import Rank
from sanitize.training.embedding_cache import LabelledEmbeddings
from sanitize.training.heads import Head, fresh_head
from sanitize.training.loop import Batch, Metrics, sum_over_ranks
from sanitize.training.sample_index import DataSet


def _autocast(config: FinetuneConfig, rank: Rank) -> torch.autocast:
    return autocast(rank.device, resolve_precision(config.precision, rank.device))


def steps_of(samples: int, batch_size: int) -> int:
    return -(-samples // batch_size)


# ---------------------------------------------------------------- a head on embeddings


@dataclass(frozen=True)
class HeadPiece:
    embeddings: Tensor
    labels: Tensor
    kept: Tensor | None  # of the dropout


class HeadObjective:
    """linear and mlp: batches are slices of a seeded permutation, shared evenly by the ranks."""

    def __init__(
        self, config: FinetuneConfig, classes: int, training: LabelledEmbeddings, validation: LabelledEmbeddings | None
    ) -> None:
        self.model = fresh_head(config.mode, training.embeddings.shape[1], classes, config.seed)
        self._config, self._training, self._validation = config, training, validation
        self.samples = len(training.labels)
        self.steps = steps_of(self.samples, config.batch_size)

    def batches(self, epoch: int, first: int, rank: Rank) -> Generator[Batch, None, None]:
        config, steps = self._config, self.steps
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(self.samples))
        for step in range(first, steps):
            numbers = order[self.samples * step // steps : self.samples * (step + 1) // steps]
            kept = self.model.dropout(len(numbers), np.random.default_rng([config.seed, epoch, step]))
            mine = range(len(numbers) * rank.index // rank.world, len(numbers) * (rank.index + 1) // rank.world)
            pieces = []
            for part in np.array_split(np.array(mine, np.int64), config.accumulate):
                chosen = numbers[torch.from_numpy(part)]
                embeddings, labels = self._training.embeddings[chosen], self._training.labels[chosen]
                keep = None if kept is None else kept[torch.from_numpy(part)].to(rank.device)
                pieces.append(HeadPiece(embeddings.to(rank.device), labels.to(rank.device), keep))
            yield Batch(pieces, len(mine), 0)

    def loss(self, model: nn.Module, piece: HeadPiece, rank: Rank) -> Tensor:
        with _autocast(self._config, rank):
            logits = model(piece.embeddings, piece.kept)
        return functional.cross_entropy(logits.float(), piece.labels, reduction="sum")

    @torch.no_grad()
    def validate(self, rank: Rank) -> Metrics:
        """Every rank does all of it: cheaper than to share."""
        if self._validation is None:
            return {}
        parts = zip(self._validation.embeddings.split(8192), self._validation.labels.split(8192), strict=True)
        found = [_classified(self.model(e.to(rank.device)), labels.to(rank.device)) for e, labels in parts]
        return _accuracy_and_loss(torch.stack(found).sum(dim=0))


def _classified(logits: Tensor, labels: Tensor) -> Tensor:
    """(3,) float64: sum of losses, right predictions, samples."""
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    right = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss.double(), right.double(), torch.tensor(float(len(labels))).to(loss.device).double()])


def _accuracy_and_loss(totals: Tensor) -> Metrics:
    loss, right, count = totals.tolist()
    accuracy = right / max(count, 1)
    return {"validation_loss": loss / max(count, 1), "validation_accuracy": accuracy, "score": accuracy}


# ---------------------------------------------------------------- streams


@dataclass(frozen=True)
class Piece:
    """Decoded samples of one rank; `usable` have an image (and a caption where captions are trained on)."""

    epoch: int
    usable: list[DecodedImage]
    unreadable: int

    @property
    def numbers(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.array([image.index for image in self.usable], np.int64)


class Stream:
    """Pieces of shards in the order of stages/lanes.py, read and decoded ahead."""

    def __init__(self, config: FinetuneConfig, data: DataSet, threads: int, *, training: bool) -> None:
        self.data = data
        self.samples = len(data)
        self.steps = steps_of(self.samples, config.batch_size)
        self._captions = config.caption_member if config.mode == "contrastive" else ""
        self._threads, self._spec = threads, config.encoder
        parts = config.accumulate if training else 1
        buffer = config.shuffle_buffer if training else 0
        self._order = Order(min(config.lanes, self.samples), self.steps * parts, buffer, config.seed)
        self._parts = parts

    def batches(self, epoch: int, first: int, rank: Rank) -> Generator[Batch, None, None]:
        mine = lanes_of(rank.index, rank.world, self._order.lanes)
        sizes, samples = lane_pieces(self.data, self._order, epoch, first * self._parts, mine, self._captions)
        ahead = max(1, AHEAD * self._parts * max(sizes, default=1))
        with (
            contextlib.closing(samples),
            contextlib.closing(decode_ahead(samples, ahead, self._threads, self._spec)) as decoded,
        ):
            for begin in range(0, len(sizes), self._parts):
                read = [list(itertools.islice(decoded, size)) for size in sizes[begin : begin + self._parts]]
                pieces = [self._piece(epoch, part) for part in read]
                yield Batch(pieces, sum(len(p.usable) for p in pieces), sum(p.unreadable for p in pieces))

    def _piece(self, epoch: int, decoded: list[DecodedImage]) -> Piece:
        usable = [p for p in decoded if p.pixels is not None and (p.caption or not self._captions)]
        return Piece(epoch, usable, len(decoded) - len(usable))


def _images(config: FinetuneConfig, piece: Piece, device: torch.device, *, training: bool) -> Tensor:
    """(B, 3, S, S) float32 in [0, 1]; one black image for a piece without an image, so that every rank runs the model."""
    size = config.encoder.image_size
    pixels = [image.pixels for image in piece.usable if image.pixels is not None]
    if not pixels:
        return torch.zeros(1, 3, size, size, device=device)
    images = to_batch(pixels, size, config.encoder.resize, device)
    if training and config.augment:
        images = random_views(images, piece.numbers, config.seed, piece.epoch)
    return images


def require_lanes(config: FinetuneConfig, data: DataSet, workers: int) -> None:
    lanes = min(config.lanes, len(data))
    if workers > lanes:
        raise ConfigError(
            f"{workers} workers share {lanes} lanes ({len(data)} samples, lanes={config.lanes}), so that some would have nothing "
            f"to read. Give --workers {lanes} or fewer, or more samples or lanes (--set lanes={workers})."
        )


# ---------------------------------------------------------------- encoder and head


class Classifier(nn.Module):
    """images (B, 3, S, S) in [0, 1] → logits (B, C). The encoder learns, but stays in eval mode: BatchNorm keeps its statistics
    and dropout is off, so that a sample's loss does not depend on the rest of its batch."""

    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(True)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images))
        return logits


class FullObjective:
    """full: cross-entropy of encoder and linear head on streamed images."""

    def __init__(
        self,
        config: FinetuneConfig,
        classes: int,
        encoder: Encoder,
        training: DataSet,
        validation: DataSet | None,
        threads: int,
    ) -> None:
        self.model = Classifier(encoder, fresh_head("linear", embedding_size(encoder), classes, config.seed))
        self._config, self._stream = config, Stream(config, training, threads, training=True)
        self._labels = torch.from_numpy(training.labels)
        self._validation = Stream(config, validation, threads, training=False) if validation else None
        self.samples, self.steps = self._stream.samples, self._stream.steps

    def batches(self, epoch: int, first: int, rank: Rank) -> Generator[Batch, None, None]:
        return self._stream.batches(epoch, first, rank)

    def loss(self, model: nn.Module, piece: Piece, rank: Rank) -> Tensor:
        count = len(piece.usable)
        with _autocast(self._config, rank):
            logits = model(_images(self._config, piece, rank.device, training=True))[:count]
        labels = self._labels[piece.numbers].to(rank.device)
        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    @torch.no_grad()
    def validate(self, rank: Rank) -> Metrics:
        if self._validation is None:
            return {}
        labels = torch.from_numpy(self._validation.data.labels)
        totals = torch.zeros(3, dtype=torch.float64, device=rank.device)
        for batch in self._validation.batches(0, 0, rank):
            piece: Piece = batch.pieces[0]
            if piece.usable:
                with _autocast(self._config, rank):
                    logits = self.model(_images(self._config, piece, rank.device, training=False))
                totals += _classified(logits, labels[piece.numbers].to(rank.device))
        return _accuracy_and_loss(sum_over_ranks(totals, rank))


@torch.no_grad()
def embedding_size(encoder: Encoder) -> int:
    size = encoder.spec.image_size
    return int(encoder(torch.zeros(1, 3, size, size)).shape[1])


# ---------------------------------------------------------------- CLIP


class Towers(nn.Module):
    """(images (B, 3, S, S), tokens (B, L)) → unit embeddings (B, D) of both and the factor of their cosines."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.image = clip.image.requires_grad_(True)
        self.text = clip.text.tower.requires_grad_(True)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone())

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            self.logit_scale.clamp_(0, LARGEST_SCALE)
        seen, read = self.image(images).float(), self.text(tokens).float()
        return functional.normalize(seen, dim=1), functional.normalize(read, dim=1), self.logit_scale.exp()


class ContrastiveObjective:
    """contrastive: symmetric InfoNCE; the negatives of a pair are all others of the piece, on whatever rank."""

    def __init__(
        self, config: FinetuneConfig, clip: Clip, training: DataSet, validation: DataSet | None, threads: int
    ) -> None:
        self.model = Towers(clip)
        self._config, self._text = config, clip.text
        self._stream = Stream(config, training, threads, training=True)
        self._validation = Stream(config, validation, threads, training=False) if validation else None
        self.samples, self.steps = self._stream.samples, self._stream.steps

    def batches(self, epoch: int, first: int, rank: Rank) -> Generator[Batch, None, None]:
        return self._stream.batches(epoch, first, rank)

    def loss(self, model: nn.Module, piece: Piece, rank: Rank) -> Tensor:
        """Every rank computes the loss of all ranks' pairs and takes 1 / world of it."""
        seen, read, scale = self._embed_pairs(model, piece, rank, training=True)
        if not len(seen):
            return (seen.sum() + read.sum() + scale) * 0
        return info_nce(seen, read, scale) * len(seen) / rank.world

    def _embed_pairs(
        self, model: nn.Module, piece: Piece, rank: Rank, *, training: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        captions = [image.caption for image in piece.usable] or [""]
        tokens = self._text.tokens(captions).to(rank.device)
        with _autocast(self._config, rank):
            seen, read, scale = model(_images(self._config, piece, rank.device, training=training), tokens)
        pairs = torch.cat([seen, read], dim=1)[: len(piece.usable)]
        seen, read = gather_rows(pairs, rank).chunk(2, dim=1)
        return seen, read, scale

    @torch.no_grad()
    def validate(self, rank: Rank) -> Metrics:
        if self._validation is None:
            return {}
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in self._validation.batches(0, 0, rank):
            seen, read, scale = self._embed_pairs(self.model, batch.pieces[0], rank, training=False)
            if len(seen):
                found = (seen @ read.T).argmax(dim=1).cpu() == torch.arange(len(seen))
                loss = float(info_nce(seen, read, scale)) * len(seen)
                totals += torch.tensor([loss, float(found.sum()), float(len(seen))], dtype=torch.float64)
        loss, right, count = totals.tolist()
        mean = loss / max(count, 1)
        return {"validation_loss": mean, "validation_retrieval": right / max(count, 1), "score": -mean}


def gather_rows(rows: Tensor, rank: Rank) -> Tensor:
    """(b, D) of this rank → (B, D) of all ranks in rank order. Ranks may have different b, 0 too.

    Only this rank's rows have a gradient. It is multiplied by the number of ranks: the loss of all rows is complete on each
    rank, and DDP will divide by that number; what every rank has whole (the temperature) needs no factor.
    """
    if rank.world == 1:
        return rows
    own = rows * rank.world - (rows * (rank.world - 1)).detach()
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(rank.world)]
    torch.distributed.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    largest = max(int(count) for count in counts)
    padded = functional.pad(rows.detach(), (0, 0, 0, largest - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(rank.world)]
    torch.distributed.all_gather(parts, padded)
    found: Sequence[Tensor] = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
    return torch.cat([own if number == rank.index else part for number, part in enumerate(found)])
