"""The public data sets of the configs as WebDataset shards, downloaded by torchvision.

    python -m benchmarks.make_shards runs/shards [--only cifar10-test] [--root downloads]

Writes <set>-000000.tar ...: 10,000 samples a shard, PNG and class index. Images are mixed over the classes by a fixed seed, so that
the first ones of a set are a random part. cifar100-ood: 100 images of each of CIFAR-100's classes, none of which CIFAR-10 has.
The figures in docs/ were measured on the same data sets in another order (7,000 images of cifar10-test): expect small differences.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torchvision import datasets

from pipelines.data import LabelledImages, write_shard

SHARD = 10_000  # samples
SIDE = 32  # pixels
Source = Callable[[str], Any]  # folder of downloads → a torchvision data set: len, and (PIL image, class) by number

SETS: dict[str, Source] = {
    "cifar10-train": lambda root: datasets.CIFAR10(root, train=True, download=True),
    "cifar10-test": lambda root: datasets.CIFAR10(root, train=False, download=True),
    "cifar100-ood": lambda root: datasets.CIFAR100(root, train=True, download=True),
    "gtsrb32": lambda root: datasets.GTSRB(root, split="train", download=True),
}
PER_CLASS = {"cifar100-ood": 100}


def chosen(source: Any, per_class: int) -> list[int]:
    """Numbers of the samples in the order of the shards; per_class: so many of each class, 0 = all."""
    order: list[int] = np.random.default_rng(0).permutation(len(source)).tolist()
    if not per_class:
        return order
    left: dict[int, int] = {}
    kept = []
    for number in order:
        label = int(source[number][1])
        left[label] = left.get(label, per_class) - 1
        kept += [number] if left[label] >= 0 else []
    return kept


def write_set(name: str, source: Any, out: Path) -> list[Path]:
    """The shards of one data set; those that are there already are left alone."""
    numbers, paths = chosen(source, PER_CLASS.get(name, 0)), []
    for begin in range(0, len(numbers), SHARD):
        path = out / f"{name}-{begin // SHARD:06d}.tar"
        paths.append(path)
        if path.exists():
            continue
        samples = [source[number] for number in numbers[begin : begin + SHARD]]
        pixels = [np.array(image.convert("RGB").resize((SIDE, SIDE))) for image, _ in samples]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        write_shard(path, LabelledImages(images, torch.tensor([int(label) for _, label in samples])))
    return paths


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--only", "names", multiple=True, type=click.Choice(list(SETS)), help="Default: all sets")
@click.option("--root", default="runs/downloads", show_default=True, help="Where torchvision keeps its downloads")
def main(out: Path, names: tuple[str, ...], root: str) -> None:
    """Download the data sets and write their shards to OUT."""
    for name in names or SETS:
        for path in write_set(name, SETS[name](root), out):
            click.echo(path)


if __name__ == "__main__":
    main()
