"""Arguments → config → one command → exit code. Heavy imports happen inside the command.

Exit codes: see EXIT_CODES.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from sanitize import __version__, process
from sanitize.cli_around import card, check_encoder, export, init, inspect, list_samples, pack, poison, review
from sanitize.cli_options import (
    build_config,
    common_options,
    policy_options,
    settings_of,
    take_policy,
)
from sanitize.cli_output import (
    EXIT_CODES,
    Command,
    TerminalFormatter,
    cleaned,
    exit_for_shards,
    quiet_option,
    tell,
    tell_error,
)
from sanitize.config import MODES, PRECISIONS, SCORERS, FinetuneConfig, FitConfig, ScanConfig, ThresholdPolicy
from sanitize.config_loading import from_mapping, overlay, to_mapping
from sanitize.errors import ConfigError
from sanitize.presets import FIT_PRESETS, preset


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(__version__)
@quiet_option
def main() -> None:
    """Find and remove backdoor samples from image training data before fine-tuning.

    \b
    sanitize fit  aux/    --encoder encoder.yaml   learn what this encoder's embeddings look like when decoded
    sanitize scan shards/                          score every sample, then write clean shards
    """
    process.prepare()
    level = logging.WARNING if click.get_current_context().meta.get("quiet") else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TerminalFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("ray", "matplotlib", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


# ---------------------------------------------------------------- commands


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--encoder", help="YAML file that describes the encoder under test")
@click.option("--out", help="Detector folder to write [default: detector]")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(list(FIT_PRESETS)),
    help="default: low-resolution decoder; paper: as published [default: default]",
)
@click.option(
    "--scorer", type=click.Choice(SCORERS), help="What the score is: docs/default_score.md [default: evidence]"
)
@click.option(
    "--reference",
    help="evidence: YAML of an encoder its maker does not control, best the ancestor; predicts embeddings",
)
@click.option(
    "--contamination",
    type=float,
    help="Share of the auxiliary images, at most, that may be poison, as where they are a part of what is scanned [default: 0]",
)
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
    out = values.get("out", "detector")
    tell(
        {"out": out, "fingerprint": detector.fingerprint, **to_mapping(summary)},
        f"{out}: trained on {summary.training_images} images, calibrated on {summary.calibration_images}, last loss "
        f"{summary.loss_by_epoch[-1]:.4f}",
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
    help="thorough: perturb every image; fast: the most suspicious fifth; 0.05: that share "
    "[default: thorough; of the scorer evidence 0.075 where its predictor explains a quarter]",
)
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: auto]")
@click.option("--limit", type=int, help="Only the first so many shards: a trial, into an --out of its own")
@click.option(
    "--append", is_flag=True, default=None, help="Add SHARDS to those of the scan in --out; decide on all of them"
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing")
@policy_options
@common_options
def scan(shards: tuple[str, ...], config: str, settings: tuple[str, ...], dry_run: bool, **options: Any) -> None:
    """Score every sample of SHARDS, then write clean and quarantine shards. Running it again finishes the rest.

    \b
    Example:  sanitize scan shards/ --detector detector/ --out scanned/
    """
    from sanitize.commands.scan import plan_scan
    from sanitize.commands.scan import scan as run

    policy = take_policy(options) or None
    values = settings_of("scan", config, settings, options | {"shards": list(shards) or None, "policy": policy})
    settings_of_scan = build_config(ScanConfig, values, "scan")
    if dry_run:
        planned = plan_scan(settings_of_scan)
        tell(planned, planned.text)
        return
    result = run(settings_of_scan)
    lines = [f"{result.out}: {result.samples} samples scored, {result.unscored} without a score"]
    tell(result, *lines, *([cleaned(result.out, result.cleaned)] if result.cleaned else []))
    failed = [*result.failed, *result.damaged, *(result.cleaned.failed if result.cleaned else ())]
    exit_for_shards(failed)


@main.command()
@click.argument("shards", nargs=-1)
@click.option("--encoder", help="YAML file that describes the encoder")
@click.option("--out", help="Folder for the head, or the fine-tuned encoder [default: head]")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="mlp: 512-256; full: encoder and linear head; contrastive: both towers of a CLIP [default: linear]",
)
@click.option("--validation", multiple=True, help="Shards to measure on after each epoch; can be given several times")
@click.option("--triggered", multiple=True, help="Validation shards with the trigger stamped on all (sanitize poison)")
@click.option("--target", type=int, help="Class that the trigger aims at")
@click.option("--label-member", help="cls or json:<field> [default: cls]")
@click.option("--caption-member", help="contrastive: txt or json:<field> [default: txt]")
@click.option("--epochs", type=int, help="[default: 20]")
@click.option("--learning-rate", type=float, help="[default: that of the mode]")
@click.option("--patience", type=int, help="Stop after so many epochs without a better validation [default: never]")
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: auto]")
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
    tell(
        result,
        f"{result.out}: {result.mode} trained on {result.samples} samples, {left_out} left out, last loss {last['loss']:.4f}",
        *(f"  {name.replace('_', ' ')}: {value:.4g}" for name, value in result.evaluation.items()),
    )
    exit_for_shards(result.failed)


@main.command()
@click.argument("scanned", nargs=-1)
@click.option("--workers", default=0, show_default=True, help="Ray workers that decide and copy; 0 = this process")
@click.option("--address", default="", help="Ray cluster to join")
@click.option("--config", default="", help="YAML whose scan.policy counts [default: sanitize.yaml if it is here]")
@click.option("--dry-run", is_flag=True, help="Say what would be kept; write nothing")
@click.option("--ignore-reviews", is_flag=True, help="The score alone decides this time; reviews stay for the next")
@policy_options
def clean(
    scanned: tuple[str, ...],
    force: bool | None,
    workers: int,
    address: str,
    config: str,
    dry_run: bool,
    ignore_reviews: bool,
    **options: Any,
) -> None:
    """Split the shards of SCANNED [default: scanned] again at another threshold; scores are read, never computed. Several scans are
    decided by one rule, as if they were one.

    \b
    Example:  sanitize clean scanned/ --fpr 0.001
              sanitize clean january/ february/ --policy fdr
    """
    from sanitize import runtime
    from sanitize.commands.clean import clean_together, preview

    values = settings_of("scan", config, (), {"policy": take_policy(options) or None, "force": force})
    policy = from_mapping(ThresholdPolicy, values.get("policy", {}), "policy")
    outs = [out.rstrip("/") for out in scanned or ("scanned",)]
    if dry_run:
        would = preview(outs, policy, ignore_reviews)
        tell(_by_folder(outs, would), *(f"would write {cleaned(*pair)}" for pair in zip(outs, would, strict=True)))
        return
    resources = runtime.plan(workers, 1, 0, workers, address)
    how: dict[str, Any] = {"force": bool(values.get("force")), "ignore_reviews": ignore_reviews}
    results = clean_together(outs, policy, resources=resources, address=address, **how)
    tell(_by_folder(outs, results), *(cleaned(*pair) for pair in zip(outs, results, strict=True)))
    exit_for_shards([message for result in results for message in result.failed])


def _by_folder(outs: Sequence[str], results: Sequence[Any]) -> Any:
    """For --json: the result of one scan, or of several by folder."""
    if len(outs) == 1:
        return results[0]
    return {out: to_mapping(result) for out, result in zip(outs, results, strict=True)}


@main.command()
@click.argument("scanned", default="scanned")
@click.option("--truth", default="", help="poison.json: which samples are poisoned")
@click.option("--top", default=10_000, show_default=True, help="Flagged samples in the report; 0 = no images are read")
@click.option("--key", default="", help="Only say why the sample with this key was kept or removed")
@click.option("--check", is_flag=True, help="Only say whether the report shows the decisions that count now")
def audit(scanned: str, truth: str, top: int, key: str, check: bool) -> None:
    """What was flagged and why, as a page to decide from; with known truth, how well.

    \b
    Example:  sanitize audit scanned/ --truth poisoned/poison.json
              sanitize audit scanned/ --key photo-000123
    """
    from sanitize.commands.audit import audit as run
    from sanitize.commands.audit import require_current, why

    scanned = scanned.rstrip("/")
    if key:
        text = why(scanned, key)
        tell({"why": text}, text)
    elif check:
        report = require_current(scanned)
        tell({"report": report}, f"{report}: shows the decisions that count now")
    else:
        result = run(scanned, truth, top)
        tell(result, result.text, f"  to decide from: {result.report}")


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
        tell_error(f"problem: {problem}")
    counts = f"{result.shards} shards, {result.files} files, {result.samples} samples, {len(result.problems)} problems"
    deleted = f"{len(result.deleted)} files deleted. Run the same `sanitize scan` again; it writes them anew."
    tell(result, f"{scanned}: {counts}", *([deleted] if result.deleted else []))
    if result.problems:
        sys.exit(1)


for command in (pack, list_samples, export, review, card, check_encoder, inspect, poison, init):
    main.add_command(command)


if __name__ == "__main__":
    main()
