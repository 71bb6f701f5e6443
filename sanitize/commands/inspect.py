"""`sanitize inspect`: is the encoder itself trojaned? DECREE inverts the smallest trigger on auxiliary images.

auxiliary shards → pool of images → inversion of the encoder under test, then of its clean peers → verdict, JSON, image.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize import plots, runtime, storage
from sanitize.artifacts.run_record import library_versions
from sanitize.config import EncoderSpec
from sanitize.config_loading import to_mapping
from sanitize.detectors.decree import inversion as decree
from sanitize.detectors.decree.config import DecreeConfig
from sanitize.detectors.decree.inversion import Inversion, InvertedTrigger
from sanitize.detectors.decree.verdict import MIN_PEERS, Verdict, verdict_on
from sanitize.errors import ConfigError
from sanitize.pages.plain import Section, plain_page, png_uri
from sanitize.paths import AnyPath, path_text, path_texts
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.stages.encoders import load_encoder
from sanitize.stages.images import decode_sample, to_batch
from sanitize.stages.preprocessing import complete_spec
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import list_shards, open_shard

log = logging.getLogger(__name__)
MIN_IMAGES = 64


@dataclass(frozen=True)
class TriggerNumbers:
    """Of an inverted trigger; see `InvertedTrigger`."""

    l1: float
    p_l1: float
    pixels: float
    cosine: float
    step: int


@dataclass(frozen=True)
class RestartNumbers:
    trigger: TriggerNumbers | None
    steps: int
    epochs: int
    seconds: float
    penalty: float


@dataclass(frozen=True)
class PeerNumbers:
    fingerprint: str
    l1: float | None


@dataclass(frozen=True)
class InspectReport:
    """inspect.json. best: the smallest trigger; spread_l1: of the restarts; skipped: samples without a usable image, by status."""

    verdict: Verdict
    convention: str
    best: TriggerNumbers | None
    spread_l1: float
    plain_cosine: float
    images: int
    image_size: int
    restarts: tuple[RestartNumbers, ...]
    peers: tuple[PeerNumbers, ...]
    encoder_fingerprint: str
    settings: DecreeConfig
    skipped: dict[str, int]
    versions: dict[str, str]


@dataclass(frozen=True)
class Inspection:
    """peers: L1 of each clean encoder, None where no trigger was found; numbers: of inspect.json; text is for the terminal."""

    verdict: Verdict
    inversion: Inversion
    peers: tuple[float | None, ...]
    numbers: InspectReport
    text: str
    report: str  # path of inspect.json


@dataclass(frozen=True)
class ImagePool:
    """images: (N, 3, S, S) uint8 on the CPU; skipped: samples without a usable image, by status."""

    images: Tensor
    skipped: dict[str, int]


def inspect(
    encoder: EncoderSpec,
    patterns: Sequence[AnyPath],
    out: AnyPath,
    config: DecreeConfig,
    peers: Sequence[EncoderSpec] = (),
) -> Inspection:
    """Invert a trigger for `encoder`, judge its size, and write inspect.json, inspect.html and trigger.png into `out`.

    patterns: shards of auxiliary images. peers: clean encoders of the same architecture, none or at least three.
    """
    patterns, out = path_texts(patterns, "patterns"), path_text(out, "out")
    encoder, *peers = (complete_spec(spec) for spec in (encoder, *peers))
    fingerprints = _fingerprints(encoder, peers)
    shards = list_shards(patterns)
    pool = _pool(shards, encoder, config.pool)
    inversion = _invert(encoder, pool.images, config, "inspect")
    sizes = tuple(_peer_size(shards, peer, config, number) for number, peer in enumerate(peers, start=1))
    verdict = verdict_on(inversion, sizes, config.threshold)
    numbers = InspectReport(
        verdict=verdict,
        convention=decree.CONVENTION,
        best=_trigger_numbers(inversion.best),
        spread_l1=inversion.spread,
        plain_cosine=inversion.plain_cosine,
        images=inversion.images,
        image_size=inversion.image_size,
        restarts=_restart_numbers(inversion),
        peers=tuple(PeerNumbers(f, size) for f, size in zip(fingerprints[1:], sizes, strict=True)),
        encoder_fingerprint=fingerprints[0],
        settings=config,
        skipped=pool.skipped,
        versions=library_versions(),
    )
    report = storage.join(out, "inspect.json")
    storage.write_json(report, to_mapping(numbers))
    _write_image(storage.join(out, "trigger.png"), inversion.best, pool.images[0])
    text = _text(inversion, verdict, sizes, pool)
    storage.write_bytes(storage.join(out, "inspect.html"), _page(out, encoder, numbers, text))
    return Inspection(verdict, inversion, sizes, numbers, text, report)


def _fingerprints(encoder: EncoderSpec, peers: Sequence[EncoderSpec]) -> list[str]:
    """Of the encoder and its peers, in order. Raises ConfigError before any work when they cannot be compared."""
    if 0 < len(peers) < MIN_PEERS:
        raise ConfigError(
            f"{len(peers)} peer(s) given: how clean encoders differ takes at least {MIN_PEERS}. Give more with --peer, or none."
        )
    compared = ("architecture", "width", "stem_stride", "image_size")
    for number, peer in enumerate(peers, start=1):
        for name in compared:
            ours, theirs = getattr(encoder, name), getattr(peer, name)
            if ours != theirs and not str(ours).startswith("exported:"):
                raise ConfigError(
                    f"peer {number}: its {name} is {theirs}, that of the encoder under test is {ours}. Sizes of triggers "
                    "compare only within one architecture; give clean encoders of the same one."
                )
    fingerprints = [load_encoder(spec).fingerprint() for spec in (encoder, *peers)]
    for number, fingerprint in enumerate(fingerprints[1:], start=1):
        if fingerprint in fingerprints[:number]:
            raise ConfigError(f"peer {number}: is the encoder under test or an earlier peer. Give each encoder once.")
    return fingerprints


# ---------------------------------------------------------------- images


def _pool(shards: Sequence[Shard], spec: EncoderSpec, size: int) -> ImagePool:
    """Up to `size` images as the encoder sees them, the same number from the head of every shard where it has them."""
    images: list[Tensor] = []
    skipped: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        wanted = -(-(size - len(images)) // (len(shards) - number))
        images += _head(shard, spec, wanted, skipped) if wanted else []
    if len(images) < MIN_IMAGES:
        without = "".join(f", {count} {status}" for status, count in sorted(skipped.items()))
        raise ConfigError(
            f"{len(images)} usable auxiliary images{without}: DECREE needs at least {MIN_IMAGES}. Give more shards with --images."
        )
    for status, count in sorted(skipped.items()):
        log.warning("%d auxiliary samples skipped: %s", count, status)
    return ImagePool(torch.stack(images), dict(skipped))


def _head(shard: Shard, spec: EncoderSpec, wanted: int, skipped: Counter[str]) -> list[Tensor]:
    """The first `wanted` usable images of a shard, (3, S, S) uint8 each; what is skipped before them is counted."""
    images: list[Tensor] = []
    with open_shard(shard) as file:
        for image in map(decode_sample, ShardReader(file, shard).samples()):
            if image.pixels is None:
                skipped[image.status] += 1
                continue
            images.append(_as_seen(image.pixels, spec))
            if len(images) == wanted:
                break
    return images


def _as_seen(pixels: Tensor, spec: EncoderSpec) -> Tensor:
    """(3, H, W) uint8 of any size → (3, S, S) uint8, resized as the encoder's input is."""
    batch = to_batch([pixels], spec.image_size, spec.resize, torch.device("cpu"))
    return (batch[0] * 255).round().clamp(0, 255).byte()


