"""Scores → the geometry of a histogram: bars of kept and removed samples, and curves to compare them with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
WIDTH, HEIGHT, LEFT, BOTTOM, BINS = 900, 300, 46, 28, 72
FURTHEST = 1.6  # of the 99.9 % quantile: higher scores share the last bar


def histogram(
    scores: Floats, removed: NDArray[np.bool_], cut: float | None, calibration: Floats | None, before: Floats | None
) -> dict[str, Any]:
    """Values for `parts.histogram`. scores (N,) finite, removed (N,); calibration: of clean images, scaled to as many samples;
    before: the same samples' scores before they were adapted."""
    low, high = _range(scores, cut)
    edges = np.linspace(low, high, BINS + 1)
    kept, gone = (_counts(part, edges) for part in (scores[~removed], scores[removed]))
    curves = [("calibration", calibration, len(scores) / max(len(calibration), 1))] if calibration is not None else []
    if before is not None:
        curves.append(("before", before, 1.0))
    counts = [(kind, _counts(values, edges) * factor) for kind, values, factor in curves]
    most = max(float((kept + gone).max()), *(float(values.max()) for _, values in counts), 10.0)
    finite_cut = cut is not None and np.isfinite(cut)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "base": HEIGHT - BOTTOM,
        "bars": _bars(kept, gone, edges, most),
        "lines": [{"kind": kind, "points": _points(values, most)} for kind, values in counts],
        "cut": round(_x((cut - low) / (high - low)), 1) if finite_cut and cut is not None else None,
        "cut_text": f"cut {cut:.4g}" if finite_cut else "",
        "count_ticks": [
            {"at": round(_y(10.0**n, most), 1), "text": f"{10**n:,}"} for n in range(int(np.log10(most)) + 1)
        ],
        "score_ticks": [
            {"at": round(_x(share), 1), "text": f"{low + share * (high - low):.3g}{'+' if share == 1 else ''}"}
            for share in (0.0, 0.2, 0.4, 0.6, 0.8, 0.97)
        ],
        "legend": _legend(len(scores), int(removed.sum()), [kind for kind, _ in counts]),
        "text": f"Histogram of {len(scores)} scores, {int(removed.sum())} of them removed",
    }


def _range(scores: Floats, cut: float | None) -> tuple[float, float]:
    low, high = float(scores.min()), float(np.quantile(scores, 0.999)) * FURTHEST
    high = min(max(high, cut * 1.2 if cut is not None and np.isfinite(cut) else high), float(scores.max()))
    if cut is not None and np.isfinite(cut):
        high = max(high, cut)
    return low, max(high, low + 1e-6)


def _counts(values: Floats, edges: Floats) -> Floats:
    """(BINS,); what lies outside counts in the first and last bin."""
    counts: Floats = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].astype(np.float64)
    return counts


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT)


def _y(count: float, most: float) -> float:
    """One sample stands a little above the base: log(1 + n)."""
    base = HEIGHT - BOTTOM
    return base - (base - 12) * float(np.log1p(count) / np.log1p(most))


def _bars(kept: Floats, gone: Floats, edges: Floats, most: float) -> list[dict[str, Any]]:
    """The removed part of a bar stands on its kept part."""
    bars, width = [], (WIDTH - LEFT) / BINS
    for number, (below, above) in enumerate(zip(kept.tolist(), gone.tolist(), strict=True)):
        text = f"{edges[number]:.4g} to {edges[number + 1]:.4g}: {below:.0f} kept, {above:.0f} removed"
        for kind, bottom, top in (("kept", 0.0, below), ("removed", below, below + above)):
            if top > bottom:
                y, base = _y(top, most), _y(bottom, most)
                bar = {
                    "kind": kind,
                    "x": _x(number / BINS),
                    "y": y,
                    "width": width - 1,
                    "height": base - y,
                    "text": text,
                }
                bars.append({key: round(value, 1) if isinstance(value, float) else value for key, value in bar.items()})
    return bars


def _points(counts: Floats, most: float) -> str:
    places = ((_x((number + 0.5) / BINS), _y(count, most)) for number, count in enumerate(counts.tolist()))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _legend(samples: int, removed: int, curves: list[str]) -> list[tuple[str, str]]:
    names = {
        "calibration": "what clean auxiliary images scored, as if there were as many",
        "before": "before the scores were adapted to this scan",
    }
    return [("kept", f"kept ({samples - removed:,})"), ("removed", f"removed ({removed:,})")] + [
        (kind, names[kind]) for kind in curves
    ]
