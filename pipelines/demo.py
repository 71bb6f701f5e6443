"""`make demo`: the main job end to end, on real images that come with scikit-learn. Writes demo/.

Handwritten digits become shards, a small encoder is pre-trained and backdoored, 2 % of the incoming samples get the
trigger; then the real commands fit, scan, audit and verify.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from pipelines.data import LabelledImages, write_shard
from sanitize.attacks.triggers import to_uint8

OUT = Path("demo")
CONFIG = "configs/demo_badencoder_digits.yaml"
AUXILIARY = 1000  # images to learn from; the other 797 are the incoming shards


def main() -> None:
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    write_shards()
    module("pipelines.red_team", CONFIG, "--zoo", "demo/zoo", "--out", "demo/victim")
    command("poison", "demo/incoming", "--rate", "0.02", "--set", "side=8", "--out", "demo/poisoned")
    # a thousand images are few: more epochs and smaller batches than the default, which is meant for ten thousand or more
    small = ("--set", "training.epochs=60", "--set", "training.batch_size=32")
    command("fit", "demo/aux", "--encoder", "demo/victim/backdoored/encoder.yaml", "--out", "demo/detector", *small)
    command("scan", "demo/poisoned", "--detector", "demo/detector", "--out", "demo/scanned")
    command("audit", "demo/scanned", "--truth", "demo/poisoned/poison.json")
    command("verify", "demo/scanned")
    print(
        f"""
Done in {time.monotonic() - start:.0f} s. Look at
  demo/scanned/audit/report.html      what was flagged, with images
  demo/scanned/clean                  shards that are safe to train on
  demo/scanned/scores                 one Parquet row per sample
  demo/detector/reconstructions.png   what the decoder sees
On your own shards: describe your encoder with `sanitize init`, then
  sanitize fit  AUX_SHARDS/  --encoder encoder.yaml
  sanitize scan SHARDS/"""
    )


def write_shards(size: int = 500) -> None:
    """demo/aux and demo/incoming: 8 x 8 digits shown at 32 x 32, PNG and class index, `size` samples a shard."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    shown = functional.interpolate(small, (32, 32), mode="bicubic", align_corners=False)
    pixels, labels = to_uint8(shown).expand(-1, 3, -1, -1), torch.from_numpy(digits.target)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    for name, chosen in (("aux", order[:AUXILIARY]), ("incoming", order[AUXILIARY:])):
        for number, part in enumerate(chosen.split(size)):
            write_shard(OUT / name / f"digits-{number:04d}.tar", LabelledImages(pixels[part], labels[part]))
    print(f"wrote demo/aux ({AUXILIARY} digits) and demo/incoming ({len(pixels) - AUXILIARY})", flush=True)


def command(*arguments: str) -> None:
    print(f"\n$ sanitize {' '.join(arguments)}", flush=True)
    run("sanitize.cli", *arguments)


def module(name: str, *arguments: str) -> None:
    print(f"\n$ python -m {name} {' '.join(arguments)}", flush=True)
    run(name, *arguments)


def run(name: str, *arguments: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", name, *arguments], env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False
    )
    if finished.returncode:
        raise SystemExit(f"that command failed with exit code {finished.returncode}")


if __name__ == "__main__":
    main()
