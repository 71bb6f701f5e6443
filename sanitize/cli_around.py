"""Commands around the main job: pack, list, export, review, card, inspect, poison, check-encoder, init."""

import sys
from typing import Any

import click

from sanitize.cli_options import parse_settings
from sanitize.cli_output import cleaned, exit_for_shards, tell, tell_error
from sanitize.config_loading import from_mapping, load_encoder_spec, overlay
from sanitize.errors import check

TRIGGERS = (
    "patch",
    "file",
    "image",
    "blend",
    "sig",
    "wanet",
    "frequency",
    "sign",
    "filter",
    "unet",
    "composite",
)  # of attacks/triggers.py; a test holds both equal
EXPORT_FORMATS = ("folder", "fiftyone", "lightly")  # of auditing/export_formats.py; likewise


@click.command()
@click.argument("source")
@click.argument("target", metavar="[OUT]", required=False)
@click.option("--out", help="The same as OUT [default: shards]")
@click.option("--images", default="", help="Column with the images or their paths [default: what fits]")
@click.option(
    "--labels",
    default="",
    help="Column, or `folders`, or `none` [default: a usual name; sub-folders when all are in one]",
)
@click.option("--captions", default="", help="Column, or `none` [default: a usual name]")
@click.option("--shard-size", default=1000, show_default=True, help="Samples in one shard")
@click.option("--workers", default=0, show_default=True, help="Ray workers that read and write; 0 = this process")
@click.option("--address", default="", help="Ray cluster to join")
def pack(source: str, target: str | None, out: str | None, workers: int, address: str, **options: Any) -> None:
    """Make shards of a folder of images, Hugging Face data (Parquet, save_to_disk) or a manifest of paths (CSV, Parquet).

    \b
    Example:  sanitize pack photos/ shards/
              sanitize pack dataset/data/ shards/ --captions text
              sanitize pack pairs.csv shards/ --images url --captions title
    """
    from sanitize import runtime
    from sanitize.commands.pack import pack as run

    check(not (target and out) or target == out, f"OUT is {target}, --out is {out}. Give one of them.")
    folder = out or target or "shards"
    resources = runtime.plan(workers, 1, 0, workers, address)
    result = run(source, folder.rstrip("/") or folder, resources=resources, address=address, **options)
    unreadable = f"; {result.unreadable} could not be read" if result.unreadable else ""
    tell(result, f"{result.out}: {result.samples} samples in {result.shards} shards{unreadable}")
    for problem in result.problems:
        tell_error(f"sample: {problem}")
    if result.unreadable:
        click.echo(
            f"{result.unreadable} sample(s) are in no shard; {result.out}/originals names each in its column `problem`. Repair "
            "them and run the same command: it packs their shards again. Files that changed meanwhile need another --out.",
            err=True,
        )
    for message in result.failed:
        tell_error(f"shard: {message}")
    if result.failed:
        click.echo(f"{len(result.failed)} shard(s) failed; the same command tries them again.", err=True)
    if result.unreadable or result.failed:
        sys.exit(1)


@click.command("list")
@click.argument("scanned")
@click.argument("file")
@click.option("--only", type=click.Choice(["kept", "removed"]), help="[default: both]")
@click.option(
    "--originals", default="", help="Folder that `sanitize pack` wrote [default: where the scanned shards lie]"
)
def list_samples(scanned: str, file: str, only: str | None, originals: str) -> None:
    """What a scan keeps and removes, by original file or row: .parquet, .csv, or .txt (names alone).

    \b
    Example:  sanitize list scanned/ samples.csv
              sanitize list scanned/ removed.txt --only removed
    """
    from sanitize.commands.list_samples import list_samples as run

    result = run(scanned.rstrip("/"), file, only=only or "", originals=originals.rstrip("/"))
    known = f"{result.with_original} of them with their original"
    tell(result, f"{file}: {result.samples} samples, {result.kept} kept and {result.removed} removed, {known}")
    for message in result.failed:
        tell_error(f"shard: {message}")
    if result.failed:
        click.echo(f"{len(result.failed)} shard(s) are not listed; everything else is.", err=True)
        sys.exit(1)


