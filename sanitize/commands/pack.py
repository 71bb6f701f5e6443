"""`sanitize pack`: image files, Hugging Face data sets or a manifest → WebDataset shards, images byte for byte.

The source is listed once; sample n of it has the key n, whatever fails. Each output shard is a range of the source that one worker
reads and commits: the tar, where its samples come from, then `done/<stem>.json`. A rerun does what has no marker, and tries again
where images could not be read.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sanitize import runtime, storage, workers
from sanitize.artifacts import originals
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.packed_folder import PackedFolder, PackMarker
from sanitize.artifacts.scan_folder import WrittenFile
from sanitize.config import check_out
from sanitize.errors import ConfigError, check
from sanitize.hashing import HashingWriter
from sanitize.paths import AnyPath, path_text
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.sources import fixed_part, open_source
from sanitize.sources.samples import ReadSamples, Source, SourceSample, Wanted
from sanitize.stages.shards import add_member, end_archive
from sanitize.workers import ProgressCallback, ShardFunction

log = logging.getLogger(__name__)
MAX_SHARD_SIZE = 1_000_000
TOLD = 20  # problems that are named one by one
MAX_PROBLEM = 500  # characters


@dataclass(frozen=True)
class PackResult:
    """Counts of samples. unreadable: that have no image, so are in no shard; problems: the first of them, in words.

    failed: one message for each shard that could not be written.
    """

    out: str
    samples: int
    shards: int
    classes: int
    unreadable: int
    problems: tuple[str, ...]
    failed: tuple[str, ...]


def pack(
    source: AnyPath,
    out: AnyPath,
    *,
    images: str = "",
    labels: str = "",
    captions: str = "",
    shard_size: int = 1000,
    resources: Resources | None = None,
    address: str = "",
) -> PackResult:
    """Write the samples of `source` to shards of `shard_size` in `out` (in this process by default).

    images: column of a table; labels: a column, "folders" or "none"; captions: a column or "none"; "" = what fits.
    """
    source, out = path_text(source, "source"), path_text(out, "out")
    check_out(out)
    check(1 <= shard_size <= MAX_SHARD_SIZE, f"shard_size: {shard_size} is not between 1 and {MAX_SHARD_SIZE} samples.")
    _refuse_inside(source, out)
    found = open_source(source, Wanted(images, labels, captions))
    stems = [f"shard-{number:06d}" for number in range(-(-found.samples // shard_size))]
    folder = PackedFolder(out)
    with folder_lock(out, "pack"):
        folder.claim(_identity(source, found, shard_size))
        for note in found.notes:
            log.info("%s", note)
        markers, failed = _pack_missing(folder, found, stems, shard_size, resources, address)
        folder.write_classes(found.classes)
    return PackResult(
        out=out,
        samples=sum(marker.samples for marker in markers),
        shards=len(markers),
        classes=len(found.classes),
        unreadable=sum(marker.failed for marker in markers),
        problems=tuple(_problems(folder, markers)),
        failed=tuple(sorted(failed)),
    )


def _refuse_inside(source: str, out: str) -> None:
    place = source if storage.exists(source) else fixed_part(source)
    if f"{storage.real(out).rstrip('/')}/".startswith(f"{storage.real(place).rstrip('/')}/"):
        raise ConfigError(
            f"{out}: lies in {place}, so the next run would take what this one writes for input. Give an --out outside of it."
        )


def _identity(source: str, found: Source, shard_size: int) -> dict[str, Any]:
    return {
        "source": storage.absolute(source),
        "samples": found.samples,
        "shard_size": shard_size,
        "classes": storage.json_sha256(list(found.classes)),
        "content": found.identity,
    }


def _pack_missing(
    folder: PackedFolder,
    source: Source,
    stems: Sequence[str],
    shard_size: int,
    resources: Resources | None,
    address: str,
) -> tuple[list[PackMarker], list[str]]:
    """(all markers in order, messages of the shards that failed)."""
    markers = folder.committed(stems)
    todo = [
        Shard(folder.tar(stem), stem, min(shard_size, source.samples - number * shard_size))  # size: in samples
        for number, stem in enumerate(stems)
        if stem not in markers
    ]
    if len(todo) < len(stems):
        log.info("%d of %d shards were packed before", len(stems) - len(todo), len(stems))
    task = PackTask(storage.absolute(folder.path), source, shard_size)
    resources = resources or runtime.plan(0, 0, 0, len(todo))
    failed = []
    with ProgressDisplay("pack", len(todo), sum(shard.size for shard in todo)) as display:
        for outcome in workers.map_shards(task, todo, resources, display, address):
            if outcome.result:
                markers[outcome.shard.stem] = outcome.result
            else:
                failed.append(outcome.error)
    return [markers[stem] for stem in stems if stem in markers], failed


def _problems(folder: PackedFolder, markers: Sequence[PackMarker]) -> Iterator[str]:
    left = TOLD
    for marker in markers:
        if marker.failed and left:
            found = originals.read_problems(folder.originals(marker.shard), left)
            left -= len(found)
            yield from found


# ---------------------------------------------------------------- one shard


@dataclass(frozen=True)
class PackTask:
    """Read one range of the source and commit it as a shard."""

    out: str
    source: Source
    shard_size: int

    def start(self, threads: int) -> ShardFunction[PackMarker]:  # noqa: ARG002 - copying needs no threads
        folder, read = PackedFolder(self.out), self.source.reader()
        return lambda shard, progress: self._pack_shard(folder, read, shard, progress)

    def _pack_shard(
        self, folder: PackedFolder, read: ReadSamples, shard: Shard, progress: ProgressCallback
    ) -> PackMarker:
        first = int(shard.stem.rsplit("-", 1)[1]) * self.shard_size
        rows: list[dict[str, Any]] = []
        packed = 0
        with storage.atomic_write(folder.tar(shard.stem)) as target:
            for place, sample in enumerate(read(first, first + shard.size), first):
                rows.append(_original(shard.stem, f"{place:09d}", packed, sample))
                if sample.image is not None:
                    _add_sample(target, f"{place:09d}", sample, sample.image)
                    packed += 1
                progress(len(rows), 0, len(rows))
            end_archive(target)
        table = pa.Table.from_pylist(rows, originals.SCHEMA)
        written = originals.write_originals(folder.originals(shard.stem), table, target.sha256())
        files = {f"{shard.stem}.tar": WrittenFile.of(target), originals.name_of(shard.stem): WrittenFile.of(written)}
        marker = PackMarker(shard.stem, packed, len(rows) - packed, files)
        folder.write_marker(marker)
        return marker


def _original(stem: str, key: str, index: int, sample: SourceSample) -> dict[str, Any]:
    here = sample.image is not None
    return {
        "shard": stem,
        "key": key,
        "index": index if here else None,
        "source": sample.source,
        "row": sample.row,
        "problem": "" if here else sample.problem[:MAX_PROBLEM],
    }


def _add_sample(target: HashingWriter, key: str, sample: SourceSample, image: bytes) -> None:
    """Members of one sample stand together, sorted by name."""
    members = {sample.extension: image}
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    if sample.caption is not None:
        members["txt"] = sample.caption
    for extension in sorted(members):
        add_member(target, f"{key}.{extension}", members[extension])
