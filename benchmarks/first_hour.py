"""The first hour of five users: their data and their encoder, in a fresh environment, with the seconds of every command.

    python -m benchmarks.first_hour --images 300 --page docs/first_hour.md

Images are photographs of ../shared/data where that is there, else crops of scikit-learn's two. Weights are random values of real
architectures, written by their own libraries: what is measured is whether and how fast the path works, not what is found.
"""

import argparse
import contextlib
import csv
import io
import itertools
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.data import random_crops
from pipelines import page

ROOT = Path(__file__).parents[1]
SIZE = 224
EXTRAS = "clip,hf,timm,s3"


@dataclass(frozen=True)
class User:
    """data(folder, count) and encoder(folder) write what they have; commands make an encoder.yaml, look at it, fit, scan and list."""

    name: str
    data: Callable[[Path, int], None]
    encoder: Callable[[Path], None]
    commands: tuple[str, ...]


# ---------------------------------------------------------------- data


def jpegs(count: int) -> Iterator[bytes]:
    for crop in itertools.islice(random_crops(SIZE), count):
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def folders(folder: Path, count: int) -> None:
    """photos/ and aux-photos/, half of the images each."""
    for number, data in enumerate(jpegs(count)):
        path = folder / ("photos", "aux-photos")[number % 2] / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def captioned(folder: Path, count: int) -> None:
    """The same with pairs.csv and aux-pairs.csv, a caption for every photo."""
    folders(folder, count)
    for name, part in (("pairs.csv", "photos"), ("aux-pairs.csv", "aux-photos")):
        with (folder / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "caption"])
            rows.writerows([f"{part}/{p.name}", f"photo number {p.stem}"] for p in sorted((folder / part).iterdir()))


def parquet(folder: Path, count: int) -> None:
    """What Hugging Face's `datasets` writes: a struct of bytes and path."""
    images = [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(jpegs(count))]
    for name, part in (("data", images[::2]), ("aux-data", images[1::2])):
        (folder / name).mkdir()
        pq.write_table(pa.table({"image": part}), folder / name / "train-00000.parquet", row_group_size=100)


def on_s3(folder: Path, count: int) -> None:
    """Shards in a bucket of the server that AWS_ENDPOINT_URL names."""
    import s3fs

    folders(folder, count)
    for part, name in (("photos", "shards"), ("aux-photos", "aux")):
        run(f"sanitize pack {part} {name} --shard-size 50", folder)
        files = s3fs.S3FileSystem()
        files.mkdirs("bucket", exist_ok=True)
        files.put(f"{folder / name}/", f"bucket/{name}/", recursive=True)


# ---------------------------------------------------------------- encoders


def huggingface(kind: str) -> Callable[[Path], None]:
    """The architecture of openai/clip-vit-base-patch32 or facebook/dinov2-small, by transformers' own save_pretrained."""

    def write(folder: Path) -> None:
        import transformers

        model: transformers.PreTrainedModel
        if kind == "clip":
            model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(projection_dim=512))
        else:
            config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIZE, patch_size=14)
            model = transformers.Dinov2Model(config)
        model.save_pretrained(folder / "model")
        transformers.CLIPImageProcessor().save_pretrained(folder / "model")

    return write


def open_clip_file(folder: Path) -> None:
    import open_clip

    torch.save(open_clip.create_model("ViT-B-32").state_dict(), folder / "clip.pt")
    (folder / "encoder.yaml").write_text(
        "architecture: clip\nweights: clip.pt\nimage_size: 224\nquick_gelu: false\ntokenizer: open_clip\n"
        "mean: [0.48145466, 0.4578275, 0.40821073]\nstd: [0.26862954, 0.26130258, 0.27577711]\n"
    )


def timm_file(folder: Path) -> None:
    import timm

    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), folder / "weights.pt")


def torchvision_file(folder: Path) -> None:
    import torchvision

    torch.save(torchvision.models.convnext_tiny().state_dict(), folder / "weights.pt")


# ---------------------------------------------------------------- users

