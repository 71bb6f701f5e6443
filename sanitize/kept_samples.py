"""Train on the kept samples of a scan straight from the original shards: filtered by the decisions, nothing copied.

`KeptSamples` reads the shards itself and is a dataset for a torch DataLoader or the source of a webdataset pipeline.
`keep_only` is the filter for a webdataset pipeline that exists already. Both refuse a shard that is not the one that was
scanned, and an image whose bytes are not the ones that were scored.
"""

import hashlib
import io
import logging
import os
import random
import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import IO, Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from sanitize import storage
from sanitize.artifacts.scan_folder import ScanFolder, Summary
from sanitize.errors import ConfigError, RefusedError, ShardError, check
from sanitize.paths import AnyPath, path_text
from sanitize.records import Shard
from sanitize.stages import score_table
from sanitize.stages.decision_table import Decisions, foreign
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import head_tail_sha256, is_image, open_stored, printable, unpacked
from sanitize.stages.unpacking import ending_of

log = logging.getLogger(__name__)
CACHED = 4  # shards whose decisions `keep_only` holds, for pipelines that mix a few shards


class ScannedShards:
    """The original shards of a scan with what was decided of them. Picklable: holds names and numbers, no open file."""

    def __init__(self, path: str, moved_to: str = "") -> None:
        self.path = storage.absolute(path)
        self._folder = ScanFolder(self.path)
        run, summary = self._folder.run(), self._summary()
        self.image_member = run.image_member
        self.kept, self.removed = summary.kept, summary.removed
        self._committed = summary.markers_sha256
        self._ends = {stem: entry.head_tail_sha256 for stem, entry in run.shards.items()}
        markers = self._folder.markers(sorted(run.shards))
        self._markers = {marker.shard: marker for marker in markers if marker.clean and marker.samples}
        self.shards: dict[str, Shard] = {stem: _moved(run.shard(stem), moved_to) for stem in self._markers}
        if left_out := sorted(set(run.shards) - {marker.shard for marker in markers if marker.clean}):
            log.warning(
                "%s: %d of %d shards have no decisions and are left out (first: %s). Run the same `sanitize scan` again.",
                self.path,
                len(left_out),
                len(run.shards),
                left_out[0],
            )

    def _summary(self) -> Summary:
        summary = self._folder.summary()
        if summary is None:
            raise ConfigError(
                f"{self.path}: no decisions there (summary.json is missing). Run `sanitize clean` first, or give its folder."
            )
        return summary

    def decisions(self, stem: str) -> tuple[Decisions, list[str]]:
        """Of one shard, and the SHA-256 of each scored image or "".

        Raises RefusedError when decisions and score table do not name the same samples, each once and in order.
        """
        if self._summary().markers_sha256 != self._committed:
            raise RefusedError(f"{self.path}: was decided again since this dataset was made. Make it again.")
        decided = self._folder.decisions(self._markers[stem])
        scored = score_table.read(self._folder.scores(stem), ["key", "sha256"])
        if scored.column("key").to_pylist() != decided.keys:
            path = self._folder.at(self._folder.decisions_name(stem))
            raise RefusedError(foreign(path, "its keys are not those of the score table"))
        return decided, scored.column("sha256").to_pylist()

    def open(self, stem: str) -> IO[bytes]:
        """The tar of the original shard, if it is the one that was scanned."""
        return unpacked(self.shards[stem], self._open_stored(stem))

    def require_unchanged(self, stem: str) -> None:
        """Raises ShardError for a shard that is not the one that was scanned; nothing is unpacked."""
        self._open_stored(stem).close()

    def _open_stored(self, stem: str) -> IO[bytes]:
        """Of the same size, with the same first and last 64 KiB."""
        shard = self.shards[stem]
        try:
            file = open_stored(shard)
        except ShardError as error:
            raise ShardError(
                f"{error} {self.path} was scanned from it. Restore it, or name the folder of the shards with moved_to."
            ) from None
        if file.seek(0, io.SEEK_END) != shard.size or head_tail_sha256(shard) != self._ends[stem]:
            file.close()
            raise ShardError(_changed(shard))
        file.seek(0)
        return file

    def require_scored_image(self, shard: Shard, key: str, contents: Mapping[str, Any], sha256: str) -> None:
        """Every image member must have the bytes that were scored: the middle of a shard can change, ends alike."""
        for extension, data in contents.items():
            if sha256 and is_image(extension, self.image_member) and hashlib.sha256(data).hexdigest() != sha256:
                raise ShardError(
                    f"{_changed(shard)} (Sample {printable(key)!r}: .{extension} is not the scored image.)"
                )


