"""What attackers who know the detectors have left, over their weights: attack success x (1 - TPR at 1 % FPR), and accuracy lost.

A row proves something of what its attacker knows only if he does hide from it: of each kind of evidence that he knows, alone, TPR at
1 % FPR in a balanced pool is at most HIDDEN, and his attack still works.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipelines import page
from pipelines.benchmark_config import BenchmarkConfig
from pipelines.page import Row

BALANCED = 0.5
HIDDEN = 0.05
FAILED = 0.1  # attack success by chance among ten classes: whoever has less has given his attack up


def lines(config: BenchmarkConfig, rows: Sequence[Row]) -> list[Row]:
    """Rows of the benchmark as those of attackers. proof: "yes", "no" and why, or "" where the attacker knows of no evidence."""
    return [
        {
            "attacker": config.victims[row["attack"]].attacker or row["attack"],
            "weight": config.victims[row["attack"]].weight,
            "seed": row["seed"],
            **{name: row[name] for name in ("asr", "clean_accuracy", "backdoored_accuracy")},
            "evidence": row["detector"],
            "tpr_at_1pct": row["tpr_at_1pct"],
            "undetected_success": row["asr"] * (1 - row["tpr_at_1pct"]),
            "poison_rate": row["poison_rate"],
            "proof": proof(config, rows, row["attack"], row["seed"]),
        }
        for row in rows
    ]


def proof(config: BenchmarkConfig, rows: Sequence[Row], attack: str, seed: int) -> str:
    known = config.victims[attack].knows
    own = [r for r in rows if (r["attack"], r["seed"], r["poison_rate"]) == (attack, seed, BALANCED)]
    if not known or not own:
        return ""
    if own[0]["asr"] < FAILED:
        return "no: no attack left"
    seen = {r["detector"]: r["tpr_at_1pct"] for r in own if r["detector"] in known and r["tpr_at_1pct"] > HIDDEN}
    return f"no: {' '.join(f'{name} {tpr:.2f}' for name, tpr in seen.items())}" if seen else "yes"


def markdown(found: Sequence[Row]) -> str:
    """Undetected success in balanced pools, mean over seeds; a line for each attacker and weight, a column for each kind of evidence."""
    balanced = [row for row in found if row["poison_rate"] == BALANCED]
    kinds = list(dict.fromkeys(row["evidence"] for row in balanced))
    table = []
    for attacker, weight in dict.fromkeys((row["attacker"], row["weight"]) for row in balanced):
        own = [row for row in balanced if (row["attacker"], row["weight"]) == (attacker, weight)]
        left = [_mean([row["undetected_success"] for row in own if row["evidence"] == kind]) for kind in kinds]
        verdicts = "; ".join(dict.fromkeys(row["proof"] for row in own))
        table.append([attacker, weight, f"{-_lost(own):+.3f}", _mean([row["asr"] for row in own]), *left, verdicts])
    return page.table(["attacker", "weight", "accuracy", "success", *kinds, "proof"], table)


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" if values else "-"


def _lost(rows: Sequence[Row]) -> float:
    return float(np.mean([row["clean_accuracy"] - row["backdoored_accuracy"] for row in rows]))


def write_plot(path: Path, found: Sequence[Row]) -> None:
    """A panel for each kind of evidence: undetected success over accuracy lost, a line for each attacker through his weights; hollow
    where the row is no proof."""
    balanced = [row for row in found if row["poison_rate"] == BALANCED]
    kinds = list(dict.fromkeys(row["evidence"] for row in balanced))
    attackers = list(dict.fromkeys(row["attacker"] for row in balanced))
    columns = min(len(kinds), 3)
    figure = Figure(figsize=(4 * columns, 3.5 * -(-len(kinds) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(kinds) // columns), columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, kind in zip(panels, kinds, strict=False):
        for number, attacker in enumerate(attackers):
            own = [row for row in balanced if (row["evidence"], row["attacker"]) == (kind, attacker)]
            points = []
            for weight in dict.fromkeys(row["weight"] for row in own):
                rows = [row for row in own if row["weight"] == weight]
                undetected = float(np.mean([row["undetected_success"] for row in rows]))
                points.append((100 * _lost(rows), undetected, rows[0]["proof"].startswith("no")))
            colour = f"C{number}"
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, linewidth=0.8)
            for position, (x, y, hollow) in enumerate(points):
                label = {} if position else {"label": attacker}
                axes.plot(x, y, "o", color=colour, markerfacecolor="white" if hollow else colour, **label)
        axes.set(title=kind, xlabel="accuracy lost (points)", ylabel="undetected success")
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    panels[0].set_ylim(0, 1.05 * max(row["undetected_success"] for row in balanced))
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70, metadata={"Software": None})


def publish(config: BenchmarkConfig, rows: Sequence[Row], markdown_page: str) -> None:
    """The section of the page, and its plot beside it."""
    found = lines(config, rows)
    page.replace(markdown_page, config.section, markdown(found))
    write_plot(Path(markdown_page).parent / "plots" / "frontier_cpu.png", found)
