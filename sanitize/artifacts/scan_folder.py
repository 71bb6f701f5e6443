"""The scan folder: what is on disk after a scan, typed. Everything that reads or writes one goes through here.

run.json                     Run: settings, detector, input shards; a folder belongs to one run
scores/<stem>.parquet        pass 1; columns in stages/score_table.py
done/<stem>.json             ShardMarker: counts and SHA-256 of a shard's files; written last
decisions/<stem>.parquet     pass 2; columns in stages/decision_table.py
clean/<stem>.tar  quarantine/<stem>.tar
reviews/0001.json ...        what people decided over the score; artifacts/reviews.py
markers.jsonl                every marker once more, for whoever would have to read very many; written when pass 2 is through
profile.json                 where the seconds of pass 1 went; artifacts/scan_profile.py
summary.json                 Summary, written last
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sanitize import storage
from sanitize.artifacts import run_record
from sanitize.config import ThresholdPolicy
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import ConfigError, RefusedError, StorageError
from sanitize.hashing import HashingWriter
from sanitize.records import Shard
from sanitize.stages.decision_table import Decisions, read_decisions
from sanitize.stages.splitting import ScoredShard

T = TypeVar("T")
CLEAN, QUARANTINE = "clean", "quarantine"
MARKERS = "markers.jsonl"


@dataclass(frozen=True)
class InputShard:
    """One input shard as it lay there when the scan began. head_tail_sha256: see stages/shards.py; "" = it could not be read."""

    url: str
    bytes: int
    head_tail_sha256: str


@dataclass(frozen=True)
class Run:
    """What makes this scan this scan. shards: by stem; detector: its folder; encoder: settings of EncoderSpec; computed_in: what
    `precision` meant where the scan began, for example "bf16 on cpu", a note: the scan may go on on another machine."""

    detector: str
    detector_fingerprint: str
    encoder: dict[str, Any]
    image_member: str
    caption_member: str
    effort: str
    precision: str
    shards: dict[str, InputShard]
    versions: dict[str, str]
    computed_in: str = ""

    def shard(self, stem: str) -> Shard:
        entry = self.shards[stem]
        return Shard(entry.url, stem, entry.bytes)


@dataclass(frozen=True)
class ShardInput:
    """What pass 1 read of a shard, unpacked. damage: "" or what is wrong with its tail; loose_members: that belong to no sample."""

    bytes: int
    sha256: str
    damage: str
    loose_members: int


@dataclass(frozen=True)
class WrittenFile:
    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: HashingWriter) -> "WrittenFile":
        return cls(file.size, file.sha256())


@dataclass(frozen=True)
class Split:
    """Pass 2 of one shard. rule: identity of the Rule that decided; decision: `decision_identity` of what was kept."""

    kept: int
    removed: int
    decision: str
    rule: str = ""


@dataclass(frozen=True)
class ShardMarker:
    """One shard is committed. files: by name below the scan folder; clean: None until pass 2 has split it."""

    shard: str
    input: ShardInput
    samples: int
    unscored: int
    files: dict[str, WrittenFile]
    clean: Split | None = None

    def unsplit(self) -> "ShardMarker":
        """As pass 1 left it."""
        return dataclasses.replace(self, clean=None, files=self._below("scores/"))

    def tars(self) -> dict[str, WrittenFile]:
        return self._below(f"{CLEAN}/", f"{QUARANTINE}/")

    def _below(self, *folders: str) -> dict[str, WrittenFile]:
        return {name: entry for name, entry in self.files.items() if name.startswith(folders)}


@dataclass(frozen=True)
class Summary:
    """Pass 2 of the whole scan. scores: which scores decided; rule: identity of the Rule; markers_sha256: of markers.jsonl;
    together: folders of the other scans that were decided with it, by one rule; decision_format: of decisions/.
    reviewed: samples that a person's word decided; reviews: file in reviews/ → SHA-256, of those that were taken into account;
    ignored_reviews: none was, on request."""

    policy: ThresholdPolicy
    scores: str
    threshold: float
    samples: int
    kept: int
    removed: int
    unscored: int
    shards: int
    shards_failed: tuple[str, ...] = ()
    shards_damaged: dict[str, str] = field(default_factory=dict)
    loose_members: int = 0
    rule: str = ""
    markers_sha256: str = ""
    together: tuple[str, ...] = ()
    decision_format: int = 1
    reviewed: int = 0
    reviews: dict[str, str] = field(default_factory=dict)
    ignored_reviews: bool = False

    def not_split(self) -> list[str]:
        """One message for each shard that has no clean tar."""
        return [f"{stem}: was not split by pass 2. Run the same `sanitize scan` again." for stem in self.shards_failed]


def decision_identity(keep: NDArray[np.bool_]) -> str:
    """Of the decisions (N,) of one shard: equal identities give equal clean and quarantine tars."""
    return hashlib.sha256(b"%d|" % len(keep) + np.packbits(keep).tobytes()).hexdigest()[:32]


class ScanFolder:
    """Paths and typed content of one scan. Picklable: holds a path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def at(self, *names: str) -> str:
        return storage.join(self.path, *names)

    # ---------------------------------------------------------------- run

    def claim(self, run: Run, append: bool = False) -> None:
        """Write run.json, or check that it describes this very run. Raises RefusedError: a folder never mixes two.

        A shard that could not be read on one of the two occasions is known by its name. append: shards that run.json does not name
        are added to it; those it names may be left out of `run`.
        """
        if append and storage.exists(self.at("run.json")):
            before, noted = self.run().shards, self.run().computed_in
            run = replace(run, shards=before | run.shards, computed_in=noted or run.computed_in)
            known = replace(run, shards={stem: run.shards[stem] for stem in before})
            run_record.claim_folder(
                self.path, "run.json", to_mapping(known), "a scan", inputs=("shards",), notes=("computed_in",)
            )
            if run.shards.keys() - before.keys():
                self.delete_summary()  # of a pass 2 without them
                storage.write_json(self.at("run.json"), to_mapping(run))
        else:
            run_record.claim_folder(
                self.path, "run.json", to_mapping(run), "a scan", inputs=("shards",), notes=("computed_in",)
            )

    def run(self) -> Run:
        """Raises ConfigError when there is no scan."""
        if not storage.exists(self.at("run.json")):
            raise ConfigError(
                f"{self.path}: no scan there (run.json is missing). Run `sanitize scan` first, or give the folder it wrote."
            )
        return self._read(Run, "run.json")

    # ---------------------------------------------------------------- shards

    def scores_name(self, stem: str) -> str:
        return f"scores/{stem}.parquet"

    def scores(self, stem: str) -> str:
        return self.at(self.scores_name(stem))

    def part_names(self, stem: str) -> dict[bool, str]:
        """Of the tars that pass 2 may write for a shard: of what is kept, of the rest."""
        return {True: f"{CLEAN}/{stem}.tar", False: f"{QUARANTINE}/{stem}.tar"}

    def tars(self, stem: str) -> list[str]:
        return [self.at(name) for name in self.part_names(stem).values()]

    def scored(self) -> set[str]:
        """Stems of the shards that have a marker; one listing."""
        return {name.removesuffix(".json") for name in storage.list_files(self.at("done"), ".json")}

    def marker(self, stem: str) -> ShardMarker | None:
        """None while the shard is not scored."""
        return self.read_marker(stem) if storage.exists(self.at("done", f"{stem}.json")) else None

    def read_marker(self, stem: str) -> ShardMarker:
        return self._read(ShardMarker, f"done/{stem}.json")

    def write_marker(self, marker: ShardMarker) -> None:
        values = to_mapping(marker)
        if marker.clean is None:
            del values["clean"]
        storage.write_json(self.at("done", f"{marker.shard}.json"), values)

    def markers(self, stems: Sequence[str], committed: Mapping[str, ShardMarker] | None = None) -> list[ShardMarker]:
        """Of those that are scored, in the order of `stems`: from `committed_markers` where they hold them."""
        scored, known = self.scored(), self.committed_markers() if committed is None else committed
        unknown = self.read_markers([stem for stem in stems if stem in scored and stem not in known])
        known = {**known, **{marker.shard: marker for marker in unknown}}
        return [known[stem] for stem in stems if stem in scored]

    def read_markers(self, stems: Sequence[str]) -> list[ShardMarker]:
        """Each from its own file, many at a time."""
        return list(storage.read_ahead(self.read_marker, stems))

    def committed_markers(self) -> dict[str, ShardMarker]:
        """By stem, as the last pass 2 wrote them; none when it is not through, or the file is not the one it wrote."""
        path, summary = self.at(MARKERS), self.summary()
        if summary is None or not storage.exists(path):
            return {}
        data = storage.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != summary.markers_sha256:
            return {}
        markers = (self._typed(ShardMarker, json.loads(line), path) for line in data.splitlines())
        return {marker.shard: marker for marker in markers}

    def write_summary(self, summary: Summary, markers: Sequence[ShardMarker]) -> None:
        """Pass 2 is through: what it left of every shard, then the summary. markers: sorted by shard."""
        with storage.atomic_write(self.at(MARKERS)) as file:
            for marker in markers:
                file.write((json.dumps(to_mapping(marker), sort_keys=True) + "\n").encode())
        values = to_mapping(replace(summary, markers_sha256=file.sha256()))
        if not np.isfinite(summary.threshold):
            values["threshold"] = str(summary.threshold)  # JSON has no infinity
        storage.write_json(self.at("summary.json"), values)

    def delete_summary(self) -> None:
        """Before anything that it sums up is changed."""
        for name in ("summary.json", MARKERS):
            storage.delete(self.at(name))

    def has(self, names: Iterable[str]) -> bool:
        return all(storage.exists(self.at(name)) for name in names)

    def present_files(self) -> set[str]:
        """Names of all score files, decisions and tars."""
        folders = (("scores", ".parquet"), ("decisions", ".parquet"), (CLEAN, ".tar"), (QUARANTINE, ".tar"))
        return {
            f"{folder}/{name}" for folder, suffix in folders for name in storage.list_files(self.at(folder), suffix)
        }

    # ---------------------------------------------------------------- pass 2

    def decisions_name(self, stem: str) -> str:
        return f"decisions/{stem}.parquet"

    def decision_rows(self, marker: ShardMarker) -> pa.Table:
        """Of a shard that was split. Raises RefusedError when the file is not the one that was committed."""
        name = self.decisions_name(marker.shard)
        if name not in marker.files:
            raise RefusedError(
                f"{self.at(name)}: missing, an earlier version split this shard. Run `sanitize clean {self.path}` once."
            )
        return read_decisions(self.at(name), marker.files[name].sha256)

    def decisions(self, marker: ShardMarker) -> Decisions:
        return Decisions.of(self.decision_rows(marker))

    def scored_shard(
        self, run: Run, marker: ShardMarker, keys: Sequence[str], image_sha256: Sequence[str]
    ) -> ScoredShard:
        """What pass 2 compares an input with, while it copies."""
        return ScoredShard(
            shard=run.shard(marker.shard),
            keys=keys,
            image_sha256=image_sha256,
            sha256=marker.input.sha256,
            damage=marker.input.damage,
            loose_members=marker.input.loose_members,
            image_member=run.image_member,
        )

    def summary(self) -> Summary | None:
        """None while pass 2 is not through."""
        return self._read(Summary, "summary.json") if storage.exists(self.at("summary.json")) else None

    def decided(self) -> Summary:
        """Raises ConfigError while pass 2 is not through."""
        if (summary := self.summary()) is None:
            raise ConfigError(
                f"{self.path}: pass 2 is not through, so nothing is decided. Run `sanitize clean {self.path}` first."
            )
        return summary

    def _read(self, cls: type[T], name: str) -> T:
        """Keys that an earlier version wrote and this one does not know are passed over."""
        path = self.at(name)
        return self._typed(cls, storage.read_json(path), path)

    @staticmethod
    def _typed(cls: type[T], values: dict[str, Any], path: str) -> T:
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if values.get("threshold") in ("inf", "-inf", "nan"):
            values["threshold"] = float(values["threshold"])
        try:
            return from_mapping(cls, {key: value for key, value in values.items() if key in known}, path)
        except ConfigError as error:
            raise StorageError(f"{error} Restore the file, or scan into another folder.") from None
