"""`sanitize verify`: every output byte is the one that was committed, and no sample was lost."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sanitize import storage
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.reviews import Reviews, check_reviews
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
from sanitize.records import Shard, Word
from sanitize.stages import score_table
from sanitize.stages.decision_table import Decisions, split_identity
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import printable
from sanitize.stages.splitting import split_shard

Words = Mapping[str, Sequence[Word]]


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
        markers = folder.read_markers([stem for stem in sorted(run.shards) if stem in scored])
        problems, words = _reviews(folder, summary)
        for stem in sorted(set(run.shards) - {marker.shard for marker in markers}):
            problems.append(Problem(f"{stem}: not scored. Run the same `sanitize scan` again."))
        check = partial(_shard_problems, folder, run, summary, words, deep)
        for found in storage.read_ahead(check, markers):
            problems += found
        if summary and not problems:
            problems += _summary_problems(folder, summary, markers)
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


def _reviews(folder: ScanFolder, summary: Summary | None) -> tuple[list[Problem], Words | None]:
    """What is wrong with reviews/, and the words in it that pass 2 decided by, by stem; None: they cannot be told any more.

    A review cannot be made again, so nothing of it is ever deleted here.
    """
    reviews, texts = check_reviews(folder, summary)
    problems = [Problem(text) for text in texts]
    if summary is None or problems:
        return problems, None
    if summary.ignored_reviews:
        return problems, {}
    for name in sorted(reviews.files.keys() - summary.reviews.keys()):
        problems.append(
            Problem(f"{name}: recorded, but pass 2 has not decided by it. Run `sanitize clean {folder.path}` again.")
        )
    applied = tuple(review for review in reviews.reviews if review.name in summary.reviews)
    return problems, Reviews(applied).words()


def _summary_problems(folder: ScanFolder, summary: Summary, markers: Sequence[ShardMarker]) -> Iterator[Problem]:
    split = [marker.clean for marker in markers if marker.clean]
    counts = [sum(part.kept for part in split), sum(part.removed for part in split)]
    if not summary.shards_failed and counts != [summary.kept, summary.removed]:
        text = f"summary.json: says {summary.kept} kept and {summary.removed} removed, the shards {counts[0]} and {counts[1]}."
        yield Problem(f"{text} {_repair(folder)}", ("summary.json", "markers.jsonl"))


def _shard_problems(
    folder: ScanFolder, run: Run, summary: Summary | None, words: Words | None, deep: bool, marker: ShardMarker
) -> list[Problem]:
    broken = [
        problem for name, entry in marker.files.items() for problem in _file_problems(folder, marker, name, entry)
    ]
    problems = broken or list(_count_problems(folder, marker))
    said = (words or {}).get(marker.shard, ())
    rule = split_identity(summary.rule, said) if summary else ""
    if summary and (marker.clean is None or (words is not None and marker.clean.rule != rule)):
        problems.append(Problem(f"{marker.shard}: not split as summary.json says. Run `sanitize clean` again."))
    if marker.clean and not problems:
        try:
            decided = folder.decisions(marker)
        except RefusedError as error:
            return [_split_again(marker, str(error))]
        problems += _decision_problems(folder, marker, decided, said)
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


def _decision_problems(
    folder: ScanFolder, marker: ShardMarker, decided: Decisions, words: Sequence[Word]
) -> list[Problem]:
    assert marker.clean is not None, "of shards that were split"
    name = folder.decisions_name(marker.shard)
    if marker.clean.decision != decision_identity(decided.keep) or len(decided.keep) != marker.samples:
        return [_split_again(marker, f"{name}: not what the shard was split by. {_repair(folder)}")]
    for word in words:
        if word.index >= marker.samples or (decided.keys[word.index], bool(decided.keep[word.index])) != (
            word.key,
            word.release,
        ):
            text = f"{name}: sample {word.index} is not as reviews/ says ({word.reason}). {_repair(folder)}"
            return [_split_again(marker, text)]
    return list(_tar_problems(folder, marker, decided))


def _tar_problems(folder: ScanFolder, marker: ShardMarker, decided: Decisions) -> Iterator[Problem]:
    """Each tar holds the samples that the decisions say, in their order."""
    for keep, name in folder.part_names(marker.shard).items():
        expected = [key for key, kept in zip(decided.keys, decided.keep.tolist(), strict=True) if kept is keep]
        found = _keys_in(folder.at(name), marker.files[name].bytes) if name in marker.files else []
        if not keep and marker.input.damage:
            found = found[: len(expected)]  # readable members of a sample the damage cut in two are there as well
        if len(found) != len(expected):
            text = f"{name}: holds {len(found)} samples, {len(expected)} were committed. {_repair(folder)}"
            yield _split_again(marker, text)
        elif found != expected:
            decisions = folder.decisions_name(marker.shard)
            yield _split_again(marker, f"{name}: holds other samples than {decisions} says. {_repair(folder)}")


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


def _keys_in(path: str, size: int) -> list[str]:
    with storage.open_read(path) as file:
        samples = ShardReader(file, Shard(path, path, size), with_images=False).samples()
        return [printable(sample.key) for sample in samples]
