"""CLIP towers from a local OpenAI or open_clip checkpoint: the architecture is read off the tensors' shapes.

Layouts and rules are those of the code of openai/CLIP and mlfoundations/open_clip (factory.py). A ViT has "proj", anything else
is a ModifiedResNet with attention pooling. The file does not say which GELU it was trained with: OpenAI's weights need QuickGELU,
most open_clip ones the exact GELU.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.errors import CheckpointError

HEAD_WIDTH = 64


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), OpenAI's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# ---------------------------------------------------------------- vision transformer


class ResidualBlock(nn.Module):
    """(B, N, d) → (B, N, d); parameter names are the checkpoint's."""

    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": activation, "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        mixed: Tensor = tokens + self.mlp(self.ln_2(tokens))
        return mixed


class VisionTransformer(nn.Module):
    """(B, 3, S, S) → (B, D)"""

    def __init__(self, width: int, patch: int, grid: int, layers: int, size: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(grid * grid + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [ResidualBlock(width, width // HEAD_WIDTH, activation) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, size))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        tokens = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        tokens = self.transformer["resblocks"](tokens)
        embeddings: Tensor = self.ln_post(tokens[:, 0]) @ self.proj
        return embeddings


# ---------------------------------------------------------------- ModifiedResNet


class ResNetBlock(nn.Module):
    """Bottleneck whose stride is an average pool after conv2 and before the shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample: nn.Module | None = None
        if stride > 1 or inputs != 4 * planes:
            shortcut = nn.Sequential()
            shortcut.add_module("0", nn.Conv2d(inputs, 4 * planes, 1, bias=False))
            shortcut.add_module("1", nn.BatchNorm2d(4 * planes))
            self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(self.pool(x))
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.pool(functional.relu(self.bn2(self.conv2(x))))
        return functional.relu(self.bn3(self.conv3(x)) + shortcut)


class AttentionPool(nn.Module):
    """(B, C, H, W) → (B, D): attention of the mean token over all places."""

    def __init__(self, grid: int, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(grid * grid + 1, channels))
        self.q_proj, self.k_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.v_proj, self.c_proj = nn.Linear(channels, channels), nn.Linear(channels, size)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1) + self.positional_embedding

        def split(y: Tensor) -> Tensor:
            heads: Tensor = y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            return heads

        query, key, value = split(self.q_proj(tokens[:, :1])), split(self.k_proj(tokens)), split(self.v_proj(tokens))
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        pooled: Tensor = self.c_proj(mixed)[:, 0]
        return pooled


class ModifiedResNet(nn.Module):
    """(B, 3, S, S) → (B, D)"""

    def __init__(self, width: int, layers: list[int], grid: int, size: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for stage, count in enumerate(layers):
            planes, blocks = width << stage, []
            for block in range(count):
                blocks.append(ResNetBlock(inputs, planes, 2 if stage and not block else 1))
                inputs = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(grid, inputs, width * 32 // HEAD_WIDTH, size)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.avg_pool2d(functional.relu(self.bn3(self.conv3(x))), 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        pooled: Tensor = self.attnpool(x)
        return pooled


# ---------------------------------------------------------------- text tower


class TextTransformer(nn.Module):
    """(B, L) int64 token ids → (B, D). The end token must have the largest id: its position is read out."""

    mask: Tensor

    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, size: int, activation: nn.Module
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        blocks = [ResidualBlock(width, width // HEAD_WIDTH, activation) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, size))
        causal = torch.full((context, context), float("-inf")).triu(1)  # a token sees those before it
        self.register_buffer("mask", causal, persistent=False)

    @property
    def context(self) -> int:
        return len(self.positional_embedding)

    @property
    def vocabulary(self) -> int:
        return self.token_embedding.num_embeddings

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer["resblocks"].children():
            hidden = block(hidden, self.mask)
        last = self.ln_final(hidden)[torch.arange(len(tokens)), tokens.argmax(dim=1)]
        embeddings: Tensor = last @ self.text_projection
        return embeddings


# ---------------------------------------------------------------- loading


def image_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The image tower's tensors as float32: those under "visual.", or all of a file that holds nothing else."""
    names = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    visual = {name.removeprefix("visual."): t.float() for name, t in names.items() if name.startswith("visual.")}
    if not visual and "conv1.weight" in names and ("proj" in names or "attnpool.c_proj.weight" in names):
        visual = {name: tensor.float() for name, tensor in names.items()}
    if any(name.startswith(("trunk.", "head.")) for name in visual):
        raise CheckpointError(
            f"{where}: its image tower is a timm model (visual.trunk.*). Use architecture timm:<name>."
        )
    if not visual:
        raise CheckpointError(
            f"{where}: no CLIP image tower in it (no tensor named visual.*). Give an OpenAI-CLIP or open_clip state dict."
        )
    return visual


def build_image_tower(visual: Mapping[str, Tensor], where: str, *, quick_gelu: bool) -> tuple[nn.Module, int]:
    """(tower with fresh weights, side of its input in pixels), inferred from shapes."""
    try:
        if "proj" in visual:
            width, size = visual["proj"].shape
            patch = visual["conv1.weight"].shape[-1]
            grid = round((len(visual["positional_embedding"]) - 1) ** 0.5)
            layers = sum(name.endswith("attn.in_proj_weight") for name in visual)
            activation = QuickGELU() if quick_gelu else nn.GELU()
            return VisionTransformer(width, patch, grid, layers, size, activation), patch * grid
        width = visual["layer1.0.conv1.weight"].shape[0]
        found = [re.match(r"layer(\d)\.(\d+)\.conv1\.weight", name) for name in visual]
        counts = [sum(m is not None and m[1] == str(stage) for m in found) for stage in range(1, 5)]
        grid = round((len(visual["attnpool.positional_embedding"]) - 1) ** 0.5)
        return ModifiedResNet(width, counts, grid, len(visual["attnpool.c_proj.weight"])), 32 * grid
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{where}: its image tower is neither CLIP's ViT nor its ModifiedResNet ({error} is missing or odd)."
        ) from None


def text_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The text tower's tensors as float32: the plain layout, or that of CustomTextCLIP under "text."."""
    names = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if any(name.startswith("text.transformer.") for name in names):
        names = {name.removeprefix("text."): tensor for name, tensor in names.items() if name.startswith("text.")}
    text = {n: t.float() for n, t in names.items() if n.startswith(_TEXT)}
    if "token_embedding.weight" not in text or "text_projection" not in text:
        other = any(name.startswith(("text.", "module.text.")) for name in tensors)
        hint = "another text model than CLIP's" if other else "image tower only"
        raise CheckpointError(
            f"{where}: no CLIP text tower in it ({hint}; token_embedding.weight and text_projection were looked for). Give "
            "the whole CLIP checkpoint, or remove `tokenizer` from the encoder YAML to scan without captions."
        )
    return text


_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def build_text_tower(text: Mapping[str, Tensor], where: str, *, quick_gelu: bool) -> TextTransformer:
    """The tower with fresh weights, inferred from shapes."""
    try:
        vocabulary, width = text["token_embedding.weight"].shape
        layers = sum(name.endswith("attn.in_proj_weight") for name in text)
        activation = QuickGELU() if quick_gelu else nn.GELU()
        context, size = len(text["positional_embedding"]), text["text_projection"].shape[1]
        return TextTransformer(vocabulary, context, width, layers, size, activation)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{where}: its text tower is not CLIP's transformer ({error} is missing or odd)."
        ) from None
