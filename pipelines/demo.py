"""`make demo`: the main job end to end, on real images that come with scikit-learn. Writes demo/.

Handwritten digits become shards, 2 % of the incoming samples get the trigger, a small encoder is pre-trained and
backdoored; then the real commands fit, scan, audit and verify. All of it in this process and one Ray session: a
process of its own for each command takes longer to start than most of them to run.
"""

import shutil
import time
from pathlib import Path

import click
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from pipelines import red_team
from pipelines.data import LabelledImages, write_shard
from sanitize import cli, process, runtime
from sanitize.attacks.triggers import to_uint8

OUT = Path("demo")
CONFIG = "configs/demo_badencoder_digits.yaml"
AUXILIARY = 1000  # images to learn from; the other 797 are the incoming shards
ENCODER = "demo/victim/backdoored/encoder.yaml"


def main() -> None:
    process.prepare()
    torch.set_num_threads(process.usable_cpus())
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    write_shards()
    command("poison", "demo/incoming", "--rate", "0.02", "--set", "side=8", "--out", "demo/poisoned")
    announce(start, "pre-train a small encoder and backdoor it", 70)
    run("python -m pipelines.red_team", red_team.main, CONFIG, "--zoo", "demo/zoo", "--out", "demo/victim")
    announce(start, "start Ray, learn what clean images look like to the backdoored encoder", 60)
    with runtime.ray_session(""):
        # a thousand images are few: smaller batches than the default, which is meant for ten thousand or more
        small = ("--set", "training.epochs=10", "--set", "training.batch_size=32")
        command("fit", "demo/aux", "--encoder", ENCODER, "--out", "demo/detector", *small)
        announce(start, "score every incoming sample, split the shards, report", 15)
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


def announce(start: float, what: str, seconds: int) -> None:
    """seconds: measured on two quiet cores of an Intel Xeon of 2.8 GHz, in fp32; native bf16 takes less"""
    print(f"\n--- {time.monotonic() - start:.0f} s: {what}, about {seconds} s", flush=True)


def command(*arguments: str) -> None:
    run("sanitize", cli.main, *arguments)


def run(name: str, program: click.Command, *arguments: str) -> None:
    print(f"\n$ {name} {' '.join(arguments)}", flush=True)
    if code := program.main(arguments, standalone_mode=False):
        raise SystemExit(f"that command failed with exit code {code}")


if __name__ == "__main__":
    main()
