"""How far the perturbations of the scorer `reaction` move an encoder, beside how far another image is.

    python -m benchmarks.perturbations encoder.yaml SHARD [--images 64]

A perturbation that moves an embedding as far as another image does says nothing any more.
"""

import click
import torch
from torch.nn import functional

from pipelines.command_line import command_line
from pipelines.data import load_images
from sanitize.config_loading import load_encoder_spec
from sanitize.stages.encoders import load_encoder
from sanitize.stages.perturbations import PERTURBATIONS


@click.command()
@click.argument("encoder_yaml")
@click.argument("shard")
@click.option("--images", default=64, show_default=True, help="How many")
@torch.inference_mode()
def main(encoder_yaml: str, shard: str, images: int) -> None:
    """Print the mean of 1 - cosine for every perturbation."""
    with command_line():
        encoder = load_encoder(load_encoder_spec(encoder_yaml))
        pixels = load_images((shard,), images, encoder.spec.image_size, labelled=False).pixels.float() / 255

        def embed(views: torch.Tensor) -> torch.Tensor:
            return functional.normalize(torch.cat([encoder(part) for part in views.split(16)]).float(), dim=1)

        still = embed(pixels)
        for name, perturb in PERTURBATIONS.items():
            click.echo(f"{name:14s} {float(1 - (still * embed(perturb(pixels))).sum(dim=1).mean()):.3f}")
        click.echo(f"{'another image':14s} {float(1 - (still * still.roll(1, dims=0)).sum(dim=1).mean()):.3f}")


if __name__ == "__main__":
    main()
