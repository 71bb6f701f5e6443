"""The encoder's forward pass as `fit` and `scan` run it beside the plain eager one, in turns, in one process.

    python -m benchmarks.encoder_forward [--rounds 5] [--only "ResNet-18, 32 px"] [--compile]

plain eager: the backbone as it was loaded, contiguous, under no_grad. channels last: ours without folding. ours: channels last, batch
normalisation folded (sanitize/stages/folding.py), inference mode. --compile: ours through torch.compile, which needs a C++ compiler, and
the images after which it has won its start-up back.
Random weights: speed does not depend on them. Milliseconds are of the processor, the least of all rounds. fp32.
"""

import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn

from benchmarks.scan import CIFAR
from sanitize.config import EncoderSpec
from sanitize.process import prepare, usable_cpus
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.folding import folded
from sanitize.stages.preprocessing import complete_spec

BATCH = 64
Forward = Callable[[Tensor], Tensor]
ENCODERS = {
    "ResNet-18, 32 px": CIFAR,
    "ResNet-18, 224 px": EncoderSpec("resnet18", image_size=224),
    "EfficientNet-Lite0, 224 px": EncoderSpec("timm:tf_efficientnet_lite0"),
    "ViT-B/32, 224 px": EncoderSpec("torchvision:vit_b_32"),
}


class Plain(nn.Module):
    """What somebody writes who has the backbone and its mean and std."""

    def __init__(self, backbone: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.backbone((images - self.mean) / self.std)
        return embeddings.flatten(1)


def backbone_of(spec: EncoderSpec) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(spec).eval().requires_grad_(False)


def variants(spec: EncoderSpec, compiled: bool) -> dict[str, Forward]:
    ours = folded(Encoder(backbone_of(spec), spec).eval())
    found: dict[str, Forward] = {
        "plain eager": torch.no_grad()(Plain(backbone_of(spec), spec)),
        "channels last": torch.inference_mode()(Encoder(backbone_of(spec), spec).eval()),
        "ours": torch.inference_mode()(ours),
    }
    if compiled:
        found["ours, compiled"] = torch.no_grad()(torch.compile(ours, dynamic=False))
    return found


def measure(title: str, spec: EncoderSpec, rounds: int, compiled: bool) -> None:
    images = torch.rand(BATCH, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    forwards = variants(spec, compiled)
    first: dict[str, float] = {}
    least: dict[str, float] = {}
    embeddings: dict[str, Tensor] = {}
    for name, forward in forwards.items():
        start = time.perf_counter()
        embeddings[name] = forward(images)
        first[name] = time.perf_counter() - start
    for _ in range(rounds):
        for name, forward in forwards.items():
            start = time.process_time()
            forward(images)
            seconds = (time.process_time() - start) / BATCH
            least[name] = min(seconds, least.get(name, seconds))
    print(f"\n{title}: batches of {BATCH}, {usable_cpus()} cores", flush=True)
    for name in forwards:
        apart = (embeddings[name] - embeddings["plain eager"]).norm(dim=1) / embeddings["plain eager"].norm(dim=1)
        ratio = least["plain eager"] / least[name]
        print(f"  {name:16s} {1e3 * least[name]:7.2f} ms an image, {ratio:.2f} x plain, apart {apart.max():.0e}")
    if compiled:
        startup, won = first["ours, compiled"] - first["ours"], least["ours"] - least["ours, compiled"]
        after = f"after {startup / won:,.0f} images" if won > 0 else "never"
        print(f"  compiling took {startup:.0f} s, won back {after}", flush=True)


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", type=click.Choice(list(ENCODERS)), multiple=True, help="Default: all")
@click.option("--compile", "compiled", is_flag=True)
def main(rounds: int, only: tuple[str, ...], compiled: bool) -> None:
    """Print milliseconds an image of each way to run the same encoder."""
    torch.set_num_threads(usable_cpus())
    for title in only or ENCODERS:
        measure(title, complete_spec(ENCODERS[title]), rounds, compiled)


if __name__ == "__main__":
    prepare()
    main()