# ---------------------------------------------------------------- inversion and verdict


def _invert(spec: EncoderSpec, images: Tensor, config: DecreeConfig, title: str) -> Inversion:
    encoder = load_encoder(spec).to(runtime.device())
    total = config.starts * config.epochs
    with ProgressDisplay(title, total, total, "epochs") as display:

        def on_epoch(restart: int, epoch: int, note: str) -> None:
            done = restart * config.epochs + epoch
            display.update(done, done, done * len(images), f"restart {restart}: {note}")

        return decree.invert(images, encoder, config, on_epoch)


def _peer_size(shards: Sequence[Shard], spec: EncoderSpec, config: DecreeConfig, number: int) -> float | None:
    best = _invert(spec, _pool(shards, spec, config.pool).images, config, f"peer {number}").best
    return best.l1 if best else None


# ---------------------------------------------------------------- output


def _restart_numbers(inversion: Inversion) -> tuple[RestartNumbers, ...]:
    return tuple(
        RestartNumbers(
            _trigger_numbers(restart.trigger),
            restart.steps,
            restart.epochs,
            round(restart.seconds, 2),
            restart.penalty,
        )
        for restart in inversion.restarts
    )


def _trigger_numbers(trigger: InvertedTrigger | None) -> TriggerNumbers | None:
    if trigger is None:
        return None
    return TriggerNumbers(trigger.l1, trigger.p_l1, trigger.pixels, trigger.cosine, trigger.step)