@click.command()
@click.argument("scanned")
@click.argument("out")
@click.option("--format", default="folder", show_default=True, type=click.Choice(EXPORT_FORMATS))
@click.option("--limit", default=10_000, show_default=True, help="Removed samples, highest score first")
@click.option("--kept", default=100, show_default=True, help="Kept samples nearest the cut")
@click.option("--random", default=0, show_default=True, help="Other kept samples, drawn by --seed")
@click.option("--seed", default=0, show_default=True, help="Chooses them")
def export(scanned: str, out: str, **options: Any) -> None:
    """Removed samples, and kept ones near the cut, as images and a table (samples.parquet) for the tools that you look at data with.

    \b
    Example:  sanitize export scanned/ exported/
              sanitize export scanned/ exported/ --format fiftyone --random 500
    """
    from sanitize.commands.export import export as run

    result = run(scanned.rstrip("/"), out.rstrip("/"), **options)
    counts = f"{result.removed} removed and {result.kept} kept"
    tell(result, f"{result.out}: {result.samples} samples, {counts}; {result.images} with their image")
    for message in result.failed:
        tell_error(f"shard: {message}")
    if result.failed:
        click.echo(
            f"{len(result.failed)} shard(s) could not be read; their samples are in samples.parquet without image.",
            err=True,
        )
        sys.exit(1)


@click.command()
@click.argument("scanned", default="scanned")
@click.option(
    "--release", default="", metavar="FILE", help="Samples to keep: a key a line, or .csv or .parquet (shard, key)"
)
@click.option("--remove", default="", metavar="FILE", help="Samples to remove, likewise")
@click.option("--withdraw", default="", metavar="FILE", help="Samples that the score is to decide again")
@click.option(
    "--decisions", default="", metavar="FILE", help="CSV with columns shard, key, word, as the report exports it"
)
@click.option("--by", default="", help="Who decides; recorded")
@click.option("--note", default="", help="Why; recorded, and the reason in the decisions")
@click.option("--release-unscored", is_flag=True, help="Also release samples that have no score")
@click.option("--workers", default=0, show_default=True, help="Ray workers that decide and copy; 0 = this process")
@click.option("--address", default="", help="Ray cluster to join")
def review(scanned: str, workers: int, address: str, **options: Any) -> None:
    """A person's word over the score: recorded, and decisions and clean shards follow. Later `clean` and `scan` keep to it.

    \b
    Example:  sanitize review scanned/ --release keys.txt --by "Ada" --note "looked at all three"
              sanitize review scanned/ --decisions decisions.csv --by "Ada"
    """
    from sanitize import runtime
    from sanitize.commands.review import review as run

    out, resources = scanned.rstrip("/"), runtime.plan(workers, 1, 0, workers, address)
    result = run(out, resources=resources, address=address, **options)
    counts = f"{result.released} released, {result.removed} removed, {result.withdrawn} withdrawn"
    tell(
        result,
        f"{out}/{result.record}: {counts}; {result.changed} of them changed sides",
        cleaned(out, result.cleaned),
    )
    exit_for_shards(result.cleaned.failed)


@click.command()
@click.argument("scanned", default="scanned")
@click.argument("file", default="")
def card(scanned: str, file: str) -> None:
    """A section for the data card of the cleaned set, in Markdown: what was removed, why, by what rule and by whom.
    A .json gets a Croissant description of its clean shards.

    \b
    Example:  sanitize card scanned/ cleaning.md
              sanitize card scanned/ scanned/croissant.json
    """
    from sanitize.commands.card import card as run

    result = run(scanned.rstrip("/"), file)
    tell(result, f"wrote {file}" if file else result.text)


@click.command()
@click.option("--encoder", default="", help="YAML file that describes the encoder under test")
@click.option("--images", multiple=True, help="Auxiliary shards, no labels needed; can be given several times")
@click.option(
    "--peer", "peers", multiple=True, help="YAML of a clean encoder of the same architecture; give at least 3"
)
@click.option(
    "--restarts",
    type=int,
    help="Inversions from other random starts [default: 3; below 96 pixels 1, and 9 from blocks]",
)
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
