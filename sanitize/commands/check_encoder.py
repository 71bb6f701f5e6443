"""`sanitize check-encoder`: embed a few images and say what is seen, before an hour of work on a wrong mean or layout.

shards → a few images (labels and captions where they are) → embeddings → numbers that should look right → notes where they do not.
"""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from sanitize import runtime
from sanitize.config import EncoderSpec
from sanitize.errors import ConfigError, check
from sanitize.paths import AnyPath, path_texts
from sanitize.records import DecodedImage, Sample, Shard
from sanitize.stages.encoders import Encoder, embed_in_batches, load_encoder
from sanitize.stages.images import decode_sample, shrink, to_batch
from sanitize.stages.preprocessing import own_preprocessing
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import list_shards, open_shard
from sanitize.stages.text import load_text_encoder
from sanitize.training.labels import MAX_LABEL_BYTES, label_of

log = logging.getLogger(__name__)
MIN_IMAGES = 8


@dataclass(frozen=True)
class EncoderCheck:
    """numbers: by name, rates in [0, 1]; notes: what does not look right, in words; text is for the terminal."""

    encoder: EncoderSpec
    fingerprint: str
    images: int
    embedding_size: int
    numbers: dict[str, float]
    notes: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Seen:
    """What is embedded. images: (N, 3, S, S) uint8; labels: -1 = none; captions: "" = none."""

    images: Tensor
    names: list[str]
    labels: list[int]
    captions: list[str]


def check_encoder(encoder: EncoderSpec, patterns: Sequence[AnyPath] = (), limit: int = 64) -> EncoderCheck:
    """Load the encoder, embed up to `limit` images of the shards (without shards: random ones), and measure.

    Raises CheckpointError or ConfigError when it cannot be loaded.
    """
    check(limit >= MIN_IMAGES, f"limit: {limit} images are too few to compare. Give at least {MIN_IMAGES}.")
    loaded = load_encoder(encoder).to(runtime.device())
    patterns = path_texts(patterns, "patterns")
    seen = _from_shards(patterns, loaded.spec, limit) if patterns else _random_images(loaded.spec, limit)
    start = time.monotonic()
    embeddings = embed_in_batches(loaded, seen.images, batch_size=16)
    seconds = time.monotonic() - start
    numbers = _numbers(loaded, seen, embeddings) if patterns else _norms(embeddings)
    numbers |= {"images_per_second": len(seen.images) / max(seconds, 1e-9)}
    notes = (*_own_config_notes(loaded.spec), *_notes(numbers, embeddings))
    fingerprint = loaded.fingerprint()
    lines = _lines(loaded.spec, fingerprint, seen, embeddings, numbers, real=bool(patterns))
    text = "\n".join([*lines, *(f"  note: {note}" for note in notes)])
    return EncoderCheck(loaded.spec, fingerprint, len(seen.images), embeddings.shape[1], numbers, tuple(notes), text)


# ---------------------------------------------------------------- images


