"""`sanitize verify`: every output byte is the one that was committed, and no sample was lost."""

from dataclasses import dataclass
from typing import Any

from sanitize import storage
from sanitize.errors import ConfigError
from sanitize.records import Shard
from sanitize.stages import score_table
from sanitize.stages.shards import ShardReader


@dataclass(frozen=True)
class VerifyResult:
    """`problems` is empty when everything holds."""

    shards: int
    samples: int
    files: int
    problems: tuple[str, ...]


def verify(out: str) -> VerifyResult:
    """Check hashes of all files named by markers, row counts, and that clean + quarantine = input, sample for sample."""
    if not storage.exists(storage.join(out, "run.json")):
        raise ConfigError(f"{out}: no scan there (run.json is missing). Give the folder that `sanitize scan` wrote.")
    run = storage.read_json(storage.join(out, "run.json"))
    problems: list[str] = []
    samples = files = 0
    named: set[str] = set()
    for stem in sorted(run["shards"]):
        path = storage.join(out, "done", f"{stem}.json")
        if not storage.exists(path):
            problems.append(f"{stem}: not scored. Run the same `sanitize scan` again.")
            continue
        marker = storage.read_json(path)
        named |= set(marker["files"])
        broken = [problem for name, entry in marker["files"].items() for problem in _file_problems(out, name, entry)]
        problems += broken or _count_problems(out, stem, marker)
        samples += marker["samples"]
        files += len(marker["files"])
    problems += [f"{name}: no marker names it. Delete it." for name in sorted(_present(out) - named)]
    problems += _decision_problems(out)
    return VerifyResult(len(run["shards"]), samples, files, tuple(problems))


def _present(out: str) -> set[str]:
    folders = (("scores", ".parquet"), ("clean", ".tar"), ("quarantine", ".tar"))
    return {
        f"{folder}/{name}"
        for folder, suffix in folders
        for name in storage.list_files(storage.join(out, folder), suffix)
    }


def _file_problems(out: str, name: str, entry: dict[str, Any]) -> list[str]:
    path = storage.join(out, name)
    if not storage.exists(path):
        return [f"{name}: missing. Delete done/ of this shard and run the same command again."]
    if storage.file_sha256(path) != entry["sha256"]:
        return [
            f"{name}: content differs from what was committed. Delete it and its marker in done/, then run the command again."
        ]
    return []


def _count_problems(out: str, stem: str, marker: dict[str, Any]) -> list[str]:
    rows = len(score_table.read(storage.join(out, "scores", f"{stem}.parquet"), ["index"]))
    problems = [f"{stem}: {rows} score rows for {marker['samples']} samples."] if rows != marker["samples"] else []
    if "clean" not in marker:
        return problems
    for folder, expected in (("clean", marker["clean"]["kept"]), ("quarantine", marker["clean"]["removed"])):
        name = f"{folder}/{stem}.tar"
        found = _samples_in(storage.join(out, name), marker["files"][name]["bytes"]) if name in marker["files"] else 0
        if folder == "quarantine" and marker["input"]["damage"]:
            expected = max(expected, found)  # readable members of a sample the damage cut in two are kept there as well
        if found != expected:
            problems.append(f"{name}: holds {found} samples, {expected} were committed.")
    return problems


def _samples_in(path: str, size: int) -> int:
    with storage.open_read(path) as file:
        return sum(1 for _ in ShardReader(file, Shard(path, path, size), with_images=False).samples())


def _decision_problems(out: str) -> list[str]:
    path = storage.join(out, "summary.json")
    if not storage.exists(path):
        return []
    committed = storage.read_json(path)["decisions_sha256"]
    decisions = storage.join(out, "decisions.parquet")
    if not storage.exists(decisions) or storage.file_sha256(decisions) != committed:
        return ["decisions.parquet: missing or changed. Run `sanitize clean` again."]
    return []
