"""Throughput of `sanitize scan` beside what the machine can do, measured in the same run.

    python -m benchmarks.scan [--small 20000] [--large 2048] [--transformer 1024] [--effort thorough]
    python -m benchmarks.scan --encoder null        what the data path alone can do: benchmarks/data_path.py

decode only: read, hash and decode all shards on all cores. model only: encoder passes + decoder + score on images already in memory.
bound: both share the cores, so 1 / (1/decode + 1/model). serial loop: read, decode, score, one after the other. published loop: the same
with the decoder and the score of DeDe, one encoder pass, batches of 128, fp32, and the encoder as its code runs it (eager, contiguous,
nothing folded); and once more with the encoder as we run it.
scan: the command's function on Ray, start-up (wall time of a scan of 2 images) taken off and reported apart.
"""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import safetensors.torch
import torch

from benchmarks.data import write_shards
from benchmarks.data_path import measure_data_path
from benchmarks.scan_rate import BATCH, OUT, scan_rate
from sanitize import runtime, storage
from sanitize.artifacts.detector_folder import load_detector, load_matching_encoder, make_scorer
from sanitize.commands.fit import fit
from sanitize.config import EncoderSpec, FitConfig, TrainingConfig
from sanitize.config_loading import from_mapping
from sanitize.presets import preset
from sanitize.process import prepare, usable_cpus
from sanitize.records import DecodedImage
from sanitize.stages.encoders import build_backbone, load_encoder
from sanitize.stages.images import decode_sample
from sanitize.stages.perturbations import encoder_passes
from sanitize.stages.precision import autocast
from sanitize.stages.prefetch import image_batches
from sanitize.stages.preprocessing import complete_spec
from sanitize.stages.scoring import Scorer
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import list_shards

