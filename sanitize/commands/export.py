"""`sanitize export`: removed samples, and kept ones beside them, as images and a table that other tools open.

Images are copied byte for byte, but under names of ours: what a tar calls its members never becomes a path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sanitize import storage
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.run_record import claim_folder
from sanitize.artifacts.scan_folder import ScanFolder
from sanitize.auditing.export_formats import FORMATS, IMAGES, Row
from sanitize.auditing.pictures import Onlooker, Original
from sanitize.auditing.scored import SampleRow, ScoredSamples, read_scored, sample_rows
from sanitize.auditing.selection import removed_and_kept
from sanitize.config_loading import to_mapping
from sanitize.errors import ConfigError, ShardError, check
from sanitize.paths import AnyPath, path_text
from sanitize.stages.decision_table import FLAT, flat
from sanitize.stages.shards import printable

TABLE, RUN = "samples.parquet", "export.json"
SCHEMA = pa.schema(
    [
        ("file", pa.string()),  # below the export; null where there is no image, then `missing` says why
        *FLAT,
        ("label", pa.string()),
        ("caption", pa.string()),
        ("embedding", pa.list_(pa.float32())),
        ("missing", pa.string()),
    ]
)


@dataclass(frozen=True)
class ExportRun:
    """exported/export.json: what makes this export this export. decisions: SHA-256 that names what pass 2 decided."""

    decisions: str
    format: str
    limit: int
    kept: int
    random: int
    seed: int


@dataclass(frozen=True)
class ExportResult:
    """Counts of exported samples. images: that have theirs; failed: one message for each shard that could not be read."""

    out: str
    format: str
    samples: int
    removed: int
    kept: int
    images: int
    failed: tuple[str, ...]


def export(
    scanned: AnyPath,
    out: AnyPath,
    *,
    format: str = "folder",
    limit: int = 10_000,
    kept: int = 100,
    random: int = 0,
    seed: int = 0,
) -> ExportResult:
    """Write images and samples.parquet into `out`, and what `format` needs beside them.

    format: of FORMATS; limit: removed samples, highest score first; kept: kept ones nearest the cut; random: other kept ones, drawn by
    `seed`.
    """
    scanned, out = path_text(scanned, "scanned"), path_text(out, "out")
    check(format in FORMATS, f"format: {format!r} is not one of {', '.join(FORMATS)}.")
    for name, count in (("limit", limit), ("kept", kept), ("random", random)):
        check(count >= 0, f"{name}: {count} samples; give 0 or more.")
    folder = ScanFolder(scanned)
    run, summary = folder.run(), folder.decided()
    scored = read_scored(folder, run, summary)
    wanted = sample_rows(folder, scored, removed_and_kept(scored, limit, kept, random, seed).tolist())
    check(
        bool(wanted),
        f"{scanned}: nothing to export: no sample was removed, and none of the kept ones is asked for. Give --kept.",
    )
    onlooker = Onlooker(run)
    with folder_lock(out, "export"):
        _claim(out, ExportRun(summary.markers_sha256, format, limit, kept, random, seed))
        failed = summary.not_split()
        rows = _decided(folder, scored, wanted)
        numbers = {row.row: number for number, row in enumerate(wanted)}
        for original in _originals(onlooker, wanted, rows, failed):
            _take(rows[original.row], original, out, numbers[original.row])
        in_order = [rows[row.row] for row in wanted]
        with_image = [row for row in in_order if row["file"]]
        FORMATS[format](out, with_image)
        with storage.atomic_write(storage.join(out, TABLE)) as target:
            pq.write_table(pa.Table.from_pylist(in_order, schema=SCHEMA), target, compression="zstd")
    removed = sum(not row["keep"] for row in in_order)
    return ExportResult(
        out, format, len(in_order), removed, len(in_order) - removed, len(with_image), tuple(sorted(failed))
    )


def _claim(out: str, run: ExportRun) -> None:
    """Make `out` this export's. Raises RefusedError when it is another's, ConfigError when it holds anything else."""
    if not storage.exists(storage.join(out, RUN)) and (there := storage.list_files(out, "")):
        raise ConfigError(
            f"{out}: holds other files ({printable(there[0])}), which an export would mix with. Name a folder that is empty or not there."
        )
    claim_folder(out, RUN, to_mapping(run), "an export")


def _decided(folder: ScanFolder, scored: ScoredSamples, wanted: Sequence[SampleRow]) -> dict[int, Row]:
    """By row of the scan: what was decided, without image."""
    found: dict[int, Row] = {}
    starts = dict(zip((marker.shard for marker in scored.markers), scored.starts.tolist(), strict=False))
    for marker, indices in scored.by_shard(np.array([row.row for row in wanted], np.int64)):
        table = flat(folder.decision_rows(marker).take(indices))
        for index, values in zip(indices.tolist(), table.to_pylist(), strict=True):
            found[starts[marker.shard] + index] = values
    for row in wanted:
        reason = printable(found[row.row]["reason"])
        found[row.row] |= {"reason": reason, "file": None, "missing": _why_without(row)}
    return found


def _why_without(row: SampleRow) -> str:
    """Why there is no image of a sample, unless one is found."""
    return printable(row.reason or row.status) if row.status != "ok" else "its image is not the one that was scored"


def _originals(
    onlooker: Onlooker, wanted: Sequence[SampleRow], rows: dict[int, Row], failed: list[str]
) -> Iterator[Original]:
    """Each shard is read once; one that cannot be read leaves its samples without an image, and is named in `failed`."""
    by_shard: dict[str, list[SampleRow]] = {}
    for row in wanted:
        by_shard.setdefault(row.shard, []).append(row)
    for stem, samples in sorted(by_shard.items()):
        try:
            yield from onlooker.originals(stem, samples)
        except ShardError as error:
            failed.append(str(error))
            for sample in samples:
                if rows[sample.row]["file"] is None:
                    rows[sample.row]["missing"] = str(error)


def _take(row: Row, original: Original, out: str, number: int) -> None:
    """Write the image and say so in its row."""
    name = f"{IMAGES}/{number:06d}.{original.ending}"
    storage.write_bytes(storage.join(out, name), original.data)
    embedding = [float(str(value)) for value in original.embedding]  # as short as float32 can be told
    row |= {"file": name, "missing": None, "label": original.label, "caption": original.caption, "embedding": embedding}
