"""`sanitize verify`: every output byte is the one that was committed, and no sample was lost."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sanitize import storage
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.scan_folder import (
    Run,
    ScanFolder,
    ShardMarker,
    Summary,
    WrittenFile,
    decision_identity,
)
from sanitize.errors import RefusedError, ShardError
from sanitize.hashing import HashingWriter
from sanitize.paths import AnyPath, path_text
from sanitize.records import Shard
from sanitize.stages import score_table
from sanitize.stages.decision_table import Decisions
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.splitting import split_shard


@dataclass(frozen=True)
class Problem:
    """text: what and where. delete: names below the folder that have to go before the same `sanitize scan` writes them anew;
    unsplit: the marker that has to forget pass 2 first."""

    text: str
    delete: tuple[str, ...] = ()
    unsplit: ShardMarker | None = None


@dataclass(frozen=True)
class VerifyResult:
    """`problems` is empty when everything holds. deleted: what `repair` removed, to be written anew."""

    shards: int
    samples: int
    files: int
    problems: tuple[str, ...]
    deleted: tuple[str, ...] = ()


def verify(out: AnyPath, *, deep: bool = False, repair: bool = False) -> VerifyResult:
    """Check hashes of all files named by markers, row counts, that every shard was split as it was decided and by the rule of the
    whole scan, and that clean + quarantine = input, sample for sample.

    deep: read the inputs as well and split each once more, into nothing: the tars hold the input's bytes, as the decisions say.
    repair: delete what is damaged; the same `sanitize scan` then does that part again, and only that.
    """
    out = path_text(out, "out")
    folder = ScanFolder(out)
    run = folder.run()
    with folder_lock(out, "verify --repair") if repair else contextlib.nullcontext():
        summary, scored = folder.summary(), folder.scored()
        markers, problems = folder.read_markers([stem for stem in sorted(run.shards) if stem in scored]), []
        for stem in sorted(set(run.shards) - {marker.shard for marker in markers}):
            problems.append(Problem(f"{stem}: not scored. Run the same `sanitize scan` again."))
        for found in storage.read_ahead(lambda marker: _shard_problems(folder, run, marker, summary, deep), markers):
            problems += found
        if summary and markers != list(folder.committed_markers().values()):
            text = f"markers.jsonl: not what done/ says. {_repair(folder)}"
            problems.append(Problem(text, ("summary.json", "markers.jsonl")))
        named = {name for marker in markers for name in marker.files}
        for name in sorted(folder.present_files() - named):
            problems.append(Problem(f"{name}: no marker names it. Delete it.", (name,)))
        if any(marker.clean for marker in markers) and summary is None:
            problems.append(Problem("summary.json: missing, so pass 2 did not end. Run `sanitize clean` again."))
        deleted = _delete(folder, problems) if repair else ()
    return VerifyResult(
        shards=len(run.shards),
        samples=sum(marker.samples for marker in markers),
        files=len(named),
        problems=tuple(problem.text for problem in problems),
        deleted=deleted,
    )


def _delete(folder: ScanFolder, problems: Sequence[Problem]) -> tuple[str, ...]:
    names = tuple(sorted({name for problem in problems for name in problem.delete}))
    if names:
        folder.delete_summary()
    for problem in problems:
        if problem.unsplit:
            folder.write_marker(problem.unsplit.unsplit())
    for name in names:
        storage.delete(folder.at(name))
    return names


def _shard_problems(
    folder: ScanFolder, run: Run, marker: ShardMarker, summary: Summary | None, deep: bool
) -> list[Problem]:
    broken = [
        problem for name, entry in marker.files.items() for problem in _file_problems(folder, marker, name, entry)
    ]
    problems = broken or list(_count_problems(folder, marker))
    if summary and (marker.clean is None or marker.clean.rule != summary.rule):
        problems.append(Problem(f"{marker.shard}: not split as summary.json says. Run `sanitize clean` again."))
    if marker.clean and not problems:
        try:
            decided = folder.decisions(marker)
        except RefusedError as error:
            return [_split_again(marker, str(error))]
        problems += _decision_problems(folder, marker, decided)
        if deep and not problems:
            problems += _input_problems(folder, run, marker, decided)
    return problems


def _score_again(marker: ShardMarker, text: str) -> Problem:
    return Problem(text, (f"done/{marker.shard}.json", *marker.files))


def _split_again(marker: ShardMarker, text: str) -> Problem:
    return Problem(text, tuple(set(marker.files) - set(marker.unsplit().files)), marker)


def _file_problems(folder: ScanFolder, marker: ShardMarker, name: str, entry: WrittenFile) -> list[Problem]:
    path = folder.at(name)
    if not storage.exists(path):
        what = "missing"
    elif storage.file_sha256(path) != entry.sha256:
        what = "content differs from what was committed"
    else:
        return []
    again = _score_again if name in marker.unsplit().files else _split_again
    return [again(marker, f"{name}: {what}. {_repair(folder)}")]


def _repair(folder: ScanFolder) -> str:
    return f"Run `sanitize verify --repair {folder.path}`, then the same `sanitize scan` again."


def _count_problems(folder: ScanFolder, marker: ShardMarker) -> Iterator[Problem]:
    table = score_table.read(folder.scores(marker.shard), ["shard"])
    if len(table) != marker.samples:
        text = f"{marker.shard}: {len(table)} score rows for {marker.samples} samples. {_repair(folder)}"
        yield _score_again(marker, text)
    if foreign := set(table.column("shard").unique().to_pylist()) - {marker.shard}:
        yield _score_again(marker, f"{marker.shard}: its score table is that of {min(foreign)}. {_repair(folder)}")
    if marker.clean is None:
        return
    for keep, name in folder.part_names(marker.shard).items():
        expected = marker.clean.kept if keep else marker.clean.removed
        found = _samples_in(folder.at(name), marker.files[name].bytes) if name in marker.files else 0
        if not keep and marker.input.damage:
            expected = max(expected, found)  # readable members of a sample the damage cut in two are kept there as well
        if found != expected:
            yield _split_again(marker, f"{name}: holds {found} samples, {expected} were committed. {_repair(folder)}")


def _decision_problems(folder: ScanFolder, marker: ShardMarker, decided: Decisions) -> list[Problem]:
    assert marker.clean is not None, "of shards that were split"
    if marker.clean.decision == decision_identity(decided.keep) and len(decided.keep) == marker.samples:
        return []
    name = folder.decisions_name(marker.shard)
    return [_split_again(marker, f"{name}: not what the shard was split by. {_repair(folder)}")]


def _input_problems(folder: ScanFolder, run: Run, marker: ShardMarker, decided: Decisions) -> list[Problem]:
    """What splitting the input once more would write differently."""
    images = score_table.read(folder.scores(marker.shard), ["sha256"]).column("sha256").to_pylist()
    scored = folder.scored_shard(run, marker, decided.keys, images)
    try:
        parts = split_shard(scored, decided.keep, lambda _: contextlib.nullcontext(HashingWriter(_Nothing())))
    except ShardError as error:
        return [Problem(str(error))]
    names = folder.part_names(marker.shard)
    expected, written = {names[keep]: WrittenFile.of(part) for keep, part in parts.items()}, marker.tars()
    differing = sorted(name for name in expected.keys() | written.keys() if expected.get(name) != written.get(name))
    return [
        _split_again(marker, f"{name}: is not what the input and the decisions give. {_repair(folder)}")
        for name in differing
    ]


class _Nothing(io.BytesIO):
    """Takes everything, keeps nothing."""

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def _samples_in(path: str, size: int) -> int:
    with storage.open_read(path) as file:
        return sum(1 for _ in ShardReader(file, Shard(path, path, size), with_images=False).samples())
