"""What a suspect encoder answers to auxiliary images, plain and benignly changed, beside what a predictor sees of them; on the workers."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sanitize import runtime, storage, workers
from sanitize.config import EncoderSpec
from sanitize.errors import ShardError
from sanitize.progress import ProgressDisplay
from sanitize.records import DecodedImage, Shard
from sanitize.runtime import Resources
from sanitize.stages.benign_changes import change
from sanitize.stages.encoders import Encoder, embed, load_encoder
from sanitize.stages.folding import folded
from sanitize.stages.images import difference_hash, shrink, to_batch
from sanitize.stages.precision import resolve_precision
from sanitize.stages.prefetch import image_batches
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import open_shard
from sanitize.workers import ProgressCallback, ShardFunction


@dataclass(frozen=True)
class Queries:
    """N images, V views each, the plain one first. Of the plain ones: hashes (N, 32) uint8, SHA-256 of the bytes, and image_hashes (N, 8).
    embeddings (N, V, D) float32 of the suspect encoder; seen (N, V, 3, E, E) uint8, or (N, V, F) float32 features of a reference."""

    hashes: Tensor
    image_hashes: Tensor
    embeddings: Tensor
    seen: Tensor

    def select(self, rows: Tensor) -> "Queries":
        return Queries(self.hashes[rows], self.image_hashes[rows], self.embeddings[rows], self.seen[rows])


@dataclass(frozen=True)
class QueryTask:
    """Of the images of one shard whose SHA-256 is wanted; cached by shard, so that a killed fit goes on.

    wanted: (n, 32) uint8. eye_size: side of the images that are kept for a student; with a `reference` its features are kept instead.
    """

    encoder: EncoderSpec
    reference: EncoderSpec | None
    eye_size: int
    views: int
    seed: int
    precision: str
    batch_size: int
    image_member: str
    wanted: Tensor
    cache: str

    def start(self, threads: int) -> ShardFunction[int]:
        device = runtime.device()
        encoder = folded(load_encoder(self.encoder)).to(device)
        reference = folded(load_encoder(self.reference)).to(device) if self.reference else None
        wanted = {bytes(row).hex() for row in self.wanted.numpy()}
        return lambda shard, progress: self._shard(shard, progress, encoder, reference, wanted, device, threads)

    def path(self, shard: Shard) -> str:
        return storage.join(self.cache, f"{shard.stem}.safetensors")

    @torch.inference_mode()
    def _shard(
        self,
        shard: Shard,
        progress: ProgressCallback,
        encoder: Encoder,
        reference: Encoder | None,
        wanted: set[str],
        device: torch.device,
        threads: int,
    ) -> int:
        """Images that were asked about now."""
        if storage.exists(self.path(shard)):
            return 0
        dtype, spec = resolve_precision(self.precision, device), encoder.spec
        parts: list[dict[str, Tensor]] = []
        before: Tensor | None = None  # the image before, which some changes mix in: that depends on no batch
        with open_shard(shard) as file:
            reader = ShardReader(file, shard, image_member=self.image_member)
            chosen = (s for s in reader.samples() if s.image and hashlib.sha256(s.image).hexdigest() in wanted)
            for decoded in image_batches(chosen, max(self.batch_size // self.views, 1), threads, spec):
                usable = [image for image in decoded if image.pixels is not None]
                if usable:
                    pixels = [image.pixels for image in usable if image.pixels is not None]
                    images = to_batch(pixels, spec.image_size, spec.resize, torch.device("cpu"))
                    views = torch.cat(list(self._views(usable, images, before))).to(device)
                    before = images[-1]
                    small = (shrink(views, self.eye_size).clamp(0, 1) * 255).round().byte()
                    seen = embed(reference, views, dtype) if reference else small
                    hashes = np.frombuffer(bytes.fromhex("".join(image.sha256 for image in usable)), np.uint8)
                    columns = {"embeddings": embed(encoder, views, dtype), "seen": seen}
                    parts.append(
                        {name: column.cpu().unflatten(0, (-1, self.views)) for name, column in columns.items()}
                        | {
                            "hashes": torch.from_numpy(hashes.reshape(-1, 32).copy()),
                            "image_hashes": difference_hash(images),
                        }
                    )
                    progress(sum(len(part["hashes"]) for part in parts), 0, reader.stored_bytes(decoded[-1].end))
        if not parts:
            return 0
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        storage.write_bytes(self.path(shard), safetensors.torch.save(tensors))
        return len(tensors["hashes"])

    def _views(self, decoded: Sequence[DecodedImage], images: Tensor, before: Tensor | None) -> Iterator[Tensor]:
        """(V, 3, S, S) of each image: itself, then changes drawn by its bytes and the seed."""
        others = [images[0].flip(-1) if before is None else before, *images[:-1]]
        for record, image, other in zip(decoded, images, others, strict=True):
            name = int(record.sha256[:16] or "0", 16)
            changed = [
                change(image, other, np.random.default_rng([self.seed, view, name])) for view in range(1, self.views)
            ]
            yield torch.stack([image, *changed])


def ask(task: QueryTask, shards: Sequence[Shard], resources: Resources, address: str) -> Queries:
    """Of all wanted images, each once, in the order of the shards. Raises ShardError when a shard cannot be read any more."""
    with ProgressDisplay("ask the encoder", len(shards), sum(shard.size for shard in shards)) as display:
        for outcome in workers.map_shards(task, shards, resources, display, address):
            if outcome.error:
                raise ShardError(f"{outcome.error} It could be read when this fit began; run the same command again.")
    parts = [
        safetensors.torch.load(storage.read_bytes(task.path(shard)))
        for shard in shards
        if storage.exists(task.path(shard))
    ]
    joined = {
        name: torch.cat([part[name] for part in parts]) for name in ("hashes", "image_hashes", "embeddings", "seen")
    }
    first: dict[bytes, int] = {}
    for position, row in enumerate(joined["hashes"].numpy()):
        first.setdefault(bytes(row), position)
    return Queries(**joined).select(torch.tensor(list(first.values())))
