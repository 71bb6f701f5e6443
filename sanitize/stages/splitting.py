"""Copy one shard into the tar of what is kept and the tar of everything else, byte for byte.

Members are copied with their headers, so both together hold every byte of the readable input.
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sanitize.errors import ShardError
from sanitize.hashing import HashingWriter
from sanitize.records import Shard
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import end_archive, open_shard, printable, read_block, tar_size


@dataclass(frozen=True)
class ScoredShard:
    """A shard as pass 1 read it, which it must still be. keys, image_sha256: of each sample in tar order, "" = no image was read;
    sha256: of the whole tar; damage, loose_members: see ShardReader."""

    shard: Shard
    keys: Sequence[str]
    image_sha256: Sequence[str]
    sha256: str
    damage: str
    loose_members: int
    image_member: str


@dataclass(frozen=True)
class CopyPlan:
    """ranges: (start, end, keep) in tar order, covering the readable part of the shard without gaps; neighbours merged.
    images: (start, end, SHA-256) of every image that was scored."""

    ranges: list[tuple[int, int, bool]]
    images: list[tuple[int, int, str]]


def _plan(scored: ScoredShard, file: IO[bytes], keep: NDArray[np.bool_]) -> CopyPlan:
    """Raises ShardError when the shard does not read as it did in pass 1: the same samples, damage and loose members."""
    plan, shard = CopyPlan([], []), scored.shard

    def add(start: int, end: int, kept: bool) -> None:
        if plan.ranges and plan.ranges[-1][2] is kept and plan.ranges[-1][1] == start:
            start = plan.ranges.pop()[0]
        plan.ranges.append((start, end, kept))

    keys = []
    reader = ShardReader(file, shard, with_images=False, image_member=scored.image_member)
    position = 0
    for sample in reader.samples():
        keys.append(printable(sample.key))
        if keys[-1:] != scored.keys[sample.index : sample.index + 1]:
            raise ShardError(_changed(shard))
        for member in sample.members:
            if member.start > position:
                add(position, member.start, False)  # loose members
            add(member.start, member.end, bool(keep[sample.index]))
            position = member.end
        image, expected = reader.image_of(sample), scored.image_sha256[sample.index]
        if image and image.size and expected:
            plan.images.append((image.data, image.data + image.size, expected))
    if reader.readable_end > position:
        add(position, reader.readable_end, False)
    if keys != scored.keys or (reader.damage, reader.loose) != (scored.damage, scored.loose_members):
        raise ShardError(_changed(shard))
    return plan


def split_shard(
    scored: ScoredShard,
    keep: NDArray[np.bool_],
    open_part: Callable[[bool], contextlib.AbstractContextManager[HashingWriter]],
) -> dict[bool, HashingWriter]:
    """Copy every range to its tar in one pass, at most 1 MiB in memory. keep: (N,) bool; open_part: of what is kept, of the rest.

    Returns the parts that were written; an empty one is not. The whole input and every scored image are hashed on the way: what is
    kept is what was scored, byte for byte. Raises ShardError when the shard is no longer what was scored.
    """
    shard, digest = scored.shard, hashlib.sha256()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_shard(shard))
        plan = _plan(scored, file, keep)
        images = _ImageHashes(shard, plan.images)
        file.seek(0)
        parts = {part: stack.enter_context(open_part(part)) for part in sorted({kept for _, _, kept in plan.ranges})}
        position = 0
        for start, end, kept in plan.ranges:
            for data in _blocks(file, shard, start - position):
                digest.update(data)
            for data in _blocks(file, shard, end - start):
                digest.update(data)
                images.update(data)
                parts[kept].write(data)
            position = end
        for data in _blocks(file, shard, tar_size(shard, file) - position + 1):
            digest.update(data)
        if digest.hexdigest() != scored.sha256:
            raise ShardError(_changed(shard))
        images.finish()
        for written in parts.values():
            end_archive(written)
    return parts


class _ImageHashes:
    """Compares each scored image with its bytes on their way past; the ranges cover the shard from its first byte."""

    def __init__(self, shard: Shard, images: Sequence[tuple[int, int, str]]) -> None:
        self._shard, self._images = shard, deque(images)
        self._position, self._digest = 0, hashlib.sha256()

    def update(self, data: bytes) -> None:
        begin, end = self._position, self._position + len(data)
        while self._images and self._images[0][0] < end:
            start, stop, expected = self._images[0]
            self._digest.update(data[max(start - begin, 0) : stop - begin])
            if stop > end:
                break
            self._images.popleft()
            found, self._digest = self._digest.hexdigest(), hashlib.sha256()
            if found != expected:
                raise ShardError(_changed(self._shard))
        self._position = end

    def finish(self) -> None:
        if self._images:
            raise ShardError(_changed(self._shard))


def _blocks(file: IO[bytes], shard: Shard, count: int) -> Iterator[bytes]:
    """The next `count` bytes, or what is left of them."""
    while count > 0 and (data := read_block(file, min(1 << 20, count), shard.url)):
        count -= len(data)
        yield data


def _changed(shard: Shard) -> str:
    return f"{shard.url}: changed after it was scored. Scan it again into another --out."
