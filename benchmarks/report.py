"""What the report of `sanitize audit` costs: seconds to make, size, and until it can be used in a browser, by flagged samples.

python -m benchmarks.report SHARDS [--samples 100 1000 10000]

SHARDS are scanned by a small encoder and everything is flagged, so that the page holds as many samples as it is asked for. Opened
from disk in the chromium of the system, without sandbox or GPU: the slowest way there is.
"""

import argparse
import resource
import shutil
import time
from pathlib import Path

from benchmarks.many_shards import SPEC
from benchmarks.scan import detector_for
from benchmarks.scan_rate import OUT
from sanitize.commands.audit import audit
from sanitize.commands.scan import scan
from sanitize.config import ScanConfig, ThresholdPolicy

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
REPEATS = 3


def scanned(shards: str) -> str:
    """A scan of all samples, nearly all of them removed; effort: as little as there is, the report does not depend on it."""
    out = OUT / "report"
    config = ScanConfig(
        shards=(shards,),
        detector=str(detector_for(SPEC, "encoder-memory")),
        out=str(out),
        policy=ThresholdPolicy("fraction", fraction=0.999),
        effort="0.01",
        force=True,
        workers=0,
    )
    scan(config)
    return str(out)


def seconds_to_open(page: Path) -> list[float]:
    """Until the page says it is ready, each time in a new browser."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as started:
        for _ in range(REPEATS):
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            tab = browser.new_page()
            start = time.monotonic()
            tab.goto(page.resolve().as_uri())
            tab.wait_for_selector("html[data-ready]")
            found.append(time.monotonic() - start)
            browser.close()
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 1000, 10_000])
    options = parser.parse_args()
    out = scanned(options.shards)
    print("| flagged | audit, seconds | page, MB | opens in, seconds (median of 3, worst) | peak memory so far, GiB |")
    print("| --- | --- | --- | --- | --- |")
    for count in options.samples:
        start = time.monotonic()
        page = Path(audit(out, top=count).report)
        seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        opened = seconds_to_open(page)
        size = page.stat().st_size / 1e6
        print(
            f"| {count:,} | {seconds:.0f} | {size:.1f} | {opened[len(opened) // 2]:.2f}, {opened[-1]:.2f} | {peak:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