CIFAR = EncoderSpec("resnet18-cifar", image_size=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def detector_for(spec: EncoderSpec, name: str, preset_name: str = "default") -> Path:
    """A detector for an encoder, with random weights where it has none: speed does not depend on their values."""
    folder, spec = OUT / name, complete_spec(spec)
    out = folder / ("detector" if preset_name == "default" else preset_name)
    if not (out / "detector.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not spec.weights:
            torch.manual_seed(0)
            tensors = {k: v.contiguous() for k, v in build_backbone(spec).state_dict().items()}
            spec = replace(spec, weights=str(folder / "encoder.safetensors"))
            safetensors.torch.save_file(tensors, spec.weights)
        auxiliary = write_shards(OUT / f"aux-{spec.image_size}", 640, spec.image_size, "JPEG", 1, seed=9)
        values = preset(preset_name) | {"training": TrainingConfig(epochs=1, calibration_fraction=0.5)}
        values |= {"shards": [str(auxiliary)], "encoder": spec, "out": str(out), "workers": 0}
        fit(from_mapping(FitConfig, values, "fit"))
    return out


def timed(function: Callable[[], int]) -> float:
    """Images per second."""
    start = time.perf_counter()
    count = function()
    return count / (time.perf_counter() - start)


def decode_only(shards: Path) -> int:
    count = 0
    for shard in list_shards([str(shards)]):
        with storage.open_read(shard.url) as file:
            count += sum(len(b) for b in image_batches(ShardReader(file, shard).samples(), BATCH, usable_cpus()))
    return count


def all_images(shards: Path, limit: int) -> list[DecodedImage]:
    decoded: list[DecodedImage] = []
    for shard in list_shards([str(shards)]):
        with storage.open_read(shard.url) as file:
            for sample in ShardReader(file, shard).samples():
                decoded.append(decode_sample(sample))
                if len(decoded) == limit:
                    return decoded
    return decoded


def serial_loop(shards: Path, scorer: Scorer, batch_size: int) -> int:
    done = 0
    for shard in list_shards([str(shards)]):
        with storage.open_read(shard.url) as file:
            decoded = map(decode_sample, ShardReader(file, shard).samples())
            while batch := list(itertools.islice(decoded, batch_size)):
                done += len(scorer(batch)["score"])
    return done


def scorer_of(detector: Path, effort: str, precision: str = "auto") -> Scorer:
    loaded = load_detector(str(detector))
    return make_scorer(loaded, load_matching_encoder(loaded, None), precision, torch.device("cpu"), effort=effort)


def published_scorer(spec: EncoderSpec, name: str, *, plain: bool) -> Scorer:
    """DeDe's. plain: with the encoder as it was loaded, contiguous and not folded."""
    scorer = scorer_of(detector_for(spec, name, "paper"), "thorough", "fp32")
    if plain:
        encoder = load_encoder(scorer.encoder.spec).eval()
        encoder._layout = torch.contiguous_format
        scorer.encoder = encoder.to(memory_format=torch.contiguous_format)
    return scorer


def measure(title: str, shards: Path, spec: EncoderSpec, name: str, count: int, effort: str) -> None:
    detector = detector_for(spec, name)
    scorer = scorer_of(detector, effort)
    torch.set_num_threads(usable_cpus())
    decoded = all_images(shards, min(count, 4096))
    batches = [decoded[i : i + BATCH] for i in range(0, len(decoded), BATCH)]
    scorer(batches[0])
    images = [scorer.embed(batch)[0] for batch in batches[:4]]

    def encoder_only() -> int:
        with torch.inference_mode(), autocast(scorer.device, scorer.dtype):
            return sum(len(scorer.encoder(batch)) for batch in images)

    passes: list[float] = []

    def model_only() -> int:
        for columns in map(scorer, batches):
            passes.append(encoder_passes(columns))
        return len(decoded)

    print(f"\n{title}: {count} images, {usable_cpus()} cores, {scorer.dtype}", flush=True)
    encoder_rate, decode_rate, model_rate = timed(encoder_only), timed(lambda: decode_only(shards)), timed(model_only)
    bound = 1 / (1 / decode_rate + 1 / model_rate)
    serial = timed(lambda: serial_loop(shards, scorer, BATCH))
    loops = [published_scorer(spec, name, plain=plain) for plain in (True, False)]
    published, ours = (timed(partial(serial_loop, shards, loop, 128)) for loop in loops)
    rows = [
        ("encoder forward only", encoder_rate),
        (f"model only, {np.mean(passes):.2f} passes", model_rate),
        ("decode only", decode_rate),
        ("bound (decode and model share the cores)", bound),
        ("serial loop", serial),
        ("published loop, fp32", published),
        ("published loop, our encoder", ours),
    ]
    for label, rate in rows:
        print(f"  {label:42s} {rate:9.1f} images/s", flush=True)
    for workers in (0, 1, 2):
        rate, startup, _ = scan_rate(shards, detector, workers, count, effort)
        shares = (
            f"{rate / bound:.0%} of bound, {rate / encoder_rate:.0%} of the encoder, {rate / published:.2f} x published"
        )
        print(
            f"  {f'sanitize scan, {workers} workers':42s} {rate:9.1f} images/s = {shares}, start-up {startup:.1f} s",
            flush=True,
        )


@click.command()
@click.option("--small", default=20_000, show_default=True, help="32 px PNGs, ResNet-18 with 3x3 stem")
@click.option("--large", default=2_048, show_default=True, help="224 px JPEGs, ResNet-18")
@click.option("--transformer", default=1_024, show_default=True, help="224 px JPEGs, ViT-B/32")
@click.option(
    "--effort", default="0.075", show_default=True, help="As of a scan; a random encoder has no default of its own"
)
@click.option("--encoder", type=click.Choice(["resnet18", "null"]), default="resnet18", show_default=True)
@click.option("--count", default=2_000, show_default=True, help="Images, about, of each kind; with --encoder null")
@click.option(
    "--workers", default="0", show_default=True, help="Numbers of workers, 0,2 for example; with --encoder null"
)
def main(small: int, large: int, transformer: int, effort: str, encoder: str, count: int, workers: str) -> None:
    """Print images/s of scan and of its bounds."""
    prepare()
    if encoder == "null":
        with runtime.ray_session("") if workers != "0" else contextlib.nullcontext():
            measure_data_path(count, tuple(int(number) for number in workers.split(",")))
        return
    with runtime.ray_session(""):
        for title, kind, count, spec, name in (
            ("32 px PNG", "PNG", small, CIFAR, "encoder-32"),
            ("224 px JPEG", "JPEG", large, EncoderSpec("resnet18"), "encoder-224"),
            ("224 px JPEG, ViT-B/32", "JPEG", transformer, EncoderSpec("torchvision:vit_b_32"), "encoder-vit"),
        ):
            if count:
                size = spec.image_size or 224
                shards = write_shards(OUT / f"shards-{size}-{count}", count, size, kind, 4)
                measure(title, shards, spec, name, count, effort)


if __name__ == "__main__":
    main()
