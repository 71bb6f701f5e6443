"""`make demo`: the main job end to end, on real images that come with scikit-learn. Writes demo/.

Handwritten digits become shards, a small encoder is pre-trained and backdoored, 2 % of the incoming samples get the
trigger; then the real commands fit, scan, audit and verify.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

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
  demo/scanned/audit/report.html      what was flagged, with pictures
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
    pixels = (digits.images / 16 * 255).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    for name, chosen in (("aux", order[:AUXILIARY]), ("incoming", order[AUXILIARY:])):
        folder = OUT / name
        folder.mkdir(parents=True)
        for begin in range(0, len(chosen), size):
            write_shard(folder / f"digits-{begin // size:04d}.tar", chosen[begin : begin + size], pixels, digits.target)
    print(f"wrote demo/aux ({AUXILIARY} digits) and demo/incoming ({len(pixels) - AUXILIARY})", flush=True)


def write_shard(path: Path, chosen: np.ndarray, pixels: np.ndarray, classes: np.ndarray) -> None:
    with tarfile.open(path, "w") as tar:
        for number in chosen.tolist():
            picture = Image.fromarray(pixels[number]).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            for extension, data in (("cls", str(classes[number]).encode()), ("png", buffer.getvalue())):
                info = tarfile.TarInfo(f"digit-{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


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
