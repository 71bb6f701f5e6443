"""Settings of the detection benchmark."""

from dataclasses import dataclass, field
from typing import Any

from sanitize.config import perturbed_share
from sanitize.detectors import check_detector
from sanitize.errors import check
from sanitize.stages.evidence import KINDS
from sanitize.stages.score_table import STATISTICS
from sanitize.stages.scoring import SCORERS


@dataclass(frozen=True)
class VictimConfig:
    """config: a red-team YAML, overlaid with `settings`; or folder: of an imported victim (import_victim.py). test, auxiliary:
    shards; "shapes" in place of a path means procedural images. first_seed_only: auxiliary sets that are measured with the first
    seed only. attacker, weight, knows: what the victim is in a study of attackers (frontier.py): who made it, how much he weighs hiding,
    and the detectors that he hides from."""

    test: str
    auxiliary: dict[str, str]
    config: str = ""
    folder: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    first_seed_only: tuple[str, ...] = ()
    attacker: str = ""
    weight: float = 0.0
    knows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(bool(self.config) != bool(self.folder), "give either `config`, a red-team YAML, or `folder`, not both.")
        check(not (self.folder and self.settings), "settings: means nothing for an imported victim. Remove it.")


@dataclass(frozen=True)
class Only:
    """Where an expensive detector runs; empty = everywhere."""

    attacks: tuple[str, ...] = ()
    aux: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def allows(self, attack: str, aux: str, seed: int) -> bool:
        pairs: tuple[tuple[tuple[Any, ...], Any], ...] = ((self.attacks, attack), (self.aux, aux), (self.seeds, seed))
        return all(not allowed or value in allowed for allowed, value in pairs)


@dataclass(frozen=True)
class DetectorConfig:
    """A scorer of the product (`scorer`), or a baseline of sanitize/detectors (`detector`).

    Of a scorer: effort as in a scan; column: the statistic that is measured; adapt, agreement: as pass 2 does, to every pool; kinds: of
    evidence that are combined, instead of all (thorough); preset and fit: settings of FitConfig.
    Of a baseline: settings: its own; other: red-team YAML whose clean encoder is its independent encoder; each_pool: it judges
    images by each other, so every pool is scored by itself; fit_on_pool: it is fitted on the pool instead of the auxiliary set.
    """

    scorer: str = ""
    effort: str = "thorough"
    column: str = "score"
    adapt: bool = False
    agreement: bool = False
    kinds: tuple[str, ...] = ()
    preset: str = "default"
    fit: dict[str, Any] = field(default_factory=dict)
    detector: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    other: str = ""
    each_pool: bool = False
    fit_on_pool: bool = False
    only: Only = field(default_factory=Only)

    def __post_init__(self) -> None:
        check(bool(self.scorer) != bool(self.detector), "give either `scorer` or `detector`, not both.")
        if self.detector:
            check_detector(self.detector, self.settings | ({"other": None} if self.other else {}))
            idle = [n for n in ("adapt", "agreement", "kinds", "fit") if getattr(self, n)] + ["effort"] * (
                self.effort != "thorough"
            )
        else:
            check(self.scorer in SCORERS, f"scorer: {self.scorer!r} is not one of {', '.join(SCORERS)}.")
            check(self.column in STATISTICS, f"column: {self.column!r} is not one of {', '.join(STATISTICS)}.")
            perturbed_share(self.effort)
            known = self.scorer == "evidence" and self.effort == "thorough" and set(self.kinds) <= set(KINDS)
            check(not self.kinds or known, f"kinds: of the scorer evidence, thorough, some of {', '.join(KINDS)}.")
            idle = [n for n in ("settings", "other", "each_pool", "fit_on_pool") if getattr(self, n)]
        kind = "baseline" if self.detector else "scorer"
        check(not idle, f"{', '.join(idle)}: means nothing for the {kind} {self.detector or self.scorer}. Remove it.")

    @property
    def has_threshold(self) -> bool:
        """Scorers of the product have one for their score; baselines and other columns have none."""
        return bool(self.scorer) and self.column == "score"


@dataclass(frozen=True)
class BenchmarkConfig:
    """victims, detectors: by the name they have in the table; default: the detector of the product

    poisoned_auxiliary: share of triggered images in the extra auxiliary set "poisoned", made from the first; 0 = none
    seeds: of the fit, the calibration split and the draw of the pools
    curves: detectors whose ROC curves are plotted beside the default's
    section: of a smaller study: the only part of the page that it writes; frontier: its tables and plot are those of frontier.py
    """

    out: str
    table: str
    zoo: str
    preset: str
    default: str
    victims: dict[str, VictimConfig]
    detectors: dict[str, DetectorConfig]
    rates: tuple[float, ...] = (0.001, 0.01, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2)
    auxiliary_images: int = 8000
    test_images: int = 0
    poisoned_auxiliary: float = 0.01
    fit: dict[str, Any] = field(default_factory=dict)
    curves: tuple[str, ...] = ()
    section: str = ""
    frontier: bool = False

    def __post_init__(self) -> None:
        for name in (self.default, *self.curves):
            check(name in self.detectors, f"{name!r} is not among the detectors.")
        for victim, values in self.victims.items():
            unknown = [name for name in values.knows if name not in self.detectors]
            check(not unknown, f"victims.{victim}.knows: {', '.join(unknown)}: not among the detectors.")
