"""Where the image, caption and label of every sample lie: one cheap pass over tar headers, before any image is read.

Knowing the number of samples and their byte ranges is what lets `lanes` cut shards of any size into equal parts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from sanitize.errors import ConfigError
from sanitize.records import Member, Sample, Shard
from sanitize.stages.captions import split_member
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import open_shard, printable
from sanitize.training.labels import MAX_LABEL_BYTES, label_of, split_label_member

MAX_CLASSES = 100_000  # unless they are named: one odd label must not fill the memory


@dataclass(frozen=True)
class SampleIndex:
    """N usable samples in shard and tar order; a sample's number is its row.

    position: (N,) int64 index of the sample in its shard
    image:    (N, 2) int64 first byte and size of the image's file
    caption:  (N, 2) int64 the same of the caption's file; size 0 = none
    label:    (N,) int64, -1 = none
    """

    position: NDArray[np.int64]
    image: NDArray[np.int64]
    caption: NDArray[np.int64]
    label: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.position)

    def to_bytes(self) -> bytes:
        return safetensors.numpy.save({field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def from_bytes(data: bytes) -> "SampleIndex":
        return SampleIndex(**safetensors.numpy.load(data))


@dataclass(frozen=True)
class DataSet:
    """Shards with the index of each; shards without a usable sample are left out."""

    shards: tuple[Shard, ...]
    indexes: tuple[SampleIndex, ...]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(shards,) usable samples of each."""
        return np.array([len(index) for index in self.indexes], np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) of all shards, one after the other."""
        return np.concatenate([np.zeros(0, np.int64), *(index.label for index in self.indexes)])

    def shard_of(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample numbers of the whole set → (position in `shards`, row of that shard's index)."""
        ends = self.counts.cumsum()
        shard = np.searchsorted(ends, numbers, side="right")
        return shard, numbers - (ends - self.counts)[shard]


def index_shard(
    shard: Shard, image_member: str, label_member: str, caption_member: str
) -> tuple[SampleIndex, Counter[str], str]:
    """(index of the usable samples, how many are not usable and why, damage of the shard's tail).

    label_member and caption_member: "" = not needed; else every sample must have a label, and one without caption is not
    usable. Raises ConfigError for a label that is missing or not an integer, ShardError for a shard that cannot be read.
    """
    label_extension, label_field = split_label_member(label_member)
    caption_extension, _ = split_member(caption_member)
    rows: list[tuple[int, ...]] = []
    unusable: Counter[str] = Counter()
    with open_shard(shard) as file:
        reader = ShardReader(file, shard, with_images=False, image_member=image_member)
        for sample in reader.samples():
            image, caption = reader.image_of(sample), _member(sample, caption_extension)
            if image is None:
                unusable[sample.status] += 1
                continue
            if caption_extension and caption is None:
                unusable["no_caption"] += 1
                continue
            label = -1
            if label_extension:
                member = _member(sample, label_extension)
                data = reader.content(member, MAX_LABEL_BYTES + 1) if member else None
                label = _label(shard, sample, data, label_member, label_field)
            span = (caption.data, caption.size) if caption else (0, 0)
            rows.append((sample.index, image.data, image.size, *span, label))
    table = np.array(rows, np.int64).reshape(-1, 6).T.copy()
    index = SampleIndex(table[0], table[1:3].T.copy(), table[3:5].T.copy(), table[5])
    return index, unusable, reader.damage


def _member(sample: Sample, extension: str) -> Member | None:
    return next((member for member in sample.members if extension and member.extension == extension), None)


def _label(shard: Shard, sample: Sample, data: bytes | None, label_member: str, field: str) -> int:
    key = printable(sample.key)
    if data is None:
        found = " ".join(sorted(printable(member.extension) for member in sample.members))
        raise ConfigError(
            f"{shard.url}: sample {key!r} has no label: no .{label_member.partition(':')[0]} member (it has {found}). Name the "
            "member with --label-member, cls or json:<field>; without labels only --mode contrastive can train."
        )
    label, reason = label_of(data, field)
    if reason:
        raise ConfigError(
            f"{shard.url}: the label of sample {key!r} ({label_member}) is not an integer from 0: {reason}. Number the classes "
            "from 0, or name another member with --label-member."
        )
    return label


def class_count(names: Sequence[str], labels: NDArray[np.int64], setting: str) -> int:
    """Number of classes: that of the names, else the largest label + 1. Raises ConfigError when a label has no name."""
    largest = int(labels.max(initial=-1))
    if names and largest >= len(names):
        raise ConfigError(
            f"{setting}: a sample has the label {largest}, but there are {len(names)} classes (labels 0 to {len(names) - 1}). "
            "Correct `classes`, or the labels."
        )
    if not names and largest >= MAX_CLASSES:
        raise ConfigError(
            f"{setting}: a sample has the label {largest}, which would make as many classes; {MAX_CLASSES} are the limit. Number "
            "the classes from 0, or name them all in `classes`."
        )
    return len(names) or largest + 1