def _from_shards(patterns: Sequence[str], spec: EncoderSpec, limit: int) -> Seen:
    """The same number from the head of every shard, where it has them."""
    shards = list_shards(patterns)[:limit]
    share = -(-limit // len(shards))
    found = [item for shard in shards for item in itertools.islice(_usable(shard, spec), share)][:limit]
    if len(found) < MIN_IMAGES:
        raise ConfigError(
            f"{', '.join(patterns)}: {len(found)} usable images, at least {MIN_IMAGES} are needed to compare them. Give more shards."
        )
    pixels = [image.pixels for image, _ in found if image.pixels is not None]
    batch = to_batch(pixels, spec.image_size, spec.resize, torch.device("cpu"))
    return Seen(
        (batch * 255).round().clamp(0, 255).byte(),
        [image.key for image, _ in found],
        [label for _, label in found],
        [image.caption for image, _ in found],
    )


def _usable(shard: Shard, spec: EncoderSpec) -> Iterator[tuple[DecodedImage, int]]:
    with open_shard(shard) as file:
        caption_member = "txt" if spec.tokenizer else ""
        reader = ShardReader(file, shard, with_images=False, caption_member=caption_member)
        for sample in reader.samples():
            member = reader.image_of(sample)
            image = decode_sample(replace(sample, image=reader.content(member) if member else None))
            if image.pixels is not None:
                yield image, _label(reader, sample)


def _label(reader: ShardReader, sample: Sample) -> int:
    member = next((m for m in sample.members if m.extension == "cls" and m.size <= MAX_LABEL_BYTES), None)
    return label_of(reader.content(member), "")[0] if member else -1


def _random_images(spec: EncoderSpec, count: int) -> Seen:
    """Smooth random colours: enough to see that the encoder works, not that it sees."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = functional.interpolate(coarse, (spec.image_size, spec.image_size), mode="bilinear")
    return Seen((images * 255).byte(), [f"random {number}" for number in range(count)], [-1] * count, [""] * count)


# ---------------------------------------------------------------- numbers


def _norms(embeddings: Tensor) -> dict[str, float]:
    """Of raw embeddings (N, D), and the mean cosine of two different ones."""
    norms = embeddings.norm(dim=1)
    quantiles = {name: float(norms.quantile(q)) for name, q in (("low", 0.05), ("median", 0.5), ("high", 0.95))}
    cosines = _cosines(embeddings)
    different = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
    return {f"norm_{name}": value for name, value in quantiles.items()} | {"mean_cosine": float(different.mean())}


def _cosines(embeddings: Tensor) -> Tensor:
    unit = functional.normalize(embeddings, dim=1)
    return unit @ unit.T


def _numbers(encoder: Encoder, seen: Seen, embeddings: Tensor) -> dict[str, float]:
    pixels = (seen.images.float() / 255 - encoder.mean.cpu()) / encoder.std.cpu()
    numbers = _norms(embeddings) | {"pixel_mean": float(pixels.mean()), "pixel_std": float(pixels.std())}
    cropped = embed_in_batches(encoder, _cropped(seen.images), batch_size=16)
    cosines = functional.normalize(cropped, dim=1) @ functional.normalize(embeddings, dim=1).T
    numbers["cropped_finds_itself"] = _share(cosines.argmax(dim=1) == torch.arange(len(cosines)))
    numbers |= _agreement(seen.labels, _nearest(embeddings))
    if encoder.spec.tokenizer and all(seen.captions):
        texts = load_text_encoder(encoder.spec).to(runtime.device())(seen.captions).cpu()
        best = (functional.normalize(embeddings, dim=1) @ texts.T).argmax(dim=1)
        same = [seen.captions[int(row)] == caption for row, caption in zip(best, seen.captions, strict=True)]
        chance = sum(seen.captions.count(caption) for caption in seen.captions) / len(same) ** 2
        numbers |= {"own_caption_is_best": sum(same) / len(same), "own_caption_by_chance": chance}
    return numbers


def _cropped(images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 without a sixteenth at each border, at the same size."""
    border = -(-images.shape[-1] // 16)
    inner = images[..., border:-border, border:-border].float()
    return shrink(inner, images.shape[-1]).round().clamp(0, 255).byte() if inner.numel() else images


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())


def _nearest(embeddings: Tensor) -> Tensor:
    """(N,) int64: the most similar other image of each."""
    return _cosines(embeddings).fill_diagonal_(-2).argmax(dim=1)


def _agreement(labels: list[int], nearest: Tensor) -> dict[str, float]:
    """How often the nearest image has the same class; nothing without labels, or where hardly any two images share one."""
    known = torch.tensor(labels)
    if bool((known < 0).any()) or len(set(labels)) < 2:
        return {}
    same = (known[:, None] == known[None, :]).float()
    chance = float((same.sum() - len(known)) / (len(known) * (len(known) - 1)))
    if chance < 0.02:
        return {}
    return {"neighbour_of_its_class": _share(known[nearest] == known), "neighbour_by_chance": chance}


# ---------------------------------------------------------------- words


def _own_config_notes(spec: EncoderSpec) -> list[str]:
    """Where the YAML says something else than the model's own config."""
    own = own_preprocessing(spec.architecture)
    if not spec.architecture.startswith(("hf:", "timm:", "torchvision:")):
        return []
    return [
        f"{name} is {_shown(getattr(spec, name))}, {own.source} has {_shown(getattr(own, name))}"
        for name in ("image_size", "mean", "std")
        if getattr(own, name) and _shown(getattr(own, name)) != _shown(getattr(spec, name))
    ]


def _notes(numbers: dict[str, float], embeddings: Tensor) -> Iterator[str]:
    if not bool(torch.isfinite(embeddings).all()):
        yield "some embeddings are NaN or infinite. These weights cannot be used as they are"
    if abs(numbers.get("pixel_mean", 0)) > 1.5 or not 0.35 < numbers.get("pixel_std", 1) < 2.5:
        yield (
            f"normalised pixels have mean {numbers['pixel_mean']:.2f} and standard deviation {numbers['pixel_std']:.2f}; about 0 "
            "and 1 are usual. mean and std are of pixels in [0, 1]: are these the encoder's own?"
        )
    if numbers["mean_cosine"] > 0.98 or numbers["norm_median"] == 0:
        yield "embeddings of different images are nearly the same. Do weights, architecture, mean and std belong together?"
    if numbers.get("cropped_finds_itself", 1) < 0.5:
        yield "slightly cropped images rarely find themselves. Do weights, architecture, mean and std belong together?"
    for found, chance, what in (
        ("neighbour_of_its_class", "neighbour_by_chance", "nearest neighbours share a class"),
        ("own_caption_is_best", "own_caption_by_chance", "images find their own caption"),
    ):
        if found in numbers and numbers[found] < 2 * numbers[chance] < 1:
            yield f"{what} hardly more often than by chance. Do weights, architecture, mean and std belong together?"


def _shown(value: object) -> str:
    return " ".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else str(value)


def _lines(
    spec: EncoderSpec, fingerprint: str, seen: Seen, embeddings: Tensor, numbers: dict[str, float], *, real: bool
) -> Iterator[str]:
    device = runtime.device().type
    yield f"{spec.architecture}: fingerprint {fingerprint[:12]}"
    pooling = f", pooling {spec.pooling}" if spec.pooling else ""
    yield f"  input: {spec.image_size} pixels ({spec.resize}), mean {_shown(spec.mean)}, std {_shown(spec.std)}{pooling}"
    kind = "images" if real else "random images"
    speed = numbers["images_per_second"]
    yield f"  {len(embeddings)} {kind}: embeddings of {embeddings.shape[1]} numbers, {speed:.1f} images/s on the {device}"
    low, median, high = (numbers[f"norm_{name}"] for name in ("low", "median", "high"))
    yield f"  norms: {median:.3g} ({low:.3g} to {high:.3g}); cosine of two different images: {numbers['mean_cosine']:.2f}"
    if not real:
        yield "  name shards of your images, too, to see neighbours: sanitize check-encoder encoder.yaml aux/"
        return
    yield f"  normalised pixels: mean {numbers['pixel_mean']:.2f}, standard deviation {numbers['pixel_std']:.2f}"
    yield f"  a slightly cropped image finds itself: {numbers['cropped_finds_itself']:.0%}"
    for found, chance, what in (
        ("neighbour_of_its_class", "neighbour_by_chance", "nearest neighbour is of the same class"),
        ("own_caption_is_best", "own_caption_by_chance", "own caption is the most similar"),
    ):
        if found in numbers:
            yield f"  {what}: {numbers[found]:.0%} (by chance {numbers[chance]:.0%})"
    nearest = _nearest(embeddings)
    cosines = _cosines(embeddings)
    for row in range(min(3, len(nearest))):
        other = int(nearest[row])
        yield f"  nearest to {seen.names[row]}: {seen.names[other]} ({float(cosines[row, other]):.2f})"
