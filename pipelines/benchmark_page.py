"""What the documentation shows of the benchmark: tables between markers of a Markdown page, and plots beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from pipelines import page
from pipelines.page import Row

Pool = tuple[NDArray[np.float32], NDArray[np.bool_]]
BALANCED = 0.5


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


# ---------------------------------------------------------------- plots


def _panels(count: int, height: int) -> tuple[Figure, list[Axes]]:
    """Up to four in a row."""
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(4 * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def write_roc(path: Path, pools: Mapping[str, Mapping[str, Pool]]) -> None:
    """One panel for each attack: TPR over FPR (logarithmic) of every detector. pools: attack → detector → scores and truth."""
    figure, panels = _panels(len(pools), height=4)
    for axes, (attack, detectors) in zip(panels, pools.items(), strict=True):
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
    figure, panels = _panels(len(pools), height=3)
    for axes, (attack, (scores, truth)) in zip(panels, pools.items(), strict=True):
        bins: list[float] = np.geomspace(max(scores.min(), 0.1), scores.max(), 60).tolist()
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
