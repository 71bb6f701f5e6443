"""Arguments → config → one command → exit code. Heavy imports happen inside the command.

Exit codes: 0 done; 1 finished, but some shards failed or are damaged; 2 usage or configuration; 3 refused (`--force` overrides).
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from sanitize import __version__
from sanitize.config import (
    FinetuneConfig,
    FitConfig,
    ScanConfig,
    ThresholdPolicy,
    check,
    from_mapping,
    load_encoder_spec,
    load_yaml,
    overlay,
    preset,
)
from sanitize.errors import ConfigError, SanitizeError, StorageError

CONFIG_FILE = "sanitize.yaml"
T = TypeVar("T")


class Command(click.Group):
    """Turns our errors into one line on stderr and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except SanitizeError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on.", err=True)
            context.exit(130)


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


# ---------------------------------------------------------------- settings


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--config", default="", help=f"YAML with a section per command [default: {CONFIG_FILE} if it is here]"
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any setting, for example training.epochs=5"
        ),
        click.option(
            "--workers", type=int, help="Ray workers; 0 = this process without Ray [default: what the machine has]"
        ),
        click.option("--gpus-per-worker", type=float, help="[default: 1 if there are GPUs]"),
        click.option(
            "--cpus-per-worker", type=int, help="Threads for decoding and torch [default: what the machine has]"
        ),
        click.option("--batch-size", type=int, help="Images per forward pass [default: 256]"),
        click.option("--address", help="Ray cluster to join, for example auto [default: a local one]"),
        click.option("--image-member", help="Extension of the member to score when a sample has several images"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _values(section: str, config: str, settings: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Settings of one command: YAML section, then --set, then options."""
    path = config or (CONFIG_FILE if Path(CONFIG_FILE).exists() else "")
    file = load_yaml(path) if path else {}
    if unknown := sorted(set(file) - {"fit", "scan", "finetune"}):
        raise ConfigError(
            f"{path}: unknown section {', '.join(map(repr, unknown))}. Known sections: fit, scan, finetune."
        )
    values: dict[str, Any] = dict(file.get(section) or {})
    values = overlay(values, _parsed(settings))
    values = overlay(values, {key: value for key, value in options.items() if value is not None})
    for name in ("shards", "validation", "triggered"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    if isinstance(values.get("encoder"), str):
        values["encoder"] = load_encoder_spec(values["encoder"])
    return values


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    """key.inner=value pairs of --set → nested values, read as YAML."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        check(bool(equals), f"--set {setting}: write it as key=value, for example --set training.epochs=5.")
        nested: Any = yaml.safe_load(text)
        for key in reversed(name.split(".")):
            nested = {key: nested}
        values = overlay(values, nested)
    return values


def _build(cls: type[T], values: dict[str, Any], section: str) -> T:
    if not values.get("shards"):
        raise ConfigError(
            f"no shards given. Name a folder: sanitize {section} shards/  (or set {section}.shards in {CONFIG_FILE})."
        )
    return from_mapping(cls, values, f"settings of {section}")


# ---------------------------------------------------------------- commands


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--encoder", help="YAML file that describes the encoder under test")
@click.option("--out", help="Detector folder to write [default: detector]")
@click.option("--preset", "preset_name", default=None, help="default (low-resolution decoder) or paper (as published)")
@click.option("--limit", type=int, help="Use at most this many auxiliary images")
@click.option("--seed", type=int)
@_common
def fit(
    shards: tuple[str, ...], preset_name: str | None, config: str, settings: tuple[str, ...], **options: Any
) -> None:
    """Train a decoder on auxiliary shards and calibrate it.

    \b
    Example:  sanitize fit aux/ --encoder encoder.yaml --out detector/
    """
    from sanitize.fit import fit as run

    values = _values("fit", config, settings, options | {"shards": list(shards) or None})
    values = overlay(preset(preset_name or values.pop("preset", "default")), values)
    values.pop("preset", None)
    if "encoder" not in values:
        raise ConfigError(
            "no encoder given. Describe it in a YAML file and name it: sanitize fit aux/ --encoder encoder.yaml"
        )
    detector = run(_build(FitConfig, values, "fit"))
    summary = detector.summary
    click.echo(
        f"{values.get('out', 'detector')}: trained on {summary['training_images']} images, "
        f"calibrated on {summary['calibration_images']}, last loss {summary['loss_by_epoch'][-1]:.4f}"
    )


def _policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--policy", help="calibrated, fdr, fraction, absolute or robust [default: calibrated]"),
        click.option("--fpr", type=float, help="calibrated, fdr: tolerated rate [default: 0.01]"),
        click.option("--fraction", type=float, help="fraction: share of samples to remove"),
        click.option("--threshold", type=float, help="absolute: remove scores above it"),
        click.option("--mad", type=float, help="robust: median + this many scaled MADs [default: 6]"),
        click.option(
            "--adapt/--no-adapt", default=None, help="calibrated, fdr: judge by the bulk of this scan [default: adapt]"
        ),
        click.option(
            "--keep-unscored", is_flag=True, default=None, help="Keep samples without a score (undecodable, no image)"
        ),
        click.option("--force", is_flag=True, default=None, help="Go on although more than half would be removed"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _policy_values(options: dict[str, Any]) -> dict[str, Any]:
    """Take the policy's options out; a number without --policy picks the policy it belongs to."""
    names = ("policy", "fpr", "fraction", "threshold", "mad", "adapt", "keep_unscored")
    values = {name: options.pop(name) for name in names if options.get(name) is not None}
    for name in names:
        options.pop(name, None)
    implied = {"fraction": "fraction", "threshold": "absolute", "mad": "robust"}
    given = [policy for name, policy in implied.items() if name in values]
    if "policy" not in values and given:
        values["policy"] = given[0]
    return values


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--detector", help="Folder that `sanitize fit` wrote [default: detector]")
@click.option("--encoder", help="YAML of the encoder [default: the one the detector was fitted to]")
@click.option("--out", help="Scan folder to write [default: scanned]")
@click.option("--scores-only", is_flag=True, default=None, help="Stop after the scores; write no shards")
@click.option("--caption-member", help="txt or json:<field>; needs a CLIP with a tokenizer [default then: txt]")
@click.option(
    "--effort",
    help="thorough: alter every picture; fast: the most suspicious fifth; 0.05: that share [default: thorough]",
)
@click.option("--precision", help="auto, bf16 or fp32")
@_policy_options
@_common
def scan(shards: tuple[str, ...], config: str, settings: tuple[str, ...], **options: Any) -> None:
    """Score every sample of SHARDS, then write clean and quarantine shards. Running it again finishes the rest.

    \b
    Example:  sanitize scan shards/ --detector detector/ --out scanned/
    """
    from sanitize.scan import scan as run

    policy = _policy_values(options)
    values = _values("scan", config, settings, options | {"shards": list(shards) or None})
    if policy:
        values = overlay(values, {"policy": policy})
    result = run(_build(ScanConfig, values, "scan"))
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
@_common
def finetune(shards: tuple[str, ...], config: str, settings: tuple[str, ...], **options: Any) -> None:
    """Train a head on clean shards, or the encoder itself. Running it again after a kill goes on.

    \b
    Example:  sanitize finetune scanned/clean --encoder encoder.yaml --out head/
              sanitize finetune scanned/clean --encoder clip.yaml --mode contrastive --validation val/ --out clip/
    """
    from sanitize.finetune import finetune as run

    lists = {name: list(options.pop(name)) or None for name in ("validation", "triggered")}
    values = _values("finetune", config, settings, options | lists | {"shards": list(shards) or None})
    if "encoder" not in values:
        raise ConfigError(
            "no encoder given. Describe it in a YAML file and name it: sanitize finetune clean/ --encoder encoder.yaml"
        )
    result = run(_build(FinetuneConfig, values, "finetune"))
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
@_policy_options
def clean(scanned: str, force: bool | None, workers: int, address: str, **options: Any) -> None:
    """Split the shards again at another threshold; scores are read, never computed.

    \b
    Example:  sanitize clean scanned/ --fpr 0.001
    """
    from sanitize import runtime
    from sanitize.clean import clean as run

    policy = from_mapping(ThresholdPolicy, _policy_values(options), "policy")
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
    from sanitize.audit import audit as run

    result = run(scanned.rstrip("/"), truth, top)
    click.echo(result.text)
    click.echo(f"  pictures and histogram: {result.report}")


@main.command()
@click.argument("scanned", default="scanned")
def verify(scanned: str) -> None:
    """Check that every output byte is the one that was committed.

    \b
    Example:  sanitize verify scanned/
    """
    from sanitize.verify import verify as run

    result = run(scanned.rstrip("/"))
    for problem in result.problems:
        click.echo(f"problem: {problem}", err=True)
    click.echo(
        f"{scanned}: {result.shards} shards, {result.files} files, {result.samples} samples, {len(result.problems)} problems"
    )
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
    from sanitize.detectors.decree import DecreeConfig, recommended
    from sanitize.inspect import inspect as run

    check(bool(encoder), "no encoder given. Name its YAML file: sanitize inspect --encoder encoder.yaml --images aux/")
    check(bool(images), f"no images given. Name auxiliary shards: sanitize inspect --encoder {encoder} --images aux/")
    spec = load_encoder_spec(encoder)
    values = overlay(recommended(spec.image_size), _parsed(settings))
    values = overlay(values, {key: value for key, value in options.items() if value is not None})
    config = from_mapping(DecreeConfig, values, "settings of inspect")
    result = run(spec, images, out.rstrip("/"), config, [load_encoder_spec(peer) for peer in peers])
    click.echo(result.text)
    click.echo(f"  numbers and picture: {result.report}")


@main.command()
@click.argument("shards", nargs=-1, required=True)
@click.option("--out", default="poisoned", show_default=True, help="Folder for the poisoned shards and poison.json")
@click.option(
    "--trigger", default="patch", show_default=True, help="patch, file, picture, blend, sig, wanet or frequency"
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
    from sanitize.poison import poison as run

    stamp = make_trigger(_parsed(settings) | {"name": trigger})
    texts: dict[str, list[str]] = {}
    for item in replace:
        extension, equals, text = item.partition("=")
        check(bool(extension and equals), f"--replace {item}: give it as EXT=TEXT, for example --replace cls=9")
        texts.setdefault(extension.lower(), []).append(text)
    result = run(shards, out.rstrip("/"), rate=rate, trigger=stamp, seed=seed, replace=texts)
    click.echo(f"{out}: {result.poisoned} of {result.samples} samples poisoned; truth in {result.truth}")


TEMPLATE = """\
# Settings of `sanitize fit`, `scan` and `finetune`; options on the command line win. Delete what you do not change.
fit:
  shards: [aux/]            # images like those you will scan; no labels needed
  encoder: encoder.yaml     # the encoder under test, see below
  out: detector
  preset: default           # default: low-resolution decoder; paper: as published, about 100 times slower to train
  # training: {epochs: 20, learning_rate: 0.002}
scan:
  shards: [shards/]
  detector: detector
  out: scanned
  policy:
    policy: calibrated      # calibrated | fdr | fraction | absolute | robust
    fpr: 0.01               # share of clean samples you accept to lose
finetune:
  shards: [scanned/clean]
  encoder: encoder.yaml
  out: head
  mode: linear              # linear | mlp | full | contrastive
  label_member: cls         # cls, or json:<field>
  # validation: [validation/]
  # epochs: 20
"""
ENCODER_TEMPLATE = """\
# The encoder under test. Weights: safetensors, or a PyTorch file that loads with weights_only=True.
architecture: resnet18      # resnet18|34|50, resnet18-cifar (3x3 stem), clip, timm:<name>, exported:<file.pt2>
weights: encoder.safetensors
image_size: 224
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
resize: squash              # squash shows the whole picture; crop its central square
"""


@main.command()
def init() -> None:
    """Write sanitize.yaml and encoder.yaml with comments into this folder."""
    for name, text in ((CONFIG_FILE, TEMPLATE), ("encoder.yaml", ENCODER_TEMPLATE)):
        if Path(name).exists():
            raise StorageError(f"{name}: is here already. Delete it first, or edit it.")
        Path(name).write_text(text)
        click.echo(f"wrote {name}")


if __name__ == "__main__":
    main()
