"""Why a sample has its score: the share of each kind of evidence in it, and words for the largest shares.

`reaction`: the squared Mahalanobis distance is the sum over statistics j of (x - c)_j (P (x - c))_j, so each has a share in it.
`evidence`: the harmonic mean p-value is one over the sum of weight / p over its kinds, so each has a share in that.
The others have one statistic. Only samples that are removed, or that a person decided on, are asked about.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sanitize.stages import score_table
from sanitize.stages.agreement import AgreementTest, agreement
from sanitize.stages.clean_reference import CleanReference
from sanitize.stages.evidence import KINDS, PREDICTION, REACTION, WHEREABOUTS, Evidence
from sanitize.stages.evidence_adaptation import ENERGY, evidence_values
from sanitize.stages.perturbations import CHANGE_COLUMNS, PERTURBATIONS
from sanitize.stages.tails import Floats
from sanitize.stages.thresholds import p_values

VERSION = 1  # of the words and shares: another one is another decision table
RECONSTRUCTION, AGREEMENT = "reconstruction", "agreement"
STATISTICS = score_table.STATISTICS_COLUMNS
CONTRIBUTIONS = (*STATISTICS, RECONSTRUCTION, *KINDS, AGREEMENT)  # fields of the column `contributions`
P_VALUES = ("score", *KINDS, AGREEMENT)  # fields of the column `p_values`
MAIN = 0.7  # of what speaks against a sample, that the words must name
P_VALUE_TEXT = r" \(p [^)]*\)"  # regular expression: of what words say of one sample alone
PLAIN = "score above threshold"  # where nothing is known of the score
Doubles = NDArray[np.float64]

UNDER = dict(zip(CHANGE_COLUMNS, ("noise", "blur", "coarsening", "turning"), strict=True))
assert list(PERTURBATIONS) == ["noise", "blur", "coarse", "turn"], "which UNDER has words for"
STILL, MOVED = "stays put under", "moves more than clean ones do under"
WHERE = {  # statistic → what is said when it is lower than of clean images, and when it is higher
    "embedding_norm": ("is shorter than clean ones", "is longer than clean ones"),
    "neighbour_distance": ("lies closer to clean ones than they do to each other", "lies far from clean ones"),
}
SAID = {
    RECONSTRUCTION: "image decodes to something else",
    PREDICTION: "embedding is not the one that this image ought to have",
    AGREEMENT: "embedding departs from its prediction as those of other samples do",
}


@dataclass(frozen=True)
class Explanation:
    """Of M samples: shares and p-values by name (M,), NaN = has no part in the score; words: one text a sample."""

    contributions: Mapping[str, Doubles]
    p_values: Mapping[str, Doubles]
    words: list[str]


@dataclass(frozen=True)
class Reasons:
    """Of scores that nothing is known about. calibration: sorted scores of clean held-out images, empty = there are none."""

    calibration: Floats

    @property
    def columns(self) -> Sequence[str]:
        """Of the score table, that `explain` needs."""
        return ()

    @property
    def identity(self) -> str:
        """Equal ones explain the same score rows alike."""
        digest = hashlib.sha256(self.calibration.tobytes())
        for part in self._known():
            digest.update(part.tobytes())
        return f"{type(self).__name__} {VERSION} {digest.hexdigest()[:12]}"

    def explain(self, table: pa.Table, scores: Floats) -> Explanation:  # noqa: ARG002 - nothing more is known
        """Score rows that have a score, and the M scores that decided."""
        return Explanation({}, self._of_score(scores), [PLAIN] * len(scores))

    def _known(self) -> list[NDArray[np.generic]]:
        return []

    def _of_score(self, scores: Floats) -> dict[str, Doubles]:
        return {"score": p_values(scores, self.calibration).astype(np.float64)} if len(self.calibration) else {}


@dataclass(frozen=True)
class OneStatistic(Reasons):
    """Of `paper` and `lowres`."""

    def explain(self, table: pa.Table, scores: Floats) -> Explanation:  # noqa: ARG002 - the score is all there is
        found = self._of_score(scores)
        return Explanation(
            {RECONSTRUCTION: np.ones(len(scores))}, found, _with_p([SAID[RECONSTRUCTION]] * len(scores), found["score"])
        )


@dataclass(frozen=True)
class ReactionReasons(Reasons):
    """Of `reaction`. reference: that decided, moved to the bulk of the scan or not."""

    reference: CleanReference

    @property
    def columns(self) -> Sequence[str]:
        return STATISTICS

    def _known(self) -> list[NDArray[np.generic]]:
        return [self.reference.centre.numpy(), self.reference.precision.numpy()]

    def explain(self, table: pa.Table, scores: Floats) -> Explanation:
        parts, offsets = split_distance(self.reference, score_table.statistics(table))
        found = self._of_score(scores)
        return Explanation(
            dict(zip(STATISTICS, shares(parts).T, strict=True)),
            found,
            _with_p(in_words(parts, offsets), found["score"]),
        )


@dataclass(frozen=True)
class EvidenceReasons(Reasons):
    """Of `evidence`. test: where pass 2 also asked how samples agree."""

    reference: CleanReference
    evidence: Evidence
    test: AgreementTest | None = None

    @property
    def columns(self) -> Sequence[str]:
        vectors = score_table.VECTORS if self.test else ()
        return [*STATISTICS, ENERGY, *vectors]

    def _known(self) -> list[NDArray[np.generic]]:
        tails = [tail.calibration for tail in self.evidence.tails.values()]
        weights = np.array(list(self.evidence.weights.values()))
        test, pool = self.test, list[NDArray[np.generic]]()
        if test:
            pool = [test.pool.residuals, test.pool.hashes, test.tail.calibration]
        return [self.reference.centre.numpy(), self.reference.precision.numpy(), *tails, weights, *pool]

    def explain(self, table: pa.Table, scores: Floats) -> Explanation:
        statistics, values = score_table.statistics(table), evidence_values(table, self.reference)
        known = {kind: tail.p_values(values[kind]) for kind, tail in self.evidence.tails.items()}
        weights = dict(self.evidence.weights)
        if self.test:
            known[AGREEMENT] = self._agreement(self.test, table)
            weights = {kind: (1 - self.test.weight) * weight for kind, weight in weights.items()}
            weights[AGREEMENT] = self.test.weight
        parts = np.stack([weights[kind] / known[kind] for kind in known], axis=1)
        part_of = dict(zip(known, shares(parts).T, strict=True))
        words = self._words(statistics, part_of, known)
        return Explanation(part_of, self._of_score(scores) | known, words)

    @staticmethod
    def _agreement(test: AgreementTest, table: pa.Table) -> Doubles:
        departures, has = score_table.departures(table)
        found = np.full(len(table), np.nan)
        found[has] = test.tail.p_values(agreement(departures, test.pool))
        return found

    def _words(self, statistics: Floats, part_of: Mapping[str, Doubles], known: Mapping[str, Doubles]) -> list[str]:
        """The kinds that have the main part, each with its p-value."""
        everything, whereabouts = statistics.copy(), statistics.copy()
        whereabouts[:, : len(CHANGE_COLUMNS)] = np.nan
        said = {kind: [text] * len(statistics) for kind, text in SAID.items()}
        said[REACTION] = in_words(*split_distance(self.reference, everything))
        said[WHEREABOUTS] = in_words(*split_distance(self.reference, whereabouts))
        main = main_parts(np.stack(list(part_of.values()), axis=1))
        texts: list[list[str]] = [[] for _ in range(len(statistics))]
        for column, kind in enumerate(part_of):
            for row in np.flatnonzero(main[:, column]).tolist():
                texts[row].append(f"{said[kind][row]} (p {known[kind][row]:.2g})")
        return ["; ".join(text) or PLAIN for text in texts]


# ---------------------------------------------------------------- shares


def split_distance(reference: CleanReference, statistics: Floats) -> tuple[Doubles, Doubles]:
    """(M, V + 2) statistics → what each adds to the squared Mahalanobis distance, and how it differs from the centre.

    Of an image that was not perturbed (NaN) norm and neighbour distance alone; the rest is NaN.
    """
    offsets = statistics.astype(np.float64) - reference.centre.double().numpy()
    parts = offsets * (offsets @ reference.precision.double().numpy())
    alone = np.isnan(offsets).any(axis=1)
    two = offsets[alone][:, -2:]
    parts[alone, -2:] = two * (two @ reference.whereabouts.precision.double().numpy())
    return parts, offsets


def shares(parts: Doubles) -> Doubles:
    """(M, K) of each row's sum, NaN where there is no part; to three digits, which is what they are worth and compresses."""
    total = np.nansum(parts, axis=1, keepdims=True)
    return np.round(parts / np.where(total > 0, total, np.nan), 3)


