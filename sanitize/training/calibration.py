"""Embedding statistics of chosen auxiliary images, by the scan's own decoding, embedding and perturbations, on the workers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from sanitize import runtime, storage, workers
from sanitize.config import EncoderSpec
from sanitize.errors import ShardError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.clean_reference import embedding_statistics, neighbour_distance
from sanitize.stages.encoders import Encoder, embed, load_encoder
from sanitize.stages.folding import folded
from sanitize.stages.images import to_batch
from sanitize.stages.perturbations import embedding_changes
from sanitize.stages.precision import resolve_precision
from sanitize.stages.prefetch import image_batches
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import open_shard
from sanitize.workers import ProgressCallback, ShardFunction

Statistics = dict[str, NDArray[np.float32]]  # SHA-256 of an image's bytes → (V + 2,)


@dataclass(frozen=True)
class StatisticsTask:
    """Of the images of one shard whose SHA-256 is wanted; cached, so that a killed fit goes on.

    wanted: (n, 32) uint8; clean_embeddings: (M, D) float32 unit, that neighbour distances are measured to
    """

    encoder: EncoderSpec
    precision: str
    batch_size: int
    image_member: str
    wanted: Tensor
    clean_embeddings: Tensor
    cache: str

    def start(self, threads: int) -> ShardFunction[Statistics]:
        device = runtime.device()
        encoder = folded(load_encoder(self.encoder)).to(device)
        known = self.clean_embeddings.to(device)
        wanted = {bytes(row).hex() for row in self.wanted.numpy()}
        return lambda shard, progress: self._shard(shard, progress, encoder, known, wanted, threads)

    def _shard(
        self,
        shard: Shard,
        progress: ProgressCallback,
        encoder: Encoder,
        known: Tensor,
        wanted: set[str],
        threads: int,
    ) -> Statistics:
        path = storage.join(self.cache, f"{shard.stem}.safetensors")
        if storage.exists(path):
            return {name: row.numpy() for name, row in safetensors.torch.load(storage.read_bytes(path)).items()}
        found: Statistics = {}
        with open_shard(shard) as file:
            reader = ShardReader(file, shard, image_member=self.image_member)
            chosen = (s for s in reader.samples() if s.image and hashlib.sha256(s.image).hexdigest() in wanted)
            for decoded in image_batches(chosen, self.batch_size, threads, encoder.spec):
                rows = self._statistics([image.pixels for image in decoded if image.pixels is not None], encoder, known)
                found |= {image.sha256: row for image, row in zip(decoded, rows, strict=True)}
                progress(len(found), 0, reader.stored_bytes(decoded[-1].end))
        tensors = {name: torch.from_numpy(row) for name, row in found.items()}
        storage.write_bytes(path, safetensors.torch.save(tensors))
        return found

    @torch.inference_mode()
    def _statistics(self, pixels: list[Tensor], encoder: Encoder, known: Tensor) -> NDArray[np.float32]:
        device, spec = known.device, encoder.spec
        dtype = resolve_precision(self.precision, device)
        images = to_batch(pixels, spec.image_size, spec.resize, device)
        embeddings = embed(encoder, images, dtype)
        changes = embedding_changes(lambda perturbed: embed(encoder, perturbed, dtype), images, embeddings)
        statistics = embedding_statistics(changes, embeddings.norm(dim=1), neighbour_distance(embeddings, known))
        rows: NDArray[np.float32] = statistics.cpu().numpy()
        return rows


def measure_statistics(task: StatisticsTask, shards: Sequence[Shard], resources: Resources, address: str) -> Statistics:
    """Of all wanted images. Raises ShardError when a shard that was read before cannot be read now."""
    found: Statistics = {}
    with ProgressDisplay("calibrate", len(shards), sum(shard.size for shard in shards)) as display:
        for outcome in workers.map_shards(task, shards, resources, display, address):
            if outcome.result is None:
                raise ShardError(f"{outcome.error} It could be read when this fit began; run the same command again.")
            found |= outcome.result
    return found


def rows_of(statistics: Statistics, hashes: Tensor) -> NDArray[np.float32]:
    """(N, V + 2) of the images with these hashes (N, 32) uint8, in their order."""
    return np.stack([statistics[bytes(row).hex()] for row in hashes.numpy()])
