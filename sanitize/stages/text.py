"""A CLIP's or SigLIP's text tower with its tokenizer: texts → unit embeddings."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.errors import ConfigError
from sanitize.stages import clip, huggingface
from sanitize.stages.encoders import device_of
from sanitize.stages.weights import load_strictly, read_weights


class Tokenizer(Protocol):
    def __call__(self, texts: Sequence[str], context: int) -> Tensor:
        """(B, context) int64, padded; longer texts are cut and keep their end token."""
        ...


class FileTokenizer:
    """A `tokenizer.json` of the tokenizers library, such as published beside every CLIP checkpoint on Hugging Face."""

    def __init__(self, path: str, padding: int = 0) -> None:
        from tokenizers import Tokenizer as Library

        data = storage.read_bytes(path)
        try:
            self._tokenizer = Library.from_buffer(data)
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ConfigError(
                f"{path}: not a tokenizer file ({str(error)[:100]}). Give the tokenizer.json of this CLIP, or `open_clip` for "
                "OpenAI's vocabulary."
            ) from None
        self._padding = padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, texts: Sequence[str], context: int) -> Tensor:
        tokens = torch.full((len(texts), context), self._padding, dtype=torch.int64)
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(texts))):
            ids = torch.tensor(encoding.ids, dtype=torch.int64)
            tokens[row, : min(len(ids), context)] = ids[:context]
            if len(ids) > context:
                tokens[row, -1] = ids[-1]
        return tokens


class OpenClipTokenizer:
    """OpenAI's byte-pair vocabulary, as the open_clip package ships it."""

    def __init__(self) -> None:
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ImportError:
            raise ConfigError(
                "tokenizer: open_clip is not installed. Run: pip install 'sanitize-shards[clip]', or give a tokenizer.json."
            ) from None
        self._tokenizer = SimpleTokenizer()

    def __call__(self, texts: Sequence[str], context: int) -> Tensor:
        tokens: Tensor = self._tokenizer(list(texts), context_length=context)
        return tokens


class TextEncoder:
    """Texts → (B, D) float32 unit embeddings, on the device of the tower."""

    def __init__(self, tower: clip.TextTransformer | huggingface.TextTower, tokenizer: Tokenizer) -> None:
        self.tower = tower
        self.tokenizer = tokenizer

    def to(self, device: torch.device) -> "TextEncoder":
        self.tower.to(device)
        return self

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        return functional.normalize(self.tower(self.tokens(texts)).float(), dim=1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(B, context) int64 on the device of the tower; only tokens that the tower knows."""
        tokens = self.tokenizer(texts, self.tower.context)
        largest = int(tokens.max())
        if largest >= self.tower.vocabulary:
            raise ConfigError(
                f"tokenizer: gives token {largest}, the text tower knows {self.tower.vocabulary}. Give the tokenizer of this very "
                "checkpoint."
            )
        return tokens.to(device_of(self.tower))


def load_text_encoder(spec: EncoderSpec) -> TextEncoder:
    """Text tower and tokenizer of an encoder whose YAML names a `tokenizer`. Raises CheckpointError or ConfigError."""
    tower, padding = _huggingface_tower(spec) if spec.architecture.startswith("hf:") else (_clip_tower(spec), 0)
    tokenizer = OpenClipTokenizer() if spec.tokenizer == "open_clip" else FileTokenizer(spec.tokenizer, padding)
    return TextEncoder(tower.eval().requires_grad_(False), tokenizer)


def _clip_tower(spec: EncoderSpec) -> clip.TextTransformer:
    tensors = clip.text_tensors(read_weights(spec.weights), spec.weights)
    tower = clip.build_text_tower(tensors, spec.weights, quick_gelu=spec.quick_gelu)
    load_strictly(tower, tensors, spec)
    return tower


def _huggingface_tower(spec: EncoderSpec) -> tuple[huggingface.TextTower, int]:
    tower = huggingface.load_text_tower(spec.architecture.removeprefix("hf:"))
    return tower, tower.padding