def _text(inversion: Inversion, verdict: Verdict, peers: Sequence[float | None], pool: ImagePool) -> str:
    best = inversion.best
    lines = [f"verdict: {verdict.verdict} ({verdict.reason})"]
    if best is not None:
        lines.append(
            f"  smallest trigger: L1 {best.l1:.1f}, P-L1 {best.p_l1:.4f}, {best.pixels:.1f} pixels, cosine {best.cosine:.4f}"
        )
        lines.append(f"  convention: {decree.CONVENTION}")
    for number, restart in enumerate(inversion.restarts):
        found = f"L1 {restart.trigger.l1:.1f}" if restart.trigger else "no trigger"
        lines.append(f"  restart {number}: {found}, {restart.steps} steps, {restart.seconds:.1f} s")
    if peers:
        lines.append(
            "  clean peers: " + ", ".join("no trigger" if size is None else f"L1 {size:.1f}" for size in peers)
        )
    lines.append(f"  {inversion.images} images, mean pairwise cosine {inversion.plain_cosine:.3f} without a trigger")
    lines += [f"  {count} samples skipped: {status}" for status, count in sorted(pool.skipped.items())]
    return "\n".join(lines)


def _write_image(path: str, trigger: InvertedTrigger | None, example: Tensor) -> None:
    """Mask, pattern, both together, and an image without and with them; an older image goes when there is no trigger.

    example: (3, S, S) uint8
    """
    if trigger is None:
        storage.delete(path)
        return
    stamped = decree.stamp(example[None], trigger.mask, trigger.pattern)[0] / 255
    mask, pattern = trigger.mask.expand(3, -1, -1), trigger.pattern / 255
    cells = [(mask, f"mask {trigger.pixels:.0f} px"), (pattern, "pattern"), (mask * pattern, "mask * pattern")]
    plots.write_sheet(path, [*cells, (example / 255, "image"), (stamped, "stamped")], columns=5)


def _page(out: str, encoder: EncoderSpec, numbers: InspectReport, text: str) -> bytes:
    best, picture = numbers.best, storage.join(out, "trigger.png")
    cards = [
        ("Verdict", numbers.verdict.verdict, numbers.verdict.reason),
        ("Smallest trigger", f"L1 {best.l1:.1f}" if best else "none", f"{best.pixels:.1f} pixels" if best else ""),
        ("Images", f"{numbers.images:,}", f"mean pairwise cosine {numbers.plain_cosine:.3f} without a trigger"),
        ("Clean peers", str(len(numbers.peers)), ""),
    ]
    record = [("encoder", encoder.weights or encoder.architecture), ("fingerprint", numbers.encoder_fingerprint)]
    record += [(f"version of {name}", version) for name, version in sorted(numbers.versions.items())]
    sections = [Section("In words", text="; ".join(line.strip() for line in text.splitlines()))]
    if storage.exists(picture):
        shots = [(png_uri(storage.read_bytes(picture)), "mask, pattern, both, an image without and with them")]
        sections.append(Section("The smallest trigger", shots=shots))
    return plain_page("Is the encoder trojaned?", out, cards, [*sections, Section("What was inspected", record=record)])
