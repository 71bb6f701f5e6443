"""The DeDe model (Hou et al., CVPR 2025, arXiv 2411.16154): hide patches, encode the visible ones, join the embedding, reconstruct.

Shapes follow the reference code, src/decoder_model.py: T patches of P x P pixels, K = floor(T (1 - mask ratio)) of them visible,
width d. With K = 0 the patch encoder cannot change anything (measured on the reference model), so it does not run.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.config_models import DecoderConfig

BLOCK_EPSILON = 1e-6  # timm 1.0; fixed here because weights trained with one do not give the same numbers with another
NORM_EPSILON = 1e-5


class Block(nn.Module):
    """Pre-norm transformer block, MLP ratio 4, GELU, qkv without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=BLOCK_EPSILON)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=BLOCK_EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) → (B, N, d)"""
        batch, count, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, count, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, d / heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        mixed_again: Tensor = tokens + self.mlp(self.norm2(tokens))
        return mixed_again


class Decoder(nn.Module):
    """Embedding (and a few visible patches) → the image, in the encoder's normalised units."""

    embedding_mean: Tensor
    embedding_scale: Tensor

    def __init__(self, config: DecoderConfig, embedding_size: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.config = config
        self.num_patches = (config.image_size // patch) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.encoder_positions = nn.Parameter(torch.empty(self.num_patches, width))
        self.cls_token = nn.Parameter(torch.empty(width))
        self.encoder_blocks = nn.Sequential(*(Block(width, config.heads) for _ in range(config.encoder_depth)))
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.project_embedding = nn.Linear(embedding_size, width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder_positions = nn.Parameter(torch.empty(self.num_patches + 1, width))
        self.decoder_blocks = nn.Sequential(*(Block(width, config.heads) for _ in range(config.decoder_depth)))
        self.pixel_head = nn.Linear(width, 3 * patch * patch)
        self.register_buffer("embedding_mean", torch.zeros(embedding_size))
        self.register_buffer("embedding_scale", torch.ones(embedding_size))
        for parameter in (self.encoder_positions, self.cls_token, self.mask_token, self.decoder_positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self, embeddings: Tensor, images: Tensor | None = None, order: Tensor | None = None, visible: int = 0
    ) -> Tensor:
        """Reconstruct images from embeddings.

        embeddings: (B, D) raw. images: (B, 3, R, R) normalised, and order: (B, T) int64 permutation of the patches whose
        first `visible` are shown; both needed only when visible > 0. Returns (B, 3, R, R).
        """
        slot = self.project_embedding((embeddings - self.embedding_mean) / self.embedding_scale)[:, None]  # (B, 1, d)
        tokens = self.mask_token.to(slot.dtype).expand(len(embeddings), self.num_patches, -1)
        if visible and images is not None and order is not None:
            shown = order[:, :visible, None].expand(-1, -1, tokens.shape[-1])
            tokens = tokens.scatter(1, shown, self._encode(images, shown).to(tokens.dtype))
        tokens = torch.cat([slot, tokens], dim=1) + self.decoder_positions
        return self._fold(self.pixel_head(self.decoder_blocks(tokens)[:, 1:]))

    def _encode(self, images: Tensor, shown: Tensor) -> Tensor:
        """(B, K, d) encodings of the visible patches; the CLS output is discarded, the embedding takes its place."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.encoder_positions
        cls_token = self.cls_token.to(patches.dtype).expand(len(images), 1, -1)
        tokens = torch.cat([cls_token, patches.gather(1, shown)], dim=1)
        encoded: Tensor = self.encoder_norm(self.encoder_blocks(tokens))[:, 1:]
        return encoded

    def _fold(self, pixels: Tensor) -> Tensor:
        """(B, T, 3 P P), per token (channel, row, column) → (B, 3, R, R)"""
        side, patch = self.config.image_size // self.config.patch_size, self.config.patch_size
        grid = pixels.view(-1, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(-1, 3, side * patch, side * patch)


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """K = floor(T (1 - r)), with the reference's binary floating point: 49 (1 - 0.9) → 4."""
    return int(num_patches * (1 - mask_ratio))


def patch_order(sha256: str, num_patches: int, seed: int) -> np.ndarray:
    """(T,) int64 permutation, from a counter-based generator keyed by the image's bytes and the run: not by its batch."""
    key = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.permutation(num_patches)


def hidden_pixels(order: Tensor, visible: int, config: DecoderConfig) -> Tensor:
    """(B, 1, R, R) bool, True where the decoder did not see the image; order (B, T)."""
    side = config.image_size // config.patch_size
    hidden = torch.ones(order.shape, dtype=torch.bool, device=order.device)
    hidden.scatter_(1, order[:, :visible], False)
    grid = hidden.view(-1, 1, side, side)
    return grid.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