INIT = "sanitize init --encoder"
LOOK = "sanitize check-encoder encoder.yaml"
USERS = (
    User(
        "folder of JPEG files, Hugging Face CLIP",
        folders,
        huggingface("clip"),
        (
            f"{INIT} hf:model",
            "sanitize pack photos shards",
            "sanitize pack aux-photos aux --labels none",
            f"{LOOK} aux",
            "sanitize fit aux --encoder encoder.yaml",
            "sanitize scan shards",
            "sanitize list scanned kept.txt --only kept",
        ),
    ),
    User(
        "Hugging Face Parquet, DINOv2",
        parquet,
        huggingface("dinov2"),
        (
            f"{INIT} hf:model",
            "sanitize pack data shards",
            "sanitize pack aux-data aux",
            f"{LOOK} aux",
            "sanitize fit aux --encoder encoder.yaml",
            "sanitize scan shards",
            "sanitize list scanned removed.csv --only removed",
        ),
    ),
    User(
        "tars on S3, timm ViT",
        on_s3,
        timm_file,
        (
            f"{INIT} timm:vit_tiny_patch16_224 --weights weights.pt",
            f"{LOOK} s3://bucket/aux",
            "sanitize fit s3://bucket/aux --encoder encoder.yaml --out s3://bucket/detector",
            "sanitize scan s3://bucket/shards --detector s3://bucket/detector --out s3://bucket/scanned",
            "sanitize verify s3://bucket/scanned",
        ),
    ),
    User(
        "CSV of photos and captions, open_clip",
        captioned,
        open_clip_file,
        (
            "sanitize pack pairs.csv shards",
            "sanitize pack aux-pairs.csv aux",
            f"{LOOK} aux",
            "sanitize fit aux --encoder encoder.yaml",
            "sanitize scan shards --caption-member txt",
            "sanitize audit scanned",
        ),
    ),
    User(
        "folder of JPEG files, torchvision ConvNeXt",
        folders,
        torchvision_file,
        (
            f"{INIT} torchvision:convnext_tiny --weights weights.pt",
            "sanitize pack photos shards",
            "sanitize pack aux-photos aux --labels none",
            f"{LOOK} aux",
            "sanitize fit aux --encoder encoder.yaml",
            "sanitize scan shards",
        ),
    ),
)


# ---------------------------------------------------------------- running


def run(command: str, folder: Path, programs: Path = Path(sys.executable).parent) -> float:
    """Seconds. The output of a command that fails is shown."""
    words = shlex.split(command)
    start = time.perf_counter()
    done = subprocess.run(
        [programs / words[0], *words[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - start


def install(folder: Path) -> tuple[Path, float]:
    """A fresh environment with sanitize and the extras; its programs, and the seconds that took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([folder / "venv" / "bin" / "pip", "install", "-q", f"{ROOT}[{EXTRAS}]"], check=True)
    return folder / "venv" / "bin", time.perf_counter() - start


@contextlib.contextmanager
def s3_server() -> Iterator[None]:
    """moto's, on this machine; s3fs and the commands find it in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="of each user to scan, and as many to fit on")
    parser.add_argument("--out", type=Path, default=Path("runs/first_hour"), help="a folder that does not exist yet")
    parser.add_argument(
        "--programs", type=Path, help="bin folder of an environment that is there, in place of a fresh one"
    )
    parser.add_argument("--users", type=int, default=len(USERS), help="only the first so many")
    parser.add_argument("--page", default="", help="Markdown page whose table is made anew")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    out, programs, lines = options.out.resolve(), options.programs, list[list[str]]()
    if not programs:
        programs, seconds = install(out)
        lines = [["everyone", f"`pip install .[{EXTRAS}]`", f"{seconds:.0f}"]]
    with s3_server():
        for number, user in enumerate(USERS[: options.users]):
            folder = out / str(number)
            folder.mkdir()
            user.data(folder, 2 * options.images)
            user.encoder(folder)
            for place, command in enumerate(user.commands):
                seconds = run(command, folder, programs)
                print(f"{user.name}: {command}: {seconds:.1f} s", flush=True)
                lines.append(["" if place else user.name, f"`{command}`", f"{seconds:.0f}"])
    table = page.table(["data, encoder", "command", "seconds"], lines)
    print(table)
    if options.page:
        page.replace(options.page, "first hour", table)


if __name__ == "__main__":
    main()
