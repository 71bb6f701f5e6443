"""The order in which training reads samples: equal lanes through the shards, the same for any number of workers.

The rule. In every epoch the shards are permuted by (seed, epoch) and the samples, one shard after the other, are cut into L
equal lanes, wherever the cuts fall: a lane is one sequential stream of reads. A shuffle buffer of its own mixes each lane. An
epoch has M pieces (batches, or parts of a batch when gradients accumulate): the lanes are dealt out in turn and piece m takes
the m-th of M equal parts. Rank r reads the lanes l with l % workers == r. Hence every sample is in exactly one piece of an
epoch, every rank has exactly M pieces whatever the sizes of the shards, every byte is read by one rank, and what is in a piece
does not depend on the number of workers.
"""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sanitize.records import Sample
from sanitize.stages.captions import MAX_CAPTION_BYTES, caption_text, split_member
from sanitize.stages.shards import MAX_IMAGE_BYTES, open_shard, read_block
from sanitize.training.sample_index import DataSet

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Settings of the data order. buffer: samples that wait in the shuffle buffers of all lanes; 0 = tar order, no permutation."""

    lanes: int
    pieces: int  # of an epoch
    buffer: int
    seed: int


def lane_numbers(order: Order, counts: Numbers, epoch: int) -> list[Numbers]:
    """Sample numbers of each lane in reading order. counts: samples of each shard; a number counts through all shards."""
    starts = np.cumsum(counts) - counts
    shards = np.arange(len(counts))
    if order.buffer:
        shards = np.random.default_rng([order.seed, epoch]).permutation(len(counts))
    reading = np.concatenate([np.arange(starts[s], starts[s] + counts[s]) for s in shards])
    return np.array_split(reading, order.lanes)


def shuffled(count: int, buffer: int, rng: np.random.Generator) -> Numbers:
    """The order in which `count` samples that come in sequence leave a shuffle buffer: (count,) int64.

    Position i of the result is read before sample result[i - 1] + buffer: memory never holds more than `buffer` samples.
    """
    buffer = min(buffer, count)
    if buffer < 2:
        return np.arange(count)
    waiting, left = list(range(buffer)), np.empty(count, np.int64)
    places = rng.integers(0, buffer, count - buffer).tolist()
    for number, place in enumerate(places):
        left[number], waiting[place] = waiting[place], number + buffer
    left[count - buffer :] = rng.permutation(np.array(waiting))
    return left


def leaving_order(order: Order, size: int, epoch: int, lane: int) -> Numbers:
    """(size,) positions of one lane in the order in which they leave its shuffle buffer."""
    return shuffled(size, order.buffer // order.lanes, np.random.default_rng([order.seed, epoch, lane]))


def piece_bounds(order: Order, samples: int, lane: int) -> Numbers:
    """(pieces + 1,) where the pieces of one lane begin. `samples`: of the whole epoch.

    The lanes are dealt out in turn, like hands of cards: turn p is sample p // lanes of lane p % lanes. Piece m is turns
    N m / M to N (m + 1) / M, so that all pieces have the same number of samples, or one more.
    """
    turns = np.arange(order.pieces + 1) * samples // order.pieces
    return (turns - lane + order.lanes - 1) // order.lanes


def lanes_of(rank: int, world: int, lanes: int) -> range:
    return range(rank, lanes, world)


# ---------------------------------------------------------------- reading


def lane_pieces(
    data: DataSet, order: Order, epoch: int, first: int, mine: Sequence[int], caption_member: str = ""
) -> tuple[list[int], Generator[Sample, None, None]]:
    """(sizes of this rank's pieces from `first` on, their samples one after the other). `index` of a sample is its number."""
    numbers = lane_numbers(order, data.counts, epoch)
    bounds = {lane: piece_bounds(order, len(data), lane) for lane in mine}
    sizes = [sum(int(b[m + 1] - b[m]) for b in bounds.values()) for m in range(first, order.pieces)]
    field = split_member(caption_member)[1]
    streams = {
        lane: _stream(data, numbers[lane], leaving_order(order, len(numbers[lane]), epoch, lane), int(b[first]), field)
        for lane, b in bounds.items()
    }

    def samples() -> Generator[Sample, None, None]:
        try:
            for piece in range(first, order.pieces):
                for lane, b in bounds.items():
                    for _ in range(b[piece + 1] - b[piece]):
                        yield next(streams[lane])
        finally:
            for stream in streams.values():
                stream.close()

    return sizes, samples()


def _stream(
    data: DataSet, numbers: Numbers, leaving: Numbers, skip: int, caption_field: str
) -> Generator[Sample, None, None]:
    """Samples of one lane as they leave its buffer; the first `skip` left in an earlier run and are not read again."""
    left_at = np.empty_like(leaving)
    left_at[leaving] = np.arange(len(leaving))
    wanted = np.flatnonzero(left_at >= skip)
    reads = _reads(data, numbers[wanted], caption_field)
    waiting: dict[int, Sample] = {}
    positions = iter(wanted.tolist())
    with contextlib.closing(reads):
        for position in leaving[skip:].tolist():
            while position not in waiting:
                waiting[next(positions)] = next(reads)
            yield waiting.pop(position)


def _reads(data: DataSet, numbers: Numbers, caption_field: str) -> Generator[Sample, None, None]:
    """Samples with their image bytes (and caption) in the given order; one shard is open at a time."""
    shards, rows = data.shard_of(numbers)
    file: IO[bytes] | None = None
    opened = -1
    try:
        for number, shard, row in zip(numbers.tolist(), shards.tolist(), rows.tolist(), strict=True):
            if shard != opened or file is None:
                if file is not None:
                    file.close()
                file, opened = open_shard(data.shards[shard]), shard
            yield _sample(file, data, number, shard, row, caption_field)
    finally:
        if file is not None:
            file.close()


def _sample(file: IO[bytes], data: DataSet, number: int, shard: int, row: int, caption_field: str) -> Sample:
    index, url = data.indexes[shard], data.shards[shard].url

    def content(span: Numbers, limit: int) -> bytes:
        file.seek(int(span[0]))
        return read_block(file, min(int(span[1]), limit), url)

    spans = {"image": index.image[row], "caption": index.caption[row]}
    limits = {"image": MAX_IMAGE_BYTES, "caption": MAX_CAPTION_BYTES}
    in_file_order = sorted(spans, key=lambda name: int(spans[name][0]))
    found = {name: content(spans[name], limits[name]) for name in in_file_order}
    caption, reason = (
        caption_text(found["caption"], caption_field) if found["caption"] else ("", "the caption is empty")
    )
    return Sample(number, "", (), found["image"], caption=caption, caption_reason=reason)
