"""Arguments → config → one command → exit code. Heavy imports happen inside the command.

Exit codes: 0 done; 1 finished, but some shards failed or are damaged; 2 usage or configuration; 3 refused (`--force` overrides);
130 interrupted (Ctrl-C), 143 terminated (SIGTERM): what is finished is kept.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from sanitize import __version__
from sanitize.cli_errors import Command
from sanitize.cli_options import (
    build_config,
    common_options,
    parse_settings,
    policy_options,
    settings_of,
    take_policy,
)
from sanitize.config import FinetuneConfig, FitConfig, ScanConfig, ThresholdPolicy, check, preset
from sanitize.config_loading import from_mapping, load_encoder_spec, overlay
from sanitize.errors import ConfigError


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--quiet", is_flag=True, help="Only warnings and results.")
def main(quiet: bool) -> None:
    """Find and remove backdoor samples from image training data before fine-tuning.

    \b
    sanitize fit  aux/    --encoder encoder.yaml   learn what this encoder's embeddings look like when decoded
    sanitize scan shards/                          score every sample, then write clean shards
    """
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("ray", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


# ---------------------------------------------------------------- commands


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--encoder", help="YAML file that describes the encoder under test")
@click.option("--out", help="Detector folder to write [default: detector]")
@click.option("--preset", "preset_name", default=None, help="default (low-resolution decoder) or paper (as published)")
@click.option("--limit", type=int, help="Use at most this many auxiliary images")
@click.option("--seed", type=int)
@common_options
def fit(
    shards: tuple[str, ...], preset_name: str | None, config: str, settings: tuple[str, ...], **options: Any
) -> None:
    """Train a decoder on auxiliary shards and calibrate it.

    \b
    Example:  sanitize fit aux/ --encoder encoder.yaml --out detector/
    """
    from sanitize.commands.fit import fit as run

    values = settings_of("fit", config, settings, options | {"shards": list(shards) or None})
    values = overlay(preset(preset_name or values.pop("preset", "default")), values)
    values.pop("preset", None)
    if "encoder" not in values:
        raise ConfigError(
            "no encoder given. Describe it in a YAML file and name it: sanitize fit aux/ --encoder encoder.yaml"
        )
    detector = run(build_config(FitConfig, values, "fit"))
    summary = detector.summary
    click.echo(
        f"{values.get('out', 'detector')}: trained on {summary.training_images} images, "
        f"calibrated on {summary.calibration_images}, last loss {summary.loss_by_epoch[-1]:.4f}"
    )


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--detector", help="Folder that `sanitize fit` wrote [default: detector]")
@click.option("--encoder", help="YAML of the encoder [default: the one the detector was fitted to]")
@click.option("--out", help="Scan folder to write [default: scanned]")
@click.option("--scores-only", is_flag=True, default=None, help="Stop after the scores; write no shards")
@click.option("--caption-member", help="txt or json:<field>; needs a CLIP with a tokenizer [default then: txt]")
@click.option(
    "--effort",
    help="thorough: perturb every image; fast: the most suspicious fifth; 0.05: that share [default: thorough]",
)
@click.option("--precision", help="auto, bf16 or fp32")
@policy_options
@common_options
def scan(shards: tuple[str, ...], config: str, settings: tuple[str, ...], **options: Any) -> None:
    """Score every sample of SHARDS, then write clean and quarantine shards. Running it again finishes the rest.

    \b
    Example:  sanitize scan shards/ --detector detector/ --out scanned/
    """
    from sanitize.commands.scan import scan as run

    policy = take_policy(options)
    values = settings_of("scan", config, settings, options | {"shards": list(shards) or None})
    if policy:
        values = overlay(values, {"policy": policy})
    result = run(build_config(ScanConfig, values, "scan"))
    click.echo(f"{result.out}: {result.samples} samples scored, {result.unscored} without a score")
    if result.cleaned:
        click.echo(_cleaned(result.out, result.cleaned))
    failed = [*result.failed, *result.damaged, *(result.cleaned.failed if result.cleaned else ())]
    _exit_for_shards(failed)


def _cleaned(out: str, result: Any) -> str:
    total = result.kept + result.removed
    return f"{out}/clean: {result.kept} of {total} samples kept; {result.removed} in {out}/quarantine (threshold {result.threshold:.4g})"


def _exit_for_shards(failed: Sequence[str]) -> None:
    for message in failed:
        click.echo(f"shard: {message}", err=True)
    if failed:
        click.echo(f"{len(failed)} shard(s) failed or are damaged; everything else is done.", err=True)
        sys.exit(1)


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--encoder", help="YAML file that describes the encoder")
@click.option("--out", help="Folder for the head, or the fine-tuned encoder [default: head]")
@click.option("--mode", help="linear, mlp (512-256), full (encoder and linear head) or contrastive [default: linear]")
@click.option("--validation", multiple=True, help="Shards to measure on after each epoch; can be given several times")
@click.option("--triggered", multiple=True, help="Validation shards with the trigger stamped on all (sanitize poison)")
@click.option("--target", type=int, help="Class that the trigger aims at")
@click.option("--label-member", help="cls or json:<field> [default: cls]")
@click.option("--caption-member", help="contrastive: txt or json:<field> [default: txt]")
@click.option("--epochs", type=int, help="[default: 20]")
@click.option("--learning-rate", type=float, help="[default: that of the mode]")
@click.option("--patience", type=int, help="Stop after so many epochs without a better validation [default: never]")
@click.option("--precision", help="auto, bf16 or fp32")
@click.option("--seed", type=int)
@common_options
def finetune(shards: tuple[str, ...], config: str, settings: tuple[str, ...], **options: Any) -> None:
    """Train a head on clean shards, or the encoder itself. Running it again after a kill goes on.

    \b
    Example:  sanitize finetune scanned/clean --encoder encoder.yaml --out head/
              sanitize finetune scanned/clean --encoder clip.yaml --mode contrastive --validation val/ --out clip/
    """
    from sanitize.commands.finetune import finetune as run

    lists = {name: list(options.pop(name)) or None for name in ("validation", "triggered")}
    values = settings_of("finetune", config, settings, options | lists | {"shards": list(shards) or None})
    if "encoder" not in values:
        raise ConfigError(
            "no encoder given. Describe it in a YAML file and name it: sanitize finetune clean/ --encoder encoder.yaml"
        )
    result = run(build_config(FinetuneConfig, values, "finetune"))
    last = result.epochs[-1]
    left_out = result.unreadable + sum(result.unusable.values())
    click.echo(
        f"{result.out}: {result.mode} trained on {result.samples} samples, {left_out} left out, last loss {last['loss']:.4f}"
    )
    for name, value in result.evaluation.items():
        click.echo(f"  {name.replace('_', ' ')}: {value:.4g}")
    _exit_for_shards(result.failed)


@main.command()
@click.argument("scanned", default="scanned")
@click.option("--workers", default=0, show_default=True, help="Ray workers that copy; 0 = this process")
@click.option("--address", default="", help="Ray cluster to join")
@policy_options
def clean(scanned: str, force: bool | None, workers: int, address: str, **options: Any) -> None:
    """Split the shards again at another threshold; scores are read, never computed.

    \b
    Example:  sanitize clean scanned/ --fpr 0.001
    """
    from sanitize import runtime
    from sanitize.commands.clean import clean as run

    policy = from_mapping(ThresholdPolicy, take_policy(options), "policy")
    resources = runtime.plan(workers, 1, 0, workers, address)
    result = run(scanned.rstrip("/"), policy, force=bool(force), resources=resources, address=address)
    click.echo(_cleaned(scanned.rstrip("/"), result))
    _exit_for_shards(result.failed)


@main.command()
@click.argument("scanned", default="scanned")
@click.option("--truth", default="", help="poison.json: which samples are poisoned")
@click.option("--top", default=32, show_default=True, help="How many suspicious samples to show")
def audit(scanned: str, truth: str, top: int) -> None:
    """What was flagged and why; with known truth, how well.

    \b
    Example:  sanitize audit scanned/ --truth poisoned/poison.json
    """
    from sanitize.commands.audit import audit as run

    result = run(scanned.rstrip("/"), truth, top)
    click.echo(result.text)
    click.echo(f"  images and histogram: {result.report}")


@main.command()
@click.argument("scanned", default="scanned")
@click.option("--deep", is_flag=True, help="Read the inputs as well: clean and quarantine hold their bytes, as decided")
@click.option("--repair", is_flag=True, help="Delete what is damaged, so that the same scan does that part again")
def verify(scanned: str, deep: bool, repair: bool) -> None:
    """Check that every output byte is the one that was committed.

    \b
    Example:  sanitize verify scanned/
    """
    from sanitize.commands.verify import verify as run

    result = run(scanned.rstrip("/"), deep=deep, repair=repair)
    for problem in result.problems:
        click.echo(f"problem: {problem}", err=True)
    click.echo(
        f"{scanned}: {result.shards} shards, {result.files} files, {result.samples} samples, {len(result.problems)} problems"
    )
    if result.deleted:
        click.echo(f"{len(result.deleted)} files deleted. Run the same `sanitize scan` again; it writes them anew.")
    if result.problems:
        sys.exit(1)


@main.command()
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
    click.echo(result.text)
    click.echo(f"  numbers and image: {result.report}")


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--out", default="poisoned", show_default=True, help="Folder for the poisoned shards and poison.json")
@click.option(
    "--trigger", default="patch", show_default=True, help="patch, file, image, blend, sig, wanet or frequency"
)
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
    click.echo(f"{out}: {result.poisoned} of {result.samples} samples poisoned; truth in {result.truth}")


@main.command("check-encoder")
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

    click.echo(run(load_encoder_spec(encoder), shards, limit).text)


@main.command()
@click.option("--encoder", default="", help="hf:<folder>, torchvision:<name> or timm:<name>: fill in its own settings")
@click.option("--weights", default="", help="Weights of a torchvision: or timm: encoder")
def init(encoder: str, weights: str) -> None:
    """Write sanitize.yaml and encoder.yaml with comments into this folder.

    \b
    Example:  sanitize init --encoder hf:clip-vit-base-patch32
    """
    from sanitize.commands.init import init as run

    for name in run(encoder, weights):
        click.echo(f"wrote {name}")


if __name__ == "__main__":
    main()
