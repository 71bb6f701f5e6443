"""`sanitize verify`: every output byte is the one that was committed, and no sample was lost."""

from dataclasses import dataclass

from sanitize import storage
from sanitize.artifacts.decisions import DecisionTable
from sanitize.artifacts.scan_folder import CLEAN, QUARANTINE, ScanFolder, ShardMarker, WrittenFile, decision_identity
from sanitize.errors import RefusedError
from sanitize.records import Shard
from sanitize.stages import score_table
from sanitize.stages.shard_reader import ShardReader


@dataclass(frozen=True)
class VerifyResult:
    """`problems` is empty when everything holds."""

    shards: int
    samples: int
    files: int
    problems: tuple[str, ...]


def verify(out: str) -> VerifyResult:
    """Check hashes of all files named by markers, row counts, that every shard was split as it was decided, and that
    clean + quarantine = input, sample for sample."""
    folder = ScanFolder(out)
    run = folder.run()
    table, problems = _decisions(folder)
    samples = files = 0
    is_split = False
    named: set[str] = set()
    for stem in sorted(run.shards):
        marker = folder.marker(stem)
        if marker is None:
            problems.append(f"{stem}: not scored. Run the same `sanitize scan` again.")
            continue
        named |= set(marker.files)
        broken = [problem for name, entry in marker.files.items() for problem in _file_problems(folder, name, entry)]
        problems += broken or _count_problems(folder, marker)
        problems += _split_problems(marker, table) if table else []
        is_split = is_split or marker.clean is not None
        samples += marker.samples
        files += len(marker.files)
    problems += [f"{name}: no marker names it. Delete it." for name in sorted(folder.present_files() - named)]
    if is_split and folder.summary() is None:
        problems.append("summary.json: missing, so pass 2 did not end. Run `sanitize clean` again.")
    return VerifyResult(len(run.shards), samples, files, tuple(problems))


def _decisions(folder: ScanFolder) -> tuple[DecisionTable | None, list[str]]:
    """The decisions of a finished pass 2, and what is wrong with them."""
    summary = folder.summary()
    if summary is None:
        return None, []
    try:
        return folder.decisions(summary.decisions_sha256), []
    except RefusedError:
        return None, ["decisions.parquet: missing or changed. Run `sanitize clean` again."]


def _file_problems(folder: ScanFolder, name: str, entry: WrittenFile) -> list[str]:
    path = folder.at(name)
    if not storage.exists(path):
        return [f"{name}: missing. Delete done/ of this shard and run the same command again."]
    if storage.file_sha256(path) != entry.sha256:
        return [
            f"{name}: content differs from what was committed. Delete it and its marker in done/, then run the command again."
        ]
    return []


def _count_problems(folder: ScanFolder, marker: ShardMarker) -> list[str]:
    table = score_table.read(folder.scores(marker.shard), ["shard"])
    problems = []
    if len(table) != marker.samples:
        problems.append(f"{marker.shard}: {len(table)} score rows for {marker.samples} samples.")
    if foreign := set(table.column("shard").unique().to_pylist()) - {marker.shard}:
        problems.append(
            f"{marker.shard}: its score table is that of {min(foreign)}. Delete done/{marker.shard}.json and scan again."
        )
    if marker.clean is None:
        return problems
    for part, expected in ((CLEAN, marker.clean.kept), (QUARANTINE, marker.clean.removed)):
        name = folder.tar_name(part, marker.shard)
        found = _samples_in(folder.at(name), marker.files[name].bytes) if name in marker.files else 0
        if part == QUARANTINE and marker.input.damage:
            expected = max(expected, found)  # readable members of a sample the damage cut in two are kept there as well
        if found != expected:
            problems.append(f"{name}: holds {found} samples, {expected} were committed.")
    return problems


def _split_problems(marker: ShardMarker, table: DecisionTable) -> list[str]:
    decided = table.of(marker.shard).keep
    if marker.clean is None or marker.clean.decision != decision_identity(decided) or len(decided) != marker.samples:
        return [f"{marker.shard}: not split as decisions.parquet says. Run `sanitize clean` again."]
    return []


def _samples_in(path: str, size: int) -> int:
    with storage.open_read(path) as file:
        return sum(1 for _ in ShardReader(file, Shard(path, path, size), with_images=False).samples())
