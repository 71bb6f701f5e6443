"""`sanitize card`: a section for the data card of the cleaned set: what was removed, by what rule, who overruled it, what it rests on.

As Markdown for people, or with the files of the cleaned set as Croissant for programs.
"""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from sanitize import storage
from sanitize.artifacts.reviews import Review, read_reviews
from sanitize.artifacts.scan_folder import CLEAN, Run, ScanFolder, Summary
from sanitize.auditing.croissant import croissant
from sanitize.errors import check
from sanitize.paths import AnyPath, path_text
from sanitize.stages.reasons import P_VALUE_TEXT
from sanitize.stages.shards import printable

MOST = 10  # reasons that are listed
ENDINGS = (".md", ".json")
LIMITS = ("labels were not looked at", "an attacker who knows the detector can hide from it")


@dataclass(frozen=True)
class CardResult:
    """text: Markdown or, of a .json, Croissant; file: where it was written, "" = nowhere."""

    file: str
    text: str


def card(scanned: AnyPath, file: AnyPath = "") -> CardResult:
    """About the kept samples of a scan; the same decisions give the same text. file: a .md, or a .json for Croissant, to write, "" = only
    Markdown, nowhere."""
    scanned, file = path_text(scanned, "scanned"), path_text(file, "file")
    check(
        not file or file.endswith(ENDINGS),
        f"{file}: a card is Markdown or Croissant. Name a file that ends with {' or '.join(ENDINGS)}.",
    )
    folder = ScanFolder(scanned)
    run, summary = folder.run(), folder.decided()
    reviews = () if summary.ignored_reviews else read_reviews(folder, summary).reviews
    write = _croissant if file.endswith(".json") else _markdown
    text = write(folder, run, summary, reviews)
    if file:
        storage.write_bytes(file, text.encode())
    return CardResult(file, text)


def _markdown(folder: ScanFolder, run: Run, summary: Summary, reviews: Sequence[Review]) -> str:
    return "\n".join(_lines(folder, run, summary, reviews)) + "\n"


def _lines(folder: ScanFolder, run: Run, summary: Summary, reviews: Sequence[Review]) -> Iterator[str]:
    yield from ("## Cleaning", "", _in_short(run, summary))
    yield from ("", "| | |", "|---|---|")
    yield from (f"| {name} | {_text(value)} |" for name, value in _facts(run, summary).items())
    yield from ("", "### Why samples were removed", "", "| samples | reason |", "|---|---|")
    yield from (f"| {count} | {_text(reason)} |" for reason, count in _reasons(folder, run))
    if reviews:
        yield from ("", "### What people decided", "", "| when | who | words | why |", "|---|---|---|---|")
        for review in reviews:
            yield f"| {_text(review.when)} | {_text(review.by)} | {_words(review)} | {_text(review.note)} |"
    yield from ("", f"Not shown by this: {'; '.join(LIMITS)}.")


def _croissant(folder: ScanFolder, run: Run, summary: Summary, reviews: Sequence[Review]) -> str:
    """What Markdown says, as the preprocessing of a data set of the clean tars."""
    tars = {
        name: file
        for marker in folder.markers(sorted(run.shards))
        for name, file in marker.tars().items()
        if name.startswith(f"{CLEAN}/")
    }
    cleaning = [f"{name}: {value}" for name, value in _facts(run, summary).items()]
    cleaning += [f"Removed, {reason}: {count} samples" for reason, count in _reasons(folder, run)]
    cleaning += [f"Decided by {review.by}, {review.when}: {_words(review)}. {review.note}" for review in reviews]
    name = f"{storage.absolute(folder.path).rstrip('/').rsplit('/', 1)[-1]}-clean"
    texts = [printable(text) for text in cleaning]
    return croissant(printable(name), _in_short(run, summary), tars, run.image_member, texts, LIMITS)


def _in_short(run: Run, summary: Summary) -> str:
    return (
        f"{summary.kept} of {summary.samples} samples were kept by `sanitize` {run.versions.get('sanitize', '')}, which looks for samples "
        "with a backdoor trigger by what an encoder makes of them. Kept samples are byte for byte those of the source."
    )


def _facts(run: Run, summary: Summary) -> dict[str, str]:
    policy = summary.policy
    numbers = {"calibrated": policy.fpr, "fdr": policy.fpr, "fraction": policy.fraction, "robust": policy.mad}
    rule = f"{policy.policy} {numbers[policy.policy]:g}" if policy.policy in numbers else policy.policy
    return {
        "Removed": f"{summary.removed}, of them {summary.unscored} without a score (not decodable, no image)"
        if not policy.keep_unscored
        else f"{summary.removed}; {summary.unscored} without a score were kept",
        "Rule": f"{rule}, scores above {summary.threshold:.6g}",
        "Scores": summary.scores,
        "Decided by a person": f"{summary.reviewed}",
        "Shards": f"{summary.shards}, {len(summary.shards_failed)} failed, {len(summary.shards_damaged)} damaged",
        "Detector": f"SHA-256 {run.detector_fingerprint}",
        "Encoder": str(run.encoder.get("architecture", "")),
        "Decisions": f"SHA-256 {summary.markers_sha256} of markers.jsonl",
    }


def _words(review: Review) -> str:
    words = Counter(sample.word for sample in review.samples)
    return ", ".join(f"{count} {word}" for word, count in sorted(words.items()))


def _reasons(folder: ScanFolder, run: Run) -> list[tuple[str, int]]:
    """Of removed samples, how many of each of the most frequent reasons, and of others; p-values and what is said of single files left
    out."""
    counts: Counter[str] = Counter()
    for marker in folder.markers(sorted(run.shards)):
        if marker.clean:
            rows = folder.decision_rows(marker)
            removed = rows.filter(pc.invert(rows.column("keep"))).column("reason")
            plain = pc.replace_substring_regex(removed, P_VALUE_TEXT, "")
            # an unscored sample's reason names details of its file
            plain = pc.replace_substring_regex(plain, r"^([a-z_]+): .*", r"without a score: \1")
            for entry in pc.value_counts(plain).to_pylist():
                counts[entry["values"]] += entry["counts"]
    most = counts.most_common(MOST)
    rest = sum(counts.values()) - sum(count for _, count in most)
    return [*most, ("others", rest)] if rest else most


def _text(text: str) -> str:
    """As a cell of a Markdown table, whatever it holds."""
    return html.escape(printable(text)).replace("|", "&#124;").replace("`", "&#96;").replace("[", "&#91;")
