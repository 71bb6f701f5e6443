"""The last step of PatchSearch (patch_search.py): a small network learns to see the most poisonous patches, and scores every image.

It is trained to tell images with one of the patches, pasted at random size and place, from images without (section 3 of the paper;
patch_search_poison_classifier.py of its code). Left out or smaller than there: three convolutions in place of a ResNet, one network in
place of five, gain in place of full colour jitter and grey, and no early stop by the least poisonous images.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.training.augment import random_views

_EXCLUDED = 0.1  # of the images, the most poisonous: they would teach that a patch is clean
_SMALLEST, _LARGEST = 20 / 224, 80 / 224  # side of a pasted patch, of the image's
_BATCH = 64
_LEARNING_RATE = 1e-3


@torch.enable_grad()  # whoever scores may have switched gradients off
def scores(images: Tensor, poison_scores: Tensor, patches: Tensor, steps: int, seed: int) -> Tensor:
    """(N,) float32 log odds that an image holds a patch.

    images: (N, 3, S, S) uint8, poison_scores: (N,), patches: (T, 3, w, w) uint8
    """
    kept = least_poisonous(poison_scores, seed)
    with torch.random.fork_rng(devices=[]):
        network = train(images[kept], patches, steps, seed)
    with torch.no_grad():
        return torch.cat([log_odds(network, part.float() / 255) for part in images.split(256)])


def least_poisonous(poison_scores: Tensor, seed: int) -> Tensor:
    """Indices of all but the most poisonous tenth; equal scores, such as those of images never tried, in random order."""
    shuffled = torch.randperm(len(poison_scores), generator=torch.Generator().manual_seed(seed))
    order = shuffled[poison_scores[shuffled].argsort(stable=True)]
    return order[: max(1, round((1 - _EXCLUDED) * len(order)))]


def train(images: Tensor, patches: Tensor, steps: int, seed: int) -> nn.Module:
    """A network of two outputs, clean and patched: every image of a batch gets a patch with probability 1/2."""
    torch.manual_seed(seed)
    network = small_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    for step in range(steps):
        drawn = torch.randint(len(images), (_BATCH,))
        views = random_views(images[drawn].float() / 255, drawn.numpy(), seed, step)
        patched = torch.rand(len(views)) < 0.5
        for number in patched.nonzero()[:, 0].tolist():
            paste_resized(views[number], patches[torch.randint(len(patches), ())].float() / 255)
        gain = 0.6 + 0.8 * torch.rand(len(views), 1, 1, 1)
        loss = functional.cross_entropy(network((views * gain).clamp(0, 1)), patched.long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network


def small_network() -> nn.Module:
    """(B, 3, S, S) → (B, 2). The maximum over places: a patch is small, and a mean would hardly move."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 2))


def paste_resized(image: Tensor, patch: Tensor) -> None:
    """Paste a patch (3, w, w) into an image (3, S, S), both float32 in [0, 1], in place, at random size and place."""
    size = image.shape[-1]
    side = int(torch.randint(max(round(_SMALLEST * size), 1), round(_LARGEST * size) + 1, ()))
    row, column = torch.randint(size - side + 1, (2,)).tolist()
    resized = functional.interpolate(patch[None], (side, side), mode="bilinear", align_corners=False)[0]
    image[:, row : row + side, column : column + side] = resized


def log_odds(network: nn.Module, images: Tensor) -> Tensor:
    """(B,) float32 of (B, 3, S, S) float32 images in [0, 1]."""
    outputs: Tensor = network(images)
    return outputs[:, 1] - outputs[:, 0]
