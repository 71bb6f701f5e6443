"""The stages of a scan beside their bounds on whatever device there is, without Ray: at most 9 minutes on one GPU.

    python -m benchmarks.gpu [--images 4096] [--encoders ResNet-18,ViT-B/32,ViT-L/14]

224 px JPEGs, encoders with random weights, batches of 256. decode only: read, hash and decode on all cores. resize + transfer: images in
memory to the device, of one size and of many. encoder only: forward passes of images that are on the device. scorer: what a scan does with
images in memory; its overhead is what it takes beyond the encoder's passes. scan: the whole command in this process.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import torch
from torch import nn

from benchmarks.data import MIXED, write_shards
from benchmarks.scan import all_images, decode_only, detector_for
from benchmarks.scan_rate import BATCH, OUT, scan_rate
from sanitize import runtime
from sanitize.artifacts.detector_folder import load_detector, load_matching_encoder, make_scorer
from sanitize.config import EncoderSpec
from sanitize.process import prepare, usable_cpus
from sanitize.stages.clip import VisionTransformer
from sanitize.stages.images import to_batch
from sanitize.stages.perturbations import encoder_passes
from sanitize.stages.precision import autocast

SIDE = 224
CLIPS = {"ViT-B/32": (768, 32, 12, 512), "ViT-L/14": (1024, 14, 24, 768)}  # width, patch, layers, embedding
ENCODERS = ("ResNet-18", *CLIPS)
REPEATS = 3


def encoder_spec(name: str) -> EncoderSpec:
    """Of an encoder with random weights."""
    if name not in CLIPS:
        return EncoderSpec(name.lower().replace("-", ""))
    path = OUT / f"{name.replace('/', '-')}.safetensors"
    if not path.exists():
        width, patch, layers, size = CLIPS[name]
        torch.manual_seed(0)
        tower = VisionTransformer(width, patch, SIDE // patch, layers, size, nn.GELU())
        nn.init.normal_(tower.proj, std=width**-0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"visual.{key}": value.contiguous() for key, value in tower.state_dict().items()}
        safetensors.torch.save_file(tensors, path)
    return EncoderSpec("clip", weights=str(path))


def rate(count: int, device: torch.device, function: Callable[[], object]) -> float:
    """Images a second, the best of REPEATS after one that does not count."""
    best = 0.0
    for repeat in range(REPEATS + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, count / (time.perf_counter() - start) if repeat else 0.0)
    return best


@contextmanager
def utilisation(device: torch.device) -> Iterator[list[int]]:
    """Per cent at which the GPU was busy, twice a second; empty without one. Filled when the block ends."""
    busy: list[int] = []
    if device.type != "cuda":
        yield busy
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            yield busy
        finally:
            watcher.terminate()
            busy += [int(line) for line in watcher.communicate()[0].split() if line.isdigit()]


def tell(label: str, images_per_second: float, note: str = "") -> None:
    print(f"  {label:38s} {images_per_second:9.1f} images/s{'  ' + note if note else ''}", flush=True)


def measure(name: str, shards: Path, count: int, device: torch.device) -> None:
    start = time.monotonic()
    detector = detector_for(encoder_spec(name), f"gpu-{name.replace('/', '-')}")
    loaded = load_detector(str(detector))
    scorer = make_scorer(loaded, load_matching_encoder(loaded, None), "auto", device, effort="0.075")
    print(f"\n{name}: fit of 640 images {time.monotonic() - start:.0f} s (0 where it was there), {scorer.dtype}")
    decoded = all_images(shards, 4 * BATCH)
    batches = [decoded[i : i + BATCH] for i in range(0, len(decoded), BATCH)]
    on_device = [scorer.embed(batch)[0] for batch in batches]
    passes = float(np.mean([encoder_passes(scorer(batch)) for batch in batches]))

    def encode() -> None:
        with torch.inference_mode(), autocast(device, scorer.dtype):
            for images in on_device:
                scorer.encoder(images)

    encoder = rate(len(decoded), device, encode)
    score = rate(len(decoded), device, lambda: [scorer(batch) for batch in batches])
    tell("encoder only, one pass", encoder)
    tell(f"scorer, {passes:.2f} passes", score, f"{encoder / score / passes - 1:.0%} more than its passes")
    with utilisation(device) as busy:
        scan, startup, _ = scan_rate(shards, detector, 0, count, "0.075")
    note = f"{scan / score:.0%} of the scorer, start-up {startup:.1f} s"
    if busy:
        note += f", GPU busy {np.median(busy):.0f} % (median)"
    tell("sanitize scan, this process", scan, note)
    if device.type == "cuda":
        print(f"  most GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()


@click.command()
@click.option("--images", default=4096, show_default=True, help="JPEGs that are decoded and scanned")
@click.option("--encoders", default=",".join(ENCODERS), show_default=True)
def main(images: int, encoders: str) -> None:
    """Print images/s of every stage."""
    prepare()
    device = runtime.device()
    what = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{what}, {usable_cpus()} cores, torch {torch.__version__}")
    shards = write_shards(OUT / f"shards-{SIDE}-{images}", images, SIDE, "JPEG", 4)
    mixed = write_shards(OUT / f"mixed-{images}", min(images, 4 * BATCH), MIXED, "JPEG", 1)
    tell("decode only, all cores", rate(images, torch.device("cpu"), lambda: decode_only(shards)))
    for title, folder in ("one size", shards), ("sides of 100 to 500 px", mixed):
        pixels = [image.pixels for image in all_images(folder, BATCH) if image.pixels is not None]
        moved = rate(len(pixels), device, lambda pixels=pixels: to_batch(pixels, SIDE, "squash", device))  # type: ignore[misc]
        tell(f"resize + transfer, {title}", moved)
    for name in encoders.split(","):
        measure(name, shards, images, device)


if __name__ == "__main__":
    main()