def _moved(shard: Shard, moved_to: str) -> Shard:
    name = f"{shard.stem}{ending_of(shard.url)}"
    return replace(shard, url=storage.join(storage.absolute(moved_to), name)) if moved_to else shard


def _changed(shard: Shard) -> str:
    return f"{shard.url}: is not the shard that was scanned. Scan it again into another --out."


# ---------------------------------------------------------------- streaming


class KeptSamples(IterableDataset[dict[str, Any]]):
    """The kept samples of a scan, as webdataset gives them: `__key__`, `__url__`, and extension → bytes as in the tar.

    Shards are dealt out to all DataLoader workers of all ranks, so that each sample comes once; a pipeline behind it needs
    no split_by_worker or split_by_node. Memory: one sample, the decisions of one shard, and the shuffle buffer.
    """

    def __init__(
        self,
        scanned: AnyPath,
        *,
        shuffle: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        moved_to: AnyPath = "",
    ) -> None:
        """`scanned`: the folder of a scan with decisions.

        shuffle: samples held, of which a random one comes next; shards then come in random order too. 0 = order of the scan.
        rank, world: of how many processes this is which; default: torch.distributed, else RANK and WORLD_SIZE, else alone.
        moved_to: the folder (or URL) the scanned shards lie in now, if it is another one.
        """
        check(shuffle >= 0, f"shuffle: {shuffle} samples; give 0 (off) or more.")
        check((rank is None) == (world is None), "rank and world: give both or none.")
        check(rank is None or 0 <= rank < (world or 0), f"rank {rank} of world {world}: must be 0 <= rank < world.")
        self.scanned = ScannedShards(path_text(scanned, "scanned"), path_text(moved_to, "moved_to"))
        self._shuffle, self._seed = shuffle, seed
        self._rank_and_world = None if rank is None or world is None else (rank, world)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: persistent workers see `set_epoch`

    @property
    def kept(self) -> int:
        """Samples in one pass over all ranks and workers."""
        return self.scanned.kept

    @property
    def removed(self) -> int:
        return self.scanned.removed

    def set_epoch(self, epoch: int) -> None:
        """Another random order; the same number on all ranks, as for a DistributedSampler."""
        self._epoch.fill_(epoch)

    def check(self) -> None:
        """Look at every shard now rather than when its turn comes. Raises ShardError for the first that is missing or changed."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.scanned.require_unchanged, self.scanned.shards))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, readers = self._place()
        stems = list(self.scanned.shards)
        if reader == 0 and readers > len(stems):
            log.warning("%d shards for %d readers: the rest get no sample. Use fewer workers.", len(stems), readers)
        if not self._shuffle:
            return self._samples(stems[reader::readers])
        epoch = int(self._epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(stems))  # one order for all readers
        mine = [stems[number] for number in order[reader::readers]]
        shuffled = wds.shuffle(
            self._shuffle, initial=self._shuffle, rng=random.Random(f"{self._seed} {epoch} {reader}")
        )
        samples: Iterator[dict[str, Any]] = shuffled(self._samples(mine))
        return samples

    def _place(self) -> tuple[int, int]:
        """(which reader this is, of how many): every worker of every rank is one."""
        rank, world = self._rank_and_world or _distributed() or _environment()
        worker = get_worker_info()
        return (rank * worker.num_workers + worker.id, world * worker.num_workers) if worker else (rank, world)

    def __getstate__(self) -> dict[str, Any]:
        """A spawned worker has no torch.distributed of its own, so it is told the rank of the process that starts it."""
        return self.__dict__ | {"_rank_and_world": self._rank_and_world or _distributed()}

    def _samples(self, stems: list[str]) -> Iterator[dict[str, Any]]:
        for stem in stems:
            yield from _kept_samples(self.scanned, stem)


def _distributed() -> tuple[int, int] | None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.get_rank(), distributed.get_world_size()


def _environment() -> tuple[int, int]:
    """As torchrun sets it."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _kept_samples(scanned: ScannedShards, stem: str) -> Iterator[dict[str, Any]]:
    shard, (decided, hashes) = scanned.shards[stem], scanned.decisions(stem)
    count = 0
    with scanned.open(stem) as file:
        reader = ShardReader(file, shard, with_images=False)
        for sample in reader.samples():
            if sample.index >= len(decided.keys) or printable(sample.key) != decided.keys[sample.index]:
                raise ShardError(_changed(shard))
            count += 1
            if not decided.keep[sample.index]:
                continue
            contents = {member.extension: reader.content(member) for member in sample.members}
            if reserved := [name for name in contents if name.startswith("__") and name.endswith("__")]:
                raise ShardError(
                    f"{shard.url}: sample {printable(sample.key)!r} has a member .{printable(reserved[0])}, a name that webdataset "
                    "keeps for itself. Rename the member and scan the shard again."
                )
            scanned.require_scored_image(shard, sample.key, contents, hashes[sample.index])
            yield {"__key__": sample.key, "__url__": shard.url, **contents}
    if count != len(decided.keys):
        raise ShardError(_changed(shard))


