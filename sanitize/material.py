"""What `finetune` trains and measures on: shards → index of their samples → cached embeddings. Cached, so a rerun goes on."""

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from sanitize import runtime, storage
from sanitize.config import EncoderSpec, FinetuneConfig
from sanitize.embedding import EmbedTask, load_embeddings
from sanitize.errors import ConfigError
from sanitize.objectives import Features
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources, Result, ShardFunction, Tick
from sanitize.stages.sample_index import DataSet, SampleIndex, index_shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexTask:
    """Index one shard; its samples that cannot be used and its damage are counted beside it."""

    image_member: str
    label_member: str
    caption_member: str
    cache: str

    def start(self, _threads: int) -> ShardFunction:
        return self._index

    def _index(self, shard: Shard, tick: Tick) -> Result:
        path = storage.join(self.cache, shard.stem)
        if not storage.exists(f"{path}.json"):
            index, unusable, damage = index_shard(shard, self.image_member, self.label_member, self.caption_member)
            storage.write_bytes(f"{path}.safetensors", index.to_bytes())
            storage.write_json(f"{path}.json", {"unusable": dict(unusable), "damage": damage, "samples": len(index)})
        result = storage.read_json(f"{path}.json")
        tick(result["samples"], 0, shard.size)
        return result


@dataclass(frozen=True)
class Material:
    """One set of shards. unusable: samples left out, by reason. failed: one message for each shard that is left out or damaged."""

    name: str
    data: DataSet
    unusable: Counter[str]
    failed: tuple[str, ...]


def indexed(
    name: str, config: FinetuneConfig, shards: list[Shard], label_member: str, caption_member: str, resources: Resources
) -> Material:
    """Raises ConfigError when no sample can be used, and for labels that are missing or not integers."""
    cache = storage.absolute(storage.join(config.out, "cache", "index", name))
    task = IndexTask(config.image_member, label_member, caption_member, cache)
    unusable: Counter[str] = Counter()
    failed, found = [], {}
    with ProgressDisplay(f"index {name}", len(shards), sum(shard.size for shard in shards)) as display:
        for outcome in runtime.map_shards(task, shards, resources, display, config.address):
            if outcome.result is None:
                failed.append(outcome.error)
                continue
            unusable.update(outcome.result["unusable"])
            if outcome.result["damage"]:
                failed.append(f"{outcome.shard.url}: {outcome.result['damage']}")
            if outcome.result["samples"]:
                path = storage.join(cache, f"{outcome.shard.stem}.safetensors")
                found[outcome.shard] = SampleIndex.from_bytes(storage.read_bytes(path))
    for message in sorted(failed):
        log.warning("%s: %s", name, message)
    usable = [shard for shard in shards if shard in found]
    data = DataSet(tuple(usable), tuple(found[shard] for shard in usable))
    if not len(data):
        raise ConfigError(_nothing_usable(name, shards, caption_member, unusable, failed))
    return Material(name, data, unusable, tuple(sorted(failed)))


def _nothing_usable(
    name: str, shards: list[Shard], caption_member: str, unusable: Counter[str], failed: list[str]
) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(unusable.items()))
    why = f" ({left_out})" if left_out else ""
    if failed:
        advice = failed[0]
    elif unusable["no_caption"]:
        advice = f"No caption was found as {caption_member}: name its member with --caption-member."
    else:
        advice = "Did cleaning remove everything? Give shards with images."
    return f"{name}: no usable sample in {len(shards)} shard(s), {shards[0].url} the first{why}. {advice}"


def embedded(
    config: FinetuneConfig, spec: EncoderSpec, fingerprint: str, material: Material, resources: Resources
) -> tuple[Features, int]:
    """(embeddings and labels of all readable samples in order, number of unreadable ones). Cached for this encoder only."""
    data = material.data
    cache = storage.absolute(storage.join(config.out, "cache", fingerprint[:16], material.name))
    task = EmbedTask(spec, 0, config.precision, config.batch_size, 0, config.image_member, cache)
    with ProgressDisplay(f"embed {material.name}", len(data.shards), sum(s.size for s in data.shards)) as display:
        for outcome in runtime.map_shards(task, data.shards, resources, display, config.address):
            if outcome.error:
                log.warning("%s: shard left out: %s", material.name, outcome.error)
    embeddings, labels = [], []
    for shard, index in zip(data.shards, data.indexes, strict=True):
        path = storage.join(cache, f"{shard.stem}.safetensors")
        if storage.exists(path):
            columns = load_embeddings(path)
            embeddings.append(columns["embeddings"])
            labels.append(index.label[np.searchsorted(index.position, columns["index"].numpy())])
    if not embeddings:
        raise ConfigError(f"{material.name}: none of its {len(data)} pictures can be decoded. Give readable images.")
    features = Features(torch.cat(embeddings), torch.from_numpy(np.concatenate(labels)))
    return features, len(data) - len(features.labels)
