"""Throughput of full fine-tuning in `sanitize finetune` beside a plain loop over the same shards, measured in the same run.

    python -m benchmarks.finetune [--count 1024] [--size 64] [--rounds 3]

plain loop: one process, tarfile + Pillow + torch, one image after the other, no shuffling, no checkpoint: the same encoder,
batch, optimiser and precision. finetune: the command's function, whole epochs with its shuffling, decoding threads and
checkpoint; speed of the last of two epochs, as it stands in metrics.jsonl, so that start-up is not in it. Rounds take turns.
"""

import io
import shutil
import statistics
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from benchmarks.data import write_shards
from sanitize import runtime
from sanitize.commands.finetune import finetune
from sanitize.config import EncoderSpec, FinetuneConfig
from sanitize.process import prepare, usable_cpus
from sanitize.stages.encoders import build_backbone

OUT = Path("runs/bench")
BATCH, CLASSES = 64, 10


def encoder_of(size: int) -> EncoderSpec:
    """ResNet-18 with random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    weights = OUT / "finetune.safetensors"
    spec = EncoderSpec("resnet18", str(weights), size)
    safetensors.torch.save_file({k: v.contiguous() for k, v in build_backbone(spec).state_dict().items()}, weights)
    return spec


def samples(shards: Path) -> Iterator[tuple[torch.Tensor, int]]:
    """((3, H, W) uint8, label) of every sample; the label follows the image."""
    pixels = torch.empty(0)
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".cls"):
                    yield pixels, int(data)
                else:
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)


def plain_loop(spec: EncoderSpec, shards: Path, count: int) -> float:
    """Images/s of the second epoch."""
    backbone = build_backbone(spec).eval().to(memory_format=torch.channels_last)
    model = torch.nn.Sequential(backbone, torch.nn.Linear(512, CLASSES))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    for _ in range(2):
        start, batch = time.perf_counter(), []
        for number, sample in enumerate(samples(shards)):
            batch.append(sample)
            if len(batch) == BATCH or number == count - 1:
                images = (torch.stack([pixels for pixels, _ in batch]).float() / 255 - mean) / std
                logits = model(images.contiguous(memory_format=torch.channels_last))
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in batch]))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                batch = []
    return count / (time.perf_counter() - start)


def ours(spec: EncoderSpec, shards: Path, workers: int, cores: int) -> float:
    """Images/s of the second epoch."""
    out = OUT / "finetuned"
    shutil.rmtree(out, ignore_errors=True)
    config = FinetuneConfig(
        (str(shards),),
        spec,
        str(out),
        mode="full",
        epochs=2,
        batch_size=BATCH,
        precision="fp32",
        workers=workers,
        cpus_per_worker=cores,
    )
    return finetune(config).epochs[-1]["samples_per_second"]


@click.command()
@click.option("--count", default=1024, show_default=True, help="JPEGs, over 4 shards")
@click.option("--size", default=64, show_default=True, help="Their side in pixels")
@click.option("--rounds", default=3, show_default=True)
def main(count: int, size: int, rounds: int) -> None:
    """Print images/s of full fine-tuning and of the plain loop."""
    cores = usable_cpus()
    torch.set_num_threads(cores)
    shards = write_shards(OUT / f"labelled-{size}-{count}", count, size, "JPEG", 4, classes=CLASSES)
    spec = encoder_of(size)
    rates: dict[str, list[float]] = {"plain loop": [], "finetune, this process": [], "finetune, 1 Ray worker": []}
    prepare()
    with runtime.ray_session(""):
        for _ in range(rounds):
            rates["plain loop"].append(plain_loop(spec, shards, count))
            rates["finetune, this process"].append(ours(spec, shards, 0, cores))
            rates["finetune, 1 Ray worker"].append(ours(spec, shards, 1, cores))
            print("  ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()), flush=True)
    base = statistics.median(rates["plain loop"])
    print(
        f"\nfull fine-tuning, ResNet-18, {count} JPEGs of {size} px, batch {BATCH}, fp32, {cores} core(s), median of {rounds}"
    )
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:26s} {median:8.1f} images/s = {median / base:.0%} of the plain loop")


if __name__ == "__main__":
    main()
