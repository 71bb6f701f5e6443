"""What the documentation shows of the benchmark: tables between markers of a Markdown page, and plots beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from pipelines import page
from pipelines.page import Row

Pool = tuple[NDArray[np.float32], NDArray[np.bool_]]
BALANCED = 0.5


def write_tables(
    markdown_page: str, rows: Sequence[Row], classes: Sequence[Row], clean: Sequence[Row], default: str
) -> None:
    for aux in dict.fromkeys(row["aux"] for row in rows):
        page.replace(markdown_page, f"balanced {aux}", summary(rows, aux))
    page.replace(markdown_page, "rates", by_rate(rows, default))
    page.replace(markdown_page, "false positives", false_positives(rows))
    page.replace(markdown_page, "classes", by_class(classes))
    page.replace(markdown_page, "clean scans", clean_scans(clean, default))


def summary(rows: Sequence[Row], aux: str) -> str:
    """Balanced pool of one auxiliary set: TPR at 1 % FPR / AUPRC, and the control; means over seeds (± half the range)."""
    rows = [row for row in rows if row["aux"] == aux and row["poison_rate"] == BALANCED]
    attacks, detectors = (list(dict.fromkeys(row[name] for row in rows)) for name in ("attack", "detector"))
    lines = [
        [name, *(_cell([r for r in rows if (r["detector"], r["attack"]) == (name, a)]) for a in attacks)]
        for name in detectors
    ]
    return page.table(["detector", *attacks], lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    tpr, auprc, control = (np.array([row[name] for row in rows]) for name in ("tpr_at_1pct", "auprc", "control_auroc"))
    spread = f" ± {np.ptp(tpr) / 2:.3f}" if len(rows) > 1 else ""
    return f"{tpr.mean():.3f}{spread} / {auprc.mean():.3f}, control {control.mean():.2f}"


def by_rate(rows: Sequence[Row], default: str) -> str:
    """The default detector at every poison rate; means over seeds."""
    names = ("auroc", "auprc", "tpr_at_0.1pct", "tpr_at_1pct")
    header = ["auxiliary", "attack", "poison rate", "AUROC", "AUPRC", "TPR at 0.1 %", "TPR at 1 %", "seeds"]
    lines = [
        [*key, *(f"{np.mean([row[name] for row in own]):.3f}" for name in names), len(own)]
        for key, own in _groups(rows, default, ("aux", "attack", "poison_rate"))
    ]
    return page.table(header, lines)


def false_positives(rows: Sequence[Row]) -> str:
    """Clean and triggered images above the calibrated threshold of nominal 1 %, in pools of 1 % poison."""
    lines = []
    for detector in dict.fromkeys(row["detector"] for row in rows if row["clean_flagged"] != ""):
        one_percent = [row for row in rows if row["poison_rate"] == 0.01]
        for key, own in _groups(one_percent, detector, ("aux", "attack")):
            flagged = np.array([row["clean_flagged"] for row in own])
            found = np.mean([row["triggered_flagged"] for row in own])
            spread = f"{flagged.min():.2%} to {flagged.max():.2%}"
            lines.append([detector, *key, f"{flagged.mean():.2%}", spread, f"{found:.1%}", len(own)])
    return page.table(
        ["detector", "auxiliary", "attack", "clean removed", "over seeds", "triggered removed", "seeds"], lines
    )


def _groups(rows: Sequence[Row], detector: str, names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["detector"] == detector:
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def clean_scans(rows: Sequence[Row], default: str) -> str:
    """What the default removes of pools without poison, by each policy: mean, range, and the interval of the worst scan."""
    lines = []
    for key, own in _groups(rows, default, ("aux", "attack", "encoder")):
        cells = []
        for policy in ("calibrated", "fdr"):
            scans = [row for row in own if row["policy"] == policy]
            worst = max(scans, key=lambda row: float(row["removed"]))
            cells.append(f"{np.mean([row['removed'] for row in scans]):.2%}")
            cells.append(f"{worst['removed']:.2%} ({worst['low']:.2%} to {worst['high']:.2%})")
        lines.append([*key, *cells, len(own) // 2])
    header = [
        "auxiliary",
        "attack",
        "encoder",
        "calibrated: removed",
        "worst scan (95 %)",
        "fdr: removed",
        "worst scan (95 %)",
        "seeds",
    ]
    return page.table(header, lines)


def by_class(classes: Sequence[Row]) -> str:
    """In distribution: TPR of each attack by true class of the triggered image, the target's apart."""
    rows = [row for row in classes if row["aux"] == classes[0]["aux"]]
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        target = next(row for row in own if row["is_target"])
        others = [row for row in own if not row["is_target"]]
        tpr, above = ([row[name] for row in others] for name in ("tpr", "clean_above"))
        lines.append(
            [
                attack,
                f"{min(tpr):.3f} to {max(tpr):.3f}",
                f"{min(above):.2%} to {max(above):.2%}",
                f"{target['tpr']:.3f}",
                f"{target['clean_above']:.2%}",
            ]
        )
    header = ["attack", "TPR, other classes", "clean above", "TPR, target class", "clean of the target class above"]
    return page.table(header, lines)


