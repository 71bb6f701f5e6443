"""Ends or fails a command at a seeded point, runs the same command again, and compares every byte with an undisturbed run.

    python tests/faults/runner.py FOLDER DETECTOR ENCODER --points 200 --seed 0

A process of its own that never starts Ray or a thread before it forks: each fault happens in a child, so that SIGKILL is real and a
point costs a fraction of a second. Prints one JSON line a point, then a table of faults x commands x outcomes.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from sanitize.commands.clean import clean
from sanitize.commands.fit import fit
from sanitize.commands.pack import pack
from sanitize.commands.review import review
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import FitConfig, ScanConfig, ThresholdPolicy, TrainingConfig
from sanitize.config_loading import load_encoder_spec
from sanitize.config_models import DecoderConfig
from sanitize.errors import SanitizeError

sys.path.insert(0, str(Path(__file__).parents[1]))
from builders import tree_bytes

# where a fault can happen: before or after every call of these
POINTS = ("open", "fsync", "replace", "unlink")
FAULTS = ("kill before", "kill after", "no space", "input/output error")
ERRORS = {"no space": errno.ENOSPC, "input/output error": errno.EIO}


class Plan:
    """Counts the calls of each point; at the `number`-th of `point`, `fault` happens."""

    def __init__(self, folder: Path, point: str = "", number: int = -1, fault: str = "") -> None:
        """folder: calls on paths elsewhere (what libraries read) do not count."""
        self.folder, self.point, self.number, self.fault = folder, point, number, fault
        self.calls: Counter[str] = Counter()

    def around(self, point: str, function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            if isinstance(arguments[0], Path) and not arguments[0].is_relative_to(self.folder):
                return function(*arguments, **options)
            self.calls[point] += 1
            here = point == self.point and self.calls[point] == self.number
            if here and self.fault == "kill before":
                os.kill(os.getpid(), signal.SIGKILL)
            if here and self.fault in ERRORS:
                raise OSError(ERRORS[self.fault], self.fault)
            result = function(*arguments, **options)
            if here and self.fault == "kill after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def install(self) -> None:
        os.fsync = self.around("fsync", os.fsync)
        Path.replace = self.around("replace", Path.replace)  # type: ignore[method-assign]
        Path.unlink = self.around("unlink", Path.unlink)  # type: ignore[method-assign]
        Path.open = self.around("open", Path.open)  # type: ignore[method-assign]


def in_child(command: Callable[[], None], plan: Plan) -> tuple[str, Counter[str]]:
    """(outcome, calls of each point when it ended by itself): done, refused (our error), killed, or a traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 0
        try:
            plan.install()
            command()
        except SanitizeError:
            code = 2
        except BaseException:
            traceback.print_exc()
            code = 99
        os.write(writer, json.dumps(plan.calls).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        calls = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    outcomes = {0: "done", 2: "refused in words", 99: "traceback", -signal.SIGKILL: "killed"}
    return outcomes.get(status, f"status {status}"), Counter(json.loads(calls)) if calls else Counter()


class Commands:
    """What is disturbed. Each begins in the folder that `prepare` leaves, and ends in `out`."""

    def __init__(self, folder: Path, detector: str, encoder: str) -> None:
        self.folder, self.detector, self.encoder = folder, detector, encoder

    def scan(self, out: Path) -> None:
        policy = ThresholdPolicy("fraction", fraction=0.2)
        scan(self._config(out, policy=policy))

    def clean(self, out: Path) -> None:
        clean(str(out), ThresholdPolicy("fraction", fraction=0.4))

    def review(self, out: Path) -> None:
        review(str(out), remove=self.folder / "keys.txt", by="Ada", when="2026-01-02T03:04:05+00:00")

    def append(self, out: Path) -> None:
        scan(self._config(out, policy=ThresholdPolicy("fraction", fraction=0.2), append=True))

    def repair(self, out: Path) -> None:
        verify(str(out), repair=True)
        self.scan(out)

    def fit(self, out: Path) -> None:
        decoder = DecoderConfig(image_size=8, patch_size=4, width=16, heads=2, encoder_depth=1, decoder_depth=1)
        training = TrainingConfig(epochs=2, batch_size=32, precision="fp32", calibration_fraction=0.5)
        shards, spec = (str(self.folder / "aux"),), load_encoder_spec(self.encoder)
        fit(FitConfig(shards, spec, str(out), decoder=decoder, training=training, workers=0, cpus_per_worker=1))

    def pack(self, out: Path) -> None:
        pack(str(self.folder / "photos"), str(out), shard_size=4)

    def prepare(self, name: str, out: Path) -> None:
        if name in ("clean", "repair", "review"):
            self.scan(out)
        (self.folder / "keys.txt").write_text("s000001\ns000011\n")
        if name == "repair":
            for path in (*(out / "clean").glob("*0.tar"), *(out / "scores").glob("*2.parquet")):
                path.write_bytes(path.read_bytes()[:-7] + b"damaged")
        if name == "append":
            scan(self._config(out, policy=ThresholdPolicy("fraction", fraction=0.2), limit=1))

    def holds(self, name: str, out: Path) -> bool:
        return name in ("fit", "pack") or verify(str(out)).problems == ()

    def _config(self, out: Path, **changes) -> ScanConfig:
        return ScanConfig(
            (str(self.folder / "in"),),
            self.detector,
            str(out),
            precision="fp32",
            batch_size=8,
            workers=0,
            cpus_per_worker=1,
            **changes,
        )


def run(commands: Commands, names: list[str], points: int, seed: int) -> list[dict]:
    rng, results = random.Random(seed), []
    prepared, whole, calls = {}, {}, {}
    for name in names:
        start, out = commands.folder / f"{name}-start", commands.folder / f"{name}-out"
        assert in_child(lambda: commands.prepare(name, start), Plan(commands.folder))[0] == "done"  # noqa: B023
        prepared[name] = start
        begin(start, out)
        outcome, calls[name] = in_child(lambda: getattr(commands, name)(out), Plan(commands.folder))  # noqa: B023
        assert outcome == "done", outcome
        whole[name] = tree_bytes(out)
    for _ in range(points):
        name, fault = rng.choice(names), rng.choice(FAULTS)
        point = rng.choice([p for p in POINTS if calls[name][p]])
        number = rng.randint(1, calls[name][point])
        out = commands.folder / f"{name}-out"
        begin(prepared[name], out)
        first, _ = in_child(lambda: getattr(commands, name)(out), Plan(commands.folder, point, number, fault))  # noqa: B023
        second, _ = in_child(lambda: getattr(commands, name)(out), Plan(commands.folder))  # noqa: B023
        same = tree_bytes(out) == whole[name]
        results.append(
            {
                "command": name,
                "fault": fault,
                "point": f"{point} {number}",
                "first": first,
                "second": second,
                "same": same,
                "verified": commands.holds(name, out),
            }
        )
    return results


def begin(start: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if start.exists():
        shutil.copytree(start, out)


def table(results: list[dict]) -> str:
    """faults x commands: points, and how many ended byte-identical and verified."""
    lines = ["| command | fault | points | ended by the fault | same bytes after the same command | verified |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for command, fault in sorted({(r["command"], r["fault"]) for r in results}):
        own = [r for r in results if (r["command"], r["fault"]) == (command, fault)]
        ended = sum(r["first"] != "done" for r in own)
        same, verified = sum(r["same"] for r in own), sum(r["verified"] for r in own)
        lines.append(f"| {command} | {fault} | {len(own)} | {ended} | {same} | {verified} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("detector")
    parser.add_argument("encoder")
    parser.add_argument("--commands", nargs="+", default=["scan", "clean", "fit"])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    commands = Commands(options.folder, options.detector, options.encoder)
    results = run(commands, options.commands, options.points, options.seed)
    for result in results:
        print(json.dumps(result))
    print(table(results))


if __name__ == "__main__":
    main()
