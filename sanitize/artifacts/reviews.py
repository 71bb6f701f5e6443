"""reviews/0001.json, 0002.json, ...: what people decided over the score of a scan. None is ever changed or removed.

Each holds the SHA-256 of the one before, and summary.json those of all that pass 2 took into account, so that a changed or missing
one is found. A later word on a sample replaces an earlier one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sanitize import storage
from sanitize.artifacts.scan_folder import ScanFolder, Summary
from sanitize.config import ThresholdPolicy
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import ConfigError, RefusedError
from sanitize.records import Word

FOLDER = "reviews"
RELEASE, REMOVE, WITHDRAW = WORDS = ("release", "remove", "withdraw")  # withdraw: the score decides again
PAST = {RELEASE: "released", REMOVE: "removed"}


@dataclass(frozen=True)
class ReviewedSample:
    """shard: its stem; word: one of WORDS. The rest is what was decided before and what is after; score: null where there is none."""

    shard: str
    index: int
    key: str
    word: str
    score: float | None
    kept_before: bool
    reason_before: str
    kept_after: bool


@dataclass(frozen=True)
class Review:
    """One call of `sanitize review`. previous: SHA-256 of the review before, "" = the first; when: UTC; policy, together: of pass 2
    at that time."""

    number: int
    previous: str
    by: str
    when: str
    note: str
    policy: ThresholdPolicy
    together: tuple[str, ...]
    samples: tuple[ReviewedSample, ...]

    @property
    def name(self) -> str:
        return name_of(self.number)

    def reason(self, word: str) -> str:
        return f"{PAST[word]} by {self.by}: {self.note}" if self.note else f"{PAST[word]} by {self.by}"


def name_of(number: int) -> str:
    return f"{FOLDER}/{number:04d}.json"


@dataclass(frozen=True)
class Reviews:
    """All of one scan, in order. files: name → SHA-256."""

    reviews: tuple[Review, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> dict[str, tuple[Word, ...]]:
        """By stem, in the order of the samples: the last word on each."""
        last: dict[str, dict[int, Word]] = {}
        for review in self.reviews:
            for sample in review.samples:
                words = last.setdefault(sample.shard, {})
                words.pop(sample.index, None)
                if sample.word != WITHDRAW:
                    release, reason = sample.word == RELEASE, review.reason(sample.word)
                    words[sample.index] = Word(sample.index, sample.key, release, reason)
        return {stem: tuple(words[index] for index in sorted(words)) for stem, words in last.items() if words}


def write_review(folder: ScanFolder, review: Review) -> None:
    storage.write_json(folder.at(review.name), to_mapping(review))


def read_reviews(folder: ScanFolder, summary: Summary | None) -> Reviews:
    """Raises RefusedError when one is not as it was written."""
    reviews, problems = check_reviews(folder, summary)
    if problems:
        raise RefusedError(problems[0])
    return reviews


def check_reviews(folder: ScanFolder, summary: Summary | None) -> tuple[Reviews, list[str]]:
    """Those that can be read, and what is wrong: one that is missing, none of ours, or another than its successor or `summary` names."""
    present = {f"{FOLDER}/{name}" for name in storage.list_files(folder.at(FOLDER), ".json")}
    noted = summary.reviews if summary else {}
    found, files, problems = list[Review](), dict[str, str](), list[str]()
    last = max((_number(name) for name in present | noted.keys()), default=0)
    previous: str | None = ""  # None: of a review that is not as it was
    for number in range(1, last + 1):
        name, wrong = name_of(number), ""
        data = storage.read_bytes(folder.at(name)) if name in present else b""
        files |= {name: hashlib.sha256(data).hexdigest()} if name in present else {}
        review = _parsed(data, name)
        if name not in present:
            wrong = "is missing"
        elif review is None or review.number != number:
            wrong = "is no review, or one of another number"
        elif files[name] != noted.get(name, files[name]):
            wrong = "is not the one that pass 2 decided by"
        elif previous is not None and review.previous != previous:
            problems.append(_damaged(folder, name_of(max(number - 1, 1)), f"was changed after {name} was written"))
        if wrong:
            problems.append(_damaged(folder, name, wrong))
        found += [review] if review else []
        previous = None if wrong else files[name]
    return Reviews(tuple(found), files), problems


def _number(name: str) -> int:
    digits = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
    return int(digits) if digits.isascii() and digits.isdecimal() and name == name_of(int(digits)) else 0


def _parsed(data: bytes, name: str) -> Review | None:
    try:
        values: Any = json.loads(data)
        return from_mapping(Review, values, name) if isinstance(values, dict) else None
    except (ValueError, RecursionError, ConfigError):
        return None


def _damaged(folder: ScanFolder, name: str, what: str) -> str:
    return (
        f"{name}: {what}. Restore it from a backup. To go on without any review, move {folder.at(FOLDER)} away and run `sanitize clean "
        f"--ignore-reviews {folder.path}`."
    )
