"""Does a benign change trigger the backdoor? Then the predictor of `evidence`, which asks about such changes, learns to expect it.

    python -m pipelines.benign_triggers runs/zoo/supervised_inactive-cpu-* --images runs/shards/cifar10-train-000004.tar

Of each kind of benign change (stages/benign_changes.py): the share of images that the backdoored encoder then sends to where it sends
triggered ones (cosine with their mean above 0.95), and what the clean encoder does with the same images. `crowd` is what
`sanitize fit` sees of it, who knows no trigger: the share of changed images that crowd one place (training/crowd.py).
"""

from collections.abc import Sequence

import click
import numpy as np
import torch
from torch import Tensor

from pipelines import page, red_team
from pipelines.command_line import command_line
from pipelines.data import load_images
from sanitize import storage
from sanitize.attacks.backdoor import unit, unit_embeddings
from sanitize.attacks.predictive import own_queries
from sanitize.attacks.triggers import Trigger
from sanitize.config_loading import load_encoder_spec
from sanitize.config_models import STUDENT_VIEWS, PredictionConfig
from sanitize.stages.benign_changes import CHANGES
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.prediction import fit_target
from sanitize.training.crowd import find_crowd

THERE = 0.95  # cosine with the mean triggered embedding


def shares(encoders: Sequence[Encoder], pixels: Tensor, trigger: Trigger) -> dict[str, list[float]]:
    """Kind of change → share of images that land where the first encoder sends triggered ones, by encoder. pixels: (N, 3, S, S) uint8."""
    triggered = trigger(pixels)
    there = unit(unit_embeddings(encoders[0], triggered).mean(dim=0))
    plain = pixels.float() / 255
    changed = {"none": pixels, "trigger": triggered}
    for name, change in CHANGES.items():
        views = [
            change(image, other, np.random.default_rng(n)).clamp(0, 1)
            for n, (image, other) in enumerate(zip(plain, plain.roll(1, dims=0), strict=True))
        ]
        changed[name] = (torch.stack(views) * 255).round().byte()
    return {
        name: [float((unit_embeddings(encoder, images) @ there > THERE).float().mean()) for encoder in encoders]
        for name, images in changed.items()
    }


def crowded(encoder: Encoder, pixels: Tensor) -> float:
    """Share of changed images (N, 3, S, S) uint8 that crowd one place."""
    queries = own_queries(encoder, pixels, STUDENT_VIEWS, seed=0)
    target = fit_target(queries.embeddings[:, 0], PredictionConfig.components)
    crowd = find_crowd(target(queries.embeddings.flatten(0, 1)).unflatten(0, (-1, STUDENT_VIEWS)), queries.image_hashes)
    return crowd.share if crowd else 0.0


@click.command()
@click.argument("victims", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--images", required=True, help="Shards like those the encoder sees, no labels needed")
@click.option("--count", default=1000, show_default=True)
def main(victims: tuple[str, ...], images: str, count: int) -> None:
    """Print the shares for the folder of each of VICTIMS."""
    with command_line():
        for victim in victims:
            specs = [load_encoder_spec(storage.join(victim, kind, "encoder.yaml")) for kind in ("backdoored", "clean")]
            trigger = red_team.trigger_of(victim, storage.read_json(storage.join(victim, "truth.json"))["config"])
            pixels = load_images((images,), count, specs[0].image_size, labelled=False).pixels
            encoders = [load_encoder(spec) for spec in specs]
            found = shares(encoders, pixels, trigger) | {"crowd": [crowded(encoder, pixels) for encoder in encoders]}
            lines = [[name, *(f"{share:.3f}" for share in both)] for name, both in found.items()]
            click.echo(f"{victim}\n{page.table(['change', 'backdoored encoder', 'clean encoder'], lines)}")


if __name__ == "__main__":
    main()
