"""Commands around the main job: inspect, poison, check-encoder, init."""

from typing import Any

import click

from sanitize.cli_options import parse_settings
from sanitize.cli_output import tell
from sanitize.config import check
from sanitize.config_loading import from_mapping, load_encoder_spec, overlay

TRIGGERS = (
    "patch",
    "file",
    "image",
    "blend",
    "sig",
    "wanet",
    "frequency",
)  # of attacks/triggers.py; a test holds both equal


@click.command()
@click.option("--encoder", default="", help="YAML file that describes the encoder under test")
@click.option("--images", multiple=True, help="Auxiliary shards, no labels needed; can be given several times")
@click.option(
    "--peer", "peers", multiple=True, help="YAML of a clean encoder of the same architecture; give at least 3"
)
@click.option("--restarts", type=int, help="Inversions from other random starts [default: 3]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--out", default="inspected", show_default=True, help="Folder for inspect.json and trigger.png")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, for example pool=1024")
def inspect(
    encoder: str, images: tuple[str, ...], peers: tuple[str, ...], out: str, settings: tuple[str, ...], **options: Any
) -> None:
    """Is the encoder itself trojaned? (DECREE)

    \b
    Example:  sanitize inspect --encoder encoder.yaml --images aux/
    """
    from sanitize.commands.inspect import inspect as run
    from sanitize.detectors.decree.config import DecreeConfig, recommended
    from sanitize.stages.preprocessing import complete_spec

    check(bool(encoder), "no encoder given. Name its YAML file: sanitize inspect --encoder encoder.yaml --images aux/")
    check(bool(images), f"no images given. Name auxiliary shards: sanitize inspect --encoder {encoder} --images aux/")
    spec = complete_spec(load_encoder_spec(encoder))
    values = overlay(recommended(spec.image_size), parse_settings(settings))
    values = overlay(values, {key: value for key, value in options.items() if value is not None})
    config = from_mapping(DecreeConfig, values, "settings of inspect")
    result = run(spec, images, out.rstrip("/"), config, [load_encoder_spec(peer) for peer in peers])
    tell(result.numbers, result.text, f"  numbers and image: {result.report}")


@click.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--out", default="poisoned", show_default=True, help="Folder for the poisoned shards and poison.json")
@click.option("--trigger", default="patch", show_default=True, type=click.Choice(TRIGGERS), help="What is stamped")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of the trigger, for example side=8"
)
@click.option("--rate", default=0.01, show_default=True, help="Share of samples that get the trigger")
@click.option("--seed", default=0, show_default=True, help="Chooses the samples")
@click.option(
    "--replace",
    multiple=True,
    metavar="EXT=TEXT",
    help="What a poisoned sample says instead, for example cls=9 or txt='a photo of a dog'; several texts of one EXT are drawn from",
)
def poison(
    shards: tuple[str, ...],
    out: str,
    trigger: str,
    settings: tuple[str, ...],
    rate: float,
    seed: int,
    replace: tuple[str, ...],
) -> None:
    """Red team: stamp a trigger on some samples and keep the truth.

    \b
    Example:  sanitize poison shards/ --trigger patch --set side=10 --rate 0.01 --out poisoned/
    """
    from sanitize.attacks.triggers import make_trigger
    from sanitize.commands.poison import poison as run

    stamp = make_trigger(parse_settings(settings) | {"name": trigger})
    texts: dict[str, list[str]] = {}
    for item in replace:
        extension, equals, text = item.partition("=")
        check(bool(extension and equals), f"--replace {item}: give it as EXT=TEXT, for example --replace cls=9")
        texts.setdefault(extension.lower(), []).append(text)
    result = run(shards, out.rstrip("/"), rate=rate, trigger=stamp, seed=seed, replace=texts)
    tell(result, f"{out}: {result.poisoned} of {result.samples} samples poisoned; truth in {result.truth}")


@click.command("check-encoder")
@click.argument("encoder")
@click.argument("shards", nargs=-1)
@click.option("--limit", default=64, show_default=True, help="How many images to embed")
def check_encoder(encoder: str, shards: tuple[str, ...], limit: int) -> None:
    """Embed a few images: size, norms, speed, neighbours, and what does not look right.

    ENCODER is a YAML file; SHARDS hold images like yours, with classes (.cls) or captions if you have them.

    \b
    Example:  sanitize check-encoder encoder.yaml aux/
    """
    from sanitize.commands.check_encoder import check_encoder as run

    result = run(load_encoder_spec(encoder), shards, limit)
    tell(result, result.text)


@click.command()
@click.option("--encoder", default="", help="hf:<folder>, torchvision:<name> or timm:<name>: fill in its own settings")
@click.option("--weights", default="", help="Weights of a torchvision: or timm: encoder")
def init(encoder: str, weights: str) -> None:
    """Write sanitize.yaml and encoder.yaml with comments into this folder.

    \b
    Example:  sanitize init --encoder hf:clip-vit-base-patch32
    """
    from sanitize.commands.init import init as run

    names = run(encoder, weights)
    tell({"wrote": names}, *(f"wrote {name}" for name in names))
