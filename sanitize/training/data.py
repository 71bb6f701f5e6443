"""What `finetune` trains and measures on: shards → index of their samples → cached embeddings. Cached, so a rerun goes on."""

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from sanitize import storage, workers
from sanitize.config import EncoderSpec, FinetuneConfig
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import ConfigError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.training.embedding_cache import EmbedTask, LabelledEmbeddings, load_embeddings
from sanitize.training.sample_index import DataSet, SampleIndex, index_shard
from sanitize.workers import Outcome, ProgressCallback, ShardFunction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One set of shards: `shards`, `validation` or `triggered`. "" = labels or captions are not needed of it."""

    name: str
    shards: tuple[Shard, ...]
    label_member: str
    caption_member: str


@dataclass(frozen=True)
class ShardSummary:
    """Beside the index of one shard. unusable: samples left out, by reason; damage: of its tail, in words."""

    unusable: dict[str, int]
    damage: str
    samples: int


@dataclass(frozen=True)
class IndexTask:
    """Index one shard, once."""

    image_member: str
    members: dict[str, tuple[str, str]]  # label and caption member by source
    cache: str

    def start(self, threads: int) -> ShardFunction[ShardSummary]:  # noqa: ARG002 - reading headers needs no threads
        return self._index

    def _index(self, shard: Shard, progress: ProgressCallback) -> ShardSummary:
        path = storage.join(self.cache, shard.stem)
        if not storage.exists(f"{path}.json"):
            members = self.members[shard.stem.split("/", 1)[0]]
            index, unusable, damage = index_shard(shard, self.image_member, *members)
            storage.write_bytes(f"{path}.safetensors", index.to_bytes())
            storage.write_json(f"{path}.json", to_mapping(ShardSummary(dict(unusable), damage, len(index))))
        summary = from_mapping(ShardSummary, storage.read_json(f"{path}.json"), f"{path}.json")
        progress(summary.samples, 0, shard.size)
        return summary


@dataclass(frozen=True)
class IndexedSource:
    """One source after indexing; the stem of each shard begins with the source's name.

    unusable: samples left out, by reason. failed: one message for each shard that is left out or damaged.
    """

    name: str
    data: DataSet
    unusable: Counter[str]
    failed: tuple[str, ...]


def index_sources(
    config: FinetuneConfig, sources: list[Source], cache: str, resources: Resources
) -> dict[str, IndexedSource]:
    """By the source's name, cached in `cache`, which belongs to this run alone. One pool of workers (they take
    seconds to start) does all sources.

    Raises ConfigError when a source has no usable sample, and for labels that are missing or not integers.
    """
    cache = storage.join(cache, "index")
    task = IndexTask(config.image_member, {s.name: (s.label_member, s.caption_member) for s in sources}, cache)
    shards = [dataclasses.replace(shard, stem=f"{s.name}/{shard.stem}") for s in sources for shard in s.shards]
    with ProgressDisplay("index", len(shards), sum(shard.size for shard in shards)) as display:
        outcomes = list(workers.map_shards(task, shards, resources, display, config.address))
    outcomes.sort(key=lambda outcome: outcome.shard.stem)
    return {source.name: _indexed_source(source, outcomes, cache) for source in sources}


def _indexed_source(source: Source, outcomes: list[Outcome[ShardSummary]], cache: str) -> IndexedSource:
    unusable: Counter[str] = Counter()
    failed, found = [], {}
    for outcome in outcomes:
        if not outcome.shard.stem.startswith(f"{source.name}/"):
            continue
        if outcome.result is None:
            failed.append(outcome.error)
            continue
        unusable.update(outcome.result.unusable)
        if outcome.result.damage:
            failed.append(f"{outcome.shard.url}: {outcome.result.damage}")
        if outcome.result.samples:
            path = storage.join(cache, f"{outcome.shard.stem}.safetensors")
            found[outcome.shard] = SampleIndex.from_bytes(storage.read_bytes(path))
    for message in failed:
        log.warning("%s: %s", source.name, message)
    if not found:
        raise ConfigError(_nothing_usable(source, unusable, failed))
    return IndexedSource(source.name, DataSet(tuple(found), tuple(found.values())), unusable, tuple(failed))


def _nothing_usable(source: Source, unusable: Counter[str], failed: list[str]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(unusable.items()))
    why = f" ({left_out})" if left_out else ""
    if failed:
        advice = failed[0]
    elif unusable["no_caption"]:
        advice = f"No caption was found as {source.caption_member}: name its member with --caption-member."
    else:
        advice = "Did cleaning remove everything? Give shards with images."
    first = source.shards[0].url
    return f"{source.name}: no usable sample in {len(source.shards)} shard(s), {first} the first{why}. {advice}"


def embed_sources(
    config: FinetuneConfig,
    spec: EncoderSpec,
    fingerprint: str,
    sources: list[IndexedSource],
    cache: str,
    resources: Resources,
) -> dict[str, LabelledEmbeddings]:
    """Embeddings and labels of all readable samples in order, by source. Cached, for this very encoder only."""
    cache = storage.join(cache, fingerprint[:16])
    task = EmbedTask(
        encoder=spec,
        image_size=0,
        precision=config.precision,
        batch_size=config.batch_size,
        limit=0,
        image_member=config.image_member,
        cache=cache,
    )
    shards = [shard for source in sources for shard in source.data.shards]
    with ProgressDisplay("embed", len(shards), sum(shard.size for shard in shards)) as display:
        for outcome in workers.map_shards(task, shards, resources, display, config.address):
            if outcome.error:
                log.warning("shard left out: %s", outcome.error)
    return {source.name: _features(source, cache) for source in sources}


def _features(source: IndexedSource, cache: str) -> LabelledEmbeddings:
    embeddings, labels = [], []
    for shard, index in zip(source.data.shards, source.data.indexes, strict=True):
        path = storage.join(cache, f"{shard.stem}.safetensors")
        if storage.exists(path):
            columns = load_embeddings(path)
            embeddings.append(columns["embeddings"])
            labels.append(index.label[np.searchsorted(index.position, columns["index"].numpy())])
    if not embeddings:
        raise ConfigError(f"{source.name}: none of its {len(source.data)} images can be decoded. Give readable images.")
    return LabelledEmbeddings(torch.cat(embeddings), torch.from_numpy(np.concatenate(labels)))
