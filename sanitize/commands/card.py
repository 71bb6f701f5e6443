"""`sanitize card`: a section for the data card of the cleaned set: what was removed, by what rule, who overruled it, what it rests on."""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from sanitize import storage
from sanitize.artifacts.reviews import Review, read_reviews
from sanitize.artifacts.scan_folder import Run, ScanFolder, Summary
from sanitize.errors import ConfigError, check
from sanitize.paths import AnyPath, path_text
from sanitize.stages.shards import printable

MOST = 10  # reasons that are listed


@dataclass(frozen=True)
class CardResult:
    """text: Markdown; file: where it was written, "" = nowhere."""

    file: str
    text: str


def card(scanned: AnyPath, file: AnyPath = "") -> CardResult:
    """Markdown about the kept samples of a scan; the same decisions give the same text. file: a .md to write, "" = none."""
    scanned, file = path_text(scanned, "scanned"), path_text(file, "file")
    check(not file or file.endswith(".md"), f"{file}: a card is Markdown. Name a file that ends with .md.")
    folder = ScanFolder(scanned)
    run, summary = folder.run(), folder.summary()
    if summary is None:
        raise ConfigError(
            f"{scanned}: pass 2 is not through, so nothing is decided. Run `sanitize clean {scanned}` first."
        )
    reviews = () if summary.ignored_reviews else read_reviews(folder, summary).reviews
    text = "\n".join(_lines(folder, run, summary, reviews)) + "\n"
    if file:
        storage.write_bytes(file, text.encode())
    return CardResult(file, text)


def _lines(folder: ScanFolder, run: Run, summary: Summary, reviews: Sequence[Review]) -> Iterator[str]:
    yield from ("## Cleaning", "")
    yield (
        f"{summary.kept} of {summary.samples} samples were kept by `sanitize` {run.versions.get('sanitize', '')}, which looks for samples "
        "with a backdoor trigger by what an encoder makes of them. Kept samples are byte for byte those of the source."
    )
    yield from ("", "| | |", "|---|---|")
    policy = summary.policy
    numbers = {"calibrated": policy.fpr, "fdr": policy.fpr, "fraction": policy.fraction, "robust": policy.mad}
    rule = f"{policy.policy} {numbers[policy.policy]:g}" if policy.policy in numbers else policy.policy
    rows = {
        "Removed": f"{summary.removed}, of them {summary.unscored} without a score (not decodable, no image)"
        if not policy.keep_unscored
        else f"{summary.removed}; {summary.unscored} without a score were kept",
        "Rule": f"{rule}, scores above {summary.threshold:.6g}",
        "Scores": summary.scores,
        "Decided by a person": f"{summary.reviewed}",
        "Shards": f"{summary.shards}, {len(summary.shards_failed)} failed, {len(summary.shards_damaged)} damaged",
        "Detector": f"SHA-256 {run.detector_fingerprint}",
        "Encoder": _text(str(run.encoder.get("architecture", ""))),
        "Decisions": f"SHA-256 {summary.markers_sha256} of markers.jsonl",
    }
    yield from (f"| {name} | {value} |" for name, value in rows.items())
    yield from ("", "### Why samples were removed", "", "| samples | reason |", "|---|---|")
    counts = _reasons(folder, run)
    yield from (f"| {count} | {_text(reason)} |" for reason, count in counts.most_common(MOST))
    if rest := sum(counts.values()) - sum(count for _, count in counts.most_common(MOST)):
        yield f"| {rest} | others |"
    if reviews:
        yield from ("", "### What people decided", "", "| when | who | words | why |", "|---|---|---|---|")
        for review in reviews:
            words = Counter(sample.word for sample in review.samples)
            said = ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
            yield f"| {_text(review.when)} | {_text(review.by)} | {said} | {_text(review.note)} |"
    yield from (
        "",
        "Not shown by this: labels were not looked at; an attacker who knows the detector can hide from it.",
    )


def _reasons(folder: ScanFolder, run: Run) -> Counter[str]:
    """Of removed samples, how many of each reason; p-values and what is said of single files left out."""
    counts: Counter[str] = Counter()
    for marker in folder.markers(sorted(run.shards)):
        if marker.clean:
            rows = folder.decision_rows(marker)
            removed = rows.filter(pc.invert(rows.column("keep"))).column("reason")
            plain = pc.replace_substring_regex(removed, r" \(p [^)]*\)", "")
            # an unscored sample's reason names details of its file
            plain = pc.replace_substring_regex(plain, r"^([a-z_]+): .*", r"without a score: \1")
            for entry in pc.value_counts(plain).to_pylist():
                counts[entry["values"]] += entry["counts"]
    return counts


def _text(text: str) -> str:
    """As a cell of a Markdown table, whatever it holds."""
    return html.escape(printable(text)).replace("|", "&#124;").replace("`", "&#96;").replace("[", "&#91;")