# ---------------------------------------------------------------- plots


def write_roc(path: Path, pools: Mapping[str, Mapping[str, Pool]]) -> None:
    """One panel for each attack: TPR over FPR (logarithmic) of every detector. pools: attack → detector → scores and truth."""
    figure = Figure(figsize=(4 * len(pools), 4), layout="constrained")
    for axes, (attack, detectors) in zip(np.atleast_1d(figure.subplots(1, len(pools))), pools.items(), strict=True):
        for name, (scores, truth) in detectors.items():
            fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
            axes.plot(np.maximum(fpr, 1e-4), tpr, label=name)
        axes.set(xscale="log", xlim=(5e-4, 1), ylim=(0, 1.02), title=attack, xlabel="false-positive rate")
        axes.axvline(0.01, color="0.8", linewidth=0.8)
    figure.axes[0].set_ylabel("true-positive rate")
    figure.axes[-1].legend(loc="lower right", fontsize=8)
    _save(figure, path)


def write_histograms(path: Path, pools: Mapping[str, Pool]) -> None:
    """One panel for each attack: scores of clean and of triggered images by the default detector."""
    figure = Figure(figsize=(4 * len(pools), 3), layout="constrained")
    for axes, (attack, (scores, truth)) in zip(
        np.atleast_1d(figure.subplots(1, len(pools))), pools.items(), strict=True
    ):
        bins = np.geomspace(max(scores.min(), 0.1), scores.max(), 60)
        axes.hist([scores[~truth], scores[truth]], bins, histtype="stepfilled", alpha=0.6, label=["clean", "triggered"])
        axes.set(xscale="log", title=attack, xlabel="score")
    figure.axes[-1].legend()
    _save(figure, path)


def write_cost(path: Path, rows: Sequence[Row], aux: str) -> None:
    """Mean TPR at 1 % FPR over attacks (bar: lowest to highest) against images a second, balanced pools of one auxiliary set."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    balanced = [row for row in rows if row["poison_rate"] == BALANCED and row["aux"] == aux]
    for number, detector in enumerate(dict.fromkeys(row["detector"] for row in balanced)):
        own = [row for row in balanced if row["detector"] == detector]
        attacks = dict.fromkeys(row["attack"] for row in own)
        means = [np.mean([row["tpr_at_1pct"] for row in own if row["attack"] == attack]) for attack in attacks]
        speed = float(np.exp(np.mean([np.log(max(row["images_per_second"], 1)) for row in own])))
        centre = float(np.mean(means))
        axes.errorbar(speed, centre, [[centre - min(means)], [max(means) - centre]], marker="o", capsize=2)
        axes.annotate(
            detector, (speed, centre), textcoords="offset points", xytext=(5, 4 - 9 * (number % 4)), fontsize=8
        )
    axes.set(xscale="log", xlabel="images a second, encoder included", ylabel="TPR at 1 % FPR", ylim=(-0.02, 1.05))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70, metadata={"Software": None})
