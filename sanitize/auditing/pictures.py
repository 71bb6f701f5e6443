"""What chosen samples of a scan look like: read from the input shards, embedded by the detector's encoder, kept small.

Memory: one batch of images, and for each sample its embedding, a thumbnail and a small copy of its pixels.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sanitize import runtime, storage
from sanitize.artifacts.detector_folder import Detector, load_detector, load_matching_encoder, make_scorer
from sanitize.artifacts.scan_folder import Run
from sanitize.auditing.scored import SampleRow
from sanitize.config import EncoderSpec
from sanitize.config_loading import from_mapping
from sanitize.errors import ShardError
from sanitize.records import DecodedImage, Sample, Shard
from sanitize.stages.captions import MAX_CAPTION_BYTES, caption_text, split_member
from sanitize.stages.encoders import embed
from sanitize.stages.images import file_ending, shrink
from sanitize.stages.prefetch import image_batches
from sanitize.stages.score_table import Floats
from sanitize.stages.scoring import Scorer, normalised
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import head_tail_sha256, open_shard, printable
from sanitize.stages.thumbnails import thumbnail, thumbnail_of_unit

log = logging.getLogger(__name__)
BATCH = 64
SMALL = 64  # largest side of the pixels that are kept to compare samples by
LABEL_MEMBERS = ("cls", "label", "json")
LABEL_FIELDS = ("label", "class", "cls", "target")
MAX_LABEL = 80  # characters


@dataclass(frozen=True)
class Picture:
    """image, reconstruction: WebP; the second at the size that the decoder makes. label, caption: "" = none."""

    image: bytes
    reconstruction: bytes
    label: str
    caption: str


@dataclass(frozen=True)
class Original:
    """A sample as its shard holds it. data: of its image member; ending: of a file for it; embedding: (D,) float32 raw; label,
    caption: "" = none."""

    row: int
    data: bytes
    ending: str
    embedding: Floats
    label: str
    caption: str


@dataclass(frozen=True)
class _Stored:
    """Of one sample, beside what is decoded of it."""

    data: bytes
    label: str


@dataclass(frozen=True)
class Pictures:
    """Of the samples that could be looked at, in the order asked for. rows (N,): theirs; embeddings (N, D) float32 raw; pixels
    (N, 3, s, s) uint8; missing: row → why there is no picture."""

    rows: NDArray[np.int64]
    embeddings: Floats
    pixels: Tensor
    pictures: list[Picture]
    missing: dict[int, str]

    def only(self, rows: NDArray[np.int64]) -> "Pictures":
        """Those of these rows, in the order they have here."""
        chosen = np.flatnonzero(np.isin(self.rows, rows))
        return Pictures(
            self.rows[chosen],
            self.embeddings[chosen],
            self.pixels[torch.from_numpy(chosen)],
            [self.pictures[position] for position in chosen.tolist()],
            self.missing,
        )


NO_PICTURES = Pictures(
    np.empty(0, np.int64), np.empty((0, 1), np.float32), torch.empty(0, 3, 1, 1, dtype=torch.uint8), [], {}
)
Found = tuple[NDArray[np.float32], Tensor, Picture]  # embedding, small pixels


class Onlooker:
    """Reads samples of one scan again and looks at them through its detector."""

    def __init__(self, run: Run, side: int = 128) -> None:
        """side: of thumbnails, in pixels. Raises CheckpointError when detector or encoder are not those of the scan."""
        self.run, self.side = run, side
        self.detector: Detector = load_detector(run.detector)
        encoder = load_matching_encoder(self.detector, from_mapping(EncoderSpec, run.encoder, "run.json: encoder"))
        self.scorer: Scorer = make_scorer(self.detector, encoder, run.precision, runtime.device())
        self.small = min(encoder.spec.image_size, SMALL)
        self._caption = split_member(run.caption_member or "txt")

    def look_at(self, rows: Sequence[SampleRow]) -> Pictures:
        """Each needed shard is opened once; one that is gone or is not the one that was scanned leaves its samples without a picture."""
        wanted: dict[str, dict[int, SampleRow]] = {}
        for row in rows:
            wanted.setdefault(row.shard, {})[row.index] = row
        found: dict[int, Found] = {}
        missing: dict[int, str] = {}
        for stem, by_index in wanted.items():
            try:
                self._look_into(stem, by_index, found, missing)
            except ShardError as error:
                log.warning("%s", error)
                missing |= {row.row: str(error) for row in by_index.values() if row.row not in found}
        order = [row.row for row in rows if row.row in found]
        missing |= {
            row.row: row.reason or row.status for row in rows if row.row not in found and row.row not in missing
        }
        embeddings = [found[row][0] for row in order]
        pixels = [found[row][1] for row in order]
        return Pictures(
            rows=np.array(order, np.int64),
            embeddings=np.stack(embeddings) if order else np.empty((0, 1), np.float32),
            pixels=torch.stack(pixels) if order else torch.empty(0, 3, self.small, self.small, dtype=torch.uint8),
            pictures=[found[row][2] for row in order],
            missing=missing,
        )

    def images(self, rows: Sequence[SampleRow]) -> list[Tensor]:
        """The encoder's input (3, S, S) in [0, 1] of those that can be read."""
        found = []
        for row in rows:
            for batch in self._batches(row.shard, {row.index: row}):
                usable = [image for image, _ in batch if image.sha256 == row.sha256 and image.pixels is not None]
                found += list(self.scorer.embed(usable)[0].cpu()) if usable else []
        return found

    def originals(self, stem: str, rows: Sequence[SampleRow]) -> Iterator[Original]:
        """Of one shard, which is read once, in its order; without those whose image cannot be decoded or is not the one that was
        scored. Raises ShardError when the shard is gone or is not the one that was scanned."""
        wanted = {row.index: row for row in rows}
        for batch in self._batches(stem, wanted):
            usable = [pair for pair in batch if _is_scored(pair[0], wanted)]
            if not usable:
                continue
            embeddings = self.scorer.embed([image for image, _ in usable])[1].float().cpu().numpy()
            for (image, stored), embedding in zip(usable, embeddings, strict=True):
                row, ending = wanted[image.index].row, file_ending(stored.data)
                yield Original(row, stored.data, ending, embedding, stored.label, image.caption)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] → (B, D) on the CPU, BATCH at a time."""
        with torch.inference_mode():
            parts = [
                embed(self.scorer.encoder, part.to(self.scorer.device), self.scorer.dtype).cpu()
                for part in images.split(BATCH)
            ]
        return torch.cat(parts)

    def _look_into(
        self,
        stem: str,
        wanted: dict[int, SampleRow],
        found: dict[int, Found],
        missing: dict[int, str],
    ) -> None:
        for batch in self._batches(stem, wanted):
            usable = [image for image, _ in batch if _is_scored(image, wanted)]
            labels = {image.index: stored.label for image, stored in batch}
            for image, _ in batch:
                if image.pixels is not None and image.sha256 != wanted[image.index].sha256:
                    missing[wanted[image.index].row] = "its image is not the one that was scored: the shard changed"
            if not usable:
                continue
            images, embeddings = self.scorer.embed(usable)
            targets = normalised(images, self.scorer.encoder, self.detector.decoder.config.image_size)
            made, _ = self.scorer.reconstruct(embeddings, targets, [image.sha256 for image in usable])
            made = (made * self.scorer.encoder.std + self.scorer.encoder.mean).cpu()
            small = (shrink(images, self.small).clamp(0, 1) * 255).round().byte().cpu()
            for number, image in enumerate(usable):
                assert image.pixels is not None
                picture = Picture(
                    image=thumbnail(image.pixels, self.side),
                    reconstruction=thumbnail_of_unit(made[number], self.side),
                    label=labels[image.index],
                    caption=image.caption,
                )
                embedding = embeddings[number].cpu().numpy()
                found[wanted[image.index].row] = (embedding, small[number].clone(), picture)

    def _batches(self, stem: str, wanted: dict[int, SampleRow]) -> Iterator[list[tuple[DecodedImage, _Stored]]]:
        shard = self.run.shard(stem)
        if not storage.exists(shard.url):
            raise ShardError(
                f"{shard.url}: is gone, so its samples cannot be shown. Restore it, then run the same command again."
            )
        if head_tail_sha256(shard) != self.run.shards[stem].head_tail_sha256:
            raise ShardError(f"{shard.url}: is not the shard that was scanned, so its samples are not shown.")
        stored: dict[int, _Stored] = {}  # filled by the reading thread before the image is given
        with open_shard(shard) as file:
            samples = self._samples(file, shard, wanted, stored)
            for batch in image_batches(samples, BATCH, threads=2):
                yield [(image, stored.pop(image.index)) for image in batch]

    def _samples(
        self, file: IO[bytes], shard: Shard, wanted: dict[int, SampleRow], stored: dict[int, _Stored]
    ) -> Iterator[Sample]:
        """Those that are wanted, with image, caption and label; others cost the reading of their headers."""
        reader = ShardReader(file, shard, with_images=False, image_member=self.run.image_member)
        left = set(wanted)
        for sample in reader.samples():
            if sample.index not in left:
                continue
            left.discard(sample.index)
            member = reader.image_of(sample)
            if member is not None:
                caption = self._caption_of(reader, sample)
                label, data = _label_of(reader, sample), reader.content(member)
                stored[sample.index] = _Stored(data, label)
                yield replace(sample, image=data, caption=caption)
            if not left:
                return

    def _caption_of(self, reader: ShardReader, sample: Sample) -> str:
        extension, name = self._caption
        member = next((member for member in sample.members if member.extension == extension), None)
        if member is None or member.size > MAX_CAPTION_BYTES:
            return ""
        return printable(caption_text(reader.content(member), name)[0])


def _is_scored(image: DecodedImage, wanted: dict[int, SampleRow]) -> bool:
    """Whether it can be decoded and is the one that was scored."""
    return image.pixels is not None and image.sha256 == wanted[image.index].sha256


def _label_of(reader: ShardReader, sample: Sample) -> str:
    """As the sample's .cls, .label or .json says it; "" = it does not."""
    for extension in LABEL_MEMBERS:
        member = next((member for member in sample.members if member.extension == extension), None)
        if member is not None and member.size <= MAX_CAPTION_BYTES:
            text = reader.content(member).decode("utf-8", "replace")
            if label := _label_in_json(text) if extension == "json" else text.strip():
                return printable(label[:MAX_LABEL])
    return ""


def _label_in_json(text: str) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(text)
        found = [values[name] for name in LABEL_FIELDS if name in values] if isinstance(values, dict) else []
        return next((str(value) for value in found if isinstance(value, str | int)), "")
    return ""
