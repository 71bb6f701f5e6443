"""What the data path of `sanitize scan` can do when its encoder costs nothing, beside Pillow alone on all cores.

    python -m benchmarks.scan --encoder null [--count 2000] [--workers 0]

The encoder takes every so-manieth pixel; the scorer is `lowres` with the smallest decoder. All else is a real scan: read, hash, decode,
resize, Parquet, markers. Start-up is taken off.
CPU: processor seconds, which other work on the machine hardly changes; of a scan in this process.
"""

import json
from pathlib import Path

from torch import Tensor, nn

from benchmarks.data import MIXED, write_shards
from benchmarks.raw_decode import raw_decode
from benchmarks.scan_rate import OUT, scan_rate
from sanitize.artifacts.encoder_folder import export_encoder
from sanitize.commands.fit import fit
from sanitize.config import FitConfig, TrainingConfig
from sanitize.config_models import DecoderConfig
from sanitize.process import usable_cpus
from sanitize.profile import STAGES
from sanitize.stages.shards import list_shards

KINDS = (  # title, size, format, side that the encoder sees, images for each 2000 of --count
    ("32 px PNG", 32, "PNG", 32, 4000),
    ("224 px JPEG", 224, "JPEG", 224, 1000),
    ("500 px JPEG", 500, "JPEG", 224, 400),
    ("mixed sizes, JPEG", MIXED, "JPEG", 224, 400),
)
SMALLEST = DecoderConfig(image_size=8, patch_size=8, width=8, heads=1, encoder_depth=1, decoder_depth=1)


class EveryPixel(nn.Module):
    """(B, 3, S, S) → (B, 48): 16 pixels of a regular grid."""

    def forward(self, images: Tensor) -> Tensor:
        step = images.shape[-1] // 4
        return images[:, :, ::step, ::step].flatten(1)


def null_detector(side: int) -> Path:
    folder = OUT / f"null-{side}"
    if not (folder / "detector" / "detector.json").exists():
        spec = export_encoder(EveryPixel(), folder, image_size=side, mean=(0.5,) * 3, std=(0.5,) * 3)
        auxiliary = write_shards(OUT / f"aux-{side}", 512, side, "JPEG", 1, seed=9)
        training = TrainingConfig(epochs=1, calibration_fraction=0.5)
        config = FitConfig(
            (str(auxiliary),), spec, str(folder / "detector"), SMALLEST, training, scorer="lowres", workers=0
        )
        fit(config)
    return folder / "detector"


def measure_data_path(count: int, workers: tuple[int, ...]) -> None:
    """Print images/s of each kind of image, and what of the seconds went where."""
    for title, size, kind, side, share in KINDS:
        images = max(share * count // 2000, 8)
        shards = write_shards(OUT / f"path-{size}-{images}", images, size, kind, 4)
        detector = null_detector(side)
        bound, cpu_bound = raw_decode([shard.url for shard in list_shards([str(shards)])], usable_cpus())
        print(f"\n{title}: {images} images, {usable_cpus()} cores", flush=True)
        print(
            f"  {'Pillow alone, all cores':42s} {bound:9.1f} images/s, CPU {1e6 * cpu_bound:.0f} us an image",
            flush=True,
        )
        for number in workers:
            rate, startup, cpu = scan_rate(shards, detector, number, images)
            name = f"sanitize scan, {number} workers"
            print(f"  {name:42s} {rate:9.1f} images/s = {rate / bound:.0%} of it, start-up {startup:.1f} s", flush=True)
            if not number:
                print(
                    f"    CPU {1e6 * cpu:.0f} us an image: {cpu_bound / cpu:.0%} of it is what Pillow takes", flush=True
                )
            profile = json.loads((OUT / "scanned" / "profile.json").read_text())
            spent = [f"{stage} {1e6 * profile['seconds'][stage] / profile['samples']:.0f}" for stage in STAGES]
            print(f"    microseconds an image: {', '.join(spent)}; bound by {profile['bound_by']}", flush=True)
