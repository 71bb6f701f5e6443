"""Embed every image of a shard once and cache the result by shard, for commands that train on frozen embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sanitize import runtime, storage
from sanitize.config import EncoderSpec
from sanitize.records import Shard
from sanitize.stages.encoders import Encoder, embed, load_encoder
from sanitize.stages.folding import folded
from sanitize.stages.images import shrink, to_batch
from sanitize.stages.precision import resolve_precision
from sanitize.stages.prefetch import image_batches
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import open_shard
from sanitize.workers import ProgressCallback, ShardFunction


@dataclass(frozen=True)
class LabelledEmbeddings:
    """embeddings: (N, D) float32; labels: (N,) int64"""

    embeddings: Tensor
    labels: Tensor


@dataclass(frozen=True)
class EmbedTask:
    """Embed the images of one shard; cache embeddings (n, D) float32, hashes (n, 32) uint8 and sample index (n,).

    image_size: side of the small images that are cached beside the embeddings; 0 = none. limit: images a shard; 0 = all
    """

    encoder: EncoderSpec
    image_size: int
    precision: str
    batch_size: int
    limit: int
    image_member: str
    cache: str

    def start(self, threads: int) -> ShardFunction[int]:
        device = runtime.device()
        encoder = folded(load_encoder(self.encoder)).to(device)
        return lambda shard, progress: self._embed_shard(shard, progress, encoder, device, threads)

    def _embed_shard(
        self, shard: Shard, progress: ProgressCallback, encoder: Encoder, device: torch.device, threads: int
    ) -> int:
        """Images that were embedded now."""
        path = storage.join(self.cache, f"{shard.stem}.safetensors")
        if storage.exists(path):
            return 0
        columns: list[dict[str, Tensor]] = []
        total = 0
        for batch in self._batches(shard, encoder, device, threads, progress):
            columns.append(batch)
            total += len(batch["hashes"])
            if self.limit and total >= self.limit:
                break
        if not columns:
            return 0
        tensors = {name: torch.cat([part[name] for part in columns])[: self.limit or None] for name in columns[0]}
        storage.write_bytes(path, safetensors.torch.save(tensors))
        return len(tensors["hashes"])

    @torch.inference_mode()
    def _batches(
        self, shard: Shard, encoder: Encoder, device: torch.device, threads: int, progress: ProgressCallback
    ) -> Iterator[dict[str, Tensor]]:
        spec, dtype = encoder.spec, resolve_precision(self.precision, device)
        with open_shard(shard) as file:
            reader = ShardReader(file, shard, image_member=self.image_member)
            done = 0
            for decoded in image_batches(reader.samples(), self.batch_size, threads, spec):
                usable = [p for p in decoded if p.pixels is not None]
                if usable:
                    images = to_batch(
                        [p.pixels for p in usable if p.pixels is not None], spec.image_size, spec.resize, device
                    )
                    hashes = np.frombuffer(bytes.fromhex("".join(p.sha256 for p in usable)), np.uint8).reshape(-1, 32)
                    columns = {
                        "embeddings": embed(encoder, images, dtype).cpu(),
                        "hashes": torch.from_numpy(hashes.copy()),
                        "index": torch.tensor([p.index for p in usable]),
                    }
                    if self.image_size:
                        columns["images"] = shrink(images, self.image_size).half().cpu().contiguous()
                    yield columns
                done += len(decoded)
                progress(done, 0, reader.stored_bytes(decoded[-1].end))


def load_embeddings(path: str) -> dict[str, Tensor]:
    """The columns that EmbedTask cached."""
    return (
        safetensors.torch.load_file(path)
        if storage.is_local(path)
        else safetensors.torch.load(storage.read_bytes(path))
    )