# ---------------------------------------------------------------- filtering


class KeepOnly:
    """Whether a sample of a webdataset pipeline is kept; see `keep_only`."""

    def __init__(self, scanned: ScannedShards) -> None:
        self._scanned = scanned
        self._stems = {storage.absolute(shard.url): stem for stem, shard in scanned.shards.items()}
        self._held: dict[
            str, dict[str, tuple[bool, str]]
        ] = {}  # url → key → (keep, SHA-256), of the last CACHED shards

    def __call__(self, sample: Mapping[str, Any]) -> bool:
        url, key = sample["__url__"], sample["__key__"]
        if url not in self._held:
            self._hold(url)
        if printable(key) not in self._held[url]:
            log.warning("%s: sample %r was never scored (a dot file, a folder); left out.", url, printable(key))
            return False
        keep, sha256 = self._held[url][printable(key)]
        if keep:
            contents = {name: data for name, data in sample.items() if not name.startswith("__")}
            check(
                all(isinstance(data, bytes) for data in contents.values()),
                "keep_only: the sample is decoded already, so its bytes cannot be compared. Put it before decode.",
            )
            self._scanned.require_scored_image(self._scanned.shards[self._stem(url)], key, contents, sha256)
        return keep

    def _stem(self, url: str) -> str:
        """webdataset names local files with and without file: and remote ones by the command that reads them."""
        words = shlex.split(url.removeprefix("pipe:")) if url.startswith("pipe:") else [url]
        for word in words:
            path = word if "://" in word else word.removeprefix("file:")
            if stem := self._stems.get(storage.absolute(path)):
                return stem
        raise ConfigError(
            f"{url}: is not a shard of the scan {self._scanned.path}. Give the shards that were scanned, or name their folder "
            "with moved_to."
        )

    def _hold(self, url: str) -> None:
        stem = self._stem(url)
        self._scanned.require_unchanged(stem)
        decided, hashes = self._scanned.decisions(stem)
        rows: dict[str, tuple[bool, str]] = {}
        for key, keep, sha256 in zip(decided.keys, decided.keep.tolist(), hashes, strict=True):
            # keys that differ only in bytes that are not UTF-8 look alike here: an attacker picks the keys, so keep neither
            rows[key] = (False, "") if key in rows else (keep, sha256)
        while len(self._held) >= CACHED:
            self._held.pop(next(iter(self._held)))
        self._held[url] = rows


def keep_only(scanned: AnyPath, *, moved_to: AnyPath = "") -> Callable[[Mapping[str, Any]], bool]:
    """For `wds.select(keep_only("scanned"))` in a webdataset pipeline over the scanned shards, before decoding and shuffling.

    moved_to: the folder (or URL) the scanned shards lie in now, if it is another one.
    """
    return KeepOnly(ScannedShards(path_text(scanned, "scanned"), path_text(moved_to, "moved_to")))