def main_parts(parts: Doubles) -> NDArray[np.bool_]:
    """(M, K) bool: of each row the largest positive parts that make MAIN of all positive ones."""
    positive = np.maximum(np.nan_to_num(parts), 0)
    order = np.argsort(-positive, axis=1, kind="stable")
    descending = np.take_along_axis(positive, order, axis=1)
    before = np.cumsum(descending, axis=1) - descending
    chosen = np.empty(parts.shape, bool)
    np.put_along_axis(chosen, order, (before < MAIN * positive.sum(axis=1, keepdims=True)) & (descending > 0), axis=1)
    return chosen


# ---------------------------------------------------------------- words


def in_words(parts: Doubles, offsets: Doubles) -> list[str]:
    """What the main parts (M, V + 2) of a distance say. There are few different texts, so each is made once."""
    with np.errstate(invalid="ignore"):
        directions = main_parts(parts) * np.where(offsets > 0, 2, 1)
    codes, which = np.unique(directions @ 3 ** np.arange(len(STATISTICS)), return_inverse=True)
    texts = [_sentence([int(code) // 3**place % 3 for place in range(len(STATISTICS))]) for code in codes]
    return [texts[number] for number in which.tolist()]


def _sentence(directions: Sequence[int]) -> str:
    """directions: of each statistic 0 = not named, 1 = lower than of clean images, 2 = higher."""
    named = dict(zip(STATISTICS, directions, strict=True))
    phrases = [
        f"{verb} {_listed([under for name, under in UNDER.items() if named[name] == direction])}"
        for direction, verb in ((1, STILL), (2, MOVED))
        if direction in [named[name] for name in UNDER]
    ]
    phrases += [words[named[name] - 1] for name, words in WHERE.items() if named[name]]
    return f"embedding {_listed(phrases)}" if phrases else PLAIN


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def without_p_values(words: str) -> str:
    """What is said of a sample, as it is said of others like it."""
    return re.sub(P_VALUE_TEXT, "", words)


def _with_p(words: Sequence[str], p: Doubles) -> list[str]:
    return [f"{text} (p {value:.2g})" for text, value in zip(words, p.tolist(), strict=True)]


def without_embeddings(reference: CleanReference) -> CleanReference:
    """What reasons need of it; the embeddings would travel to every worker."""
    return replace(reference, clean_embeddings=reference.clean_embeddings[:0])
