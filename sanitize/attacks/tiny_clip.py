"""A CLIP small enough for two CPU cores, and procedural captioned images to train it on (ours).

Coloured shapes on textured grey; the colour is the zero-shot class. Files and layout are those of a real CLIP.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sanitize import storage
from sanitize.attacks.contrastive import Pairs, activation, initialise
from sanitize.config import EncoderSpec
from sanitize.stages.clip import ModifiedResNet, TextTransformer
from sanitize.stages.text import FileTokenizer
from sanitize.training.clip import Clip, fresh

COLOURS = {
    "red": (210, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (225, 205, 40),
    "purple": (150, 50, 180),
    "orange": (240, 130, 30),
}
SHAPES: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "diamond": lambda x, y: abs(x) + abs(y) < 1.1,
    "triangle": lambda x, y: (y < 0.8) & (y > 2 * abs(x) - 0.9),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3),
    "bar": lambda x, y: (abs(x) < 1.1) & (abs(y) < 0.4),
    "pole": lambda x, y: (abs(x) < 0.4) & (abs(y) < 1.1),
}
TEMPLATES = (
    "a photo of a {}",
    "an image of one {}",
    "an image of the {}",
    "there is a {}",
    "a drawing of a {} on gray",
    "one {} in the middle",
)
PROMPTS = tuple(template.format("{} thing") for template in TEMPLATES)  # to be filled with a colour


def coloured_shapes(count: int, seed: int, size: int = 32) -> Pairs:
    """`count` images of side `size`, their captions, and the index of the colour."""
    rng = np.random.default_rng(seed)
    colours, shapes = list(COLOURS), list(SHAPES)
    places = (np.arange(size) + 0.5) / size * 2 - 1
    images, captions, labels = [], [], []
    for _ in range(count):
        colour, shape = rng.integers(len(colours)), rng.integers(len(shapes))
        scale, (left, top) = rng.uniform(0.35, 0.6), rng.uniform(-0.35, 0.35, 2)
        inside = SHAPES[shapes[shape]]((places[None, :] - left) / scale, (places[:, None] - top) / scale)
        coarse = rng.uniform(60, 190, (4, 4))
        texture = np.kron(coarse, np.ones((size // 4, size // 4))) + rng.normal(0, 12, (size, size))
        paint = np.array(COLOURS[colours[colour]]) + rng.normal(0, 15, 3)
        image = np.where(inside[..., None], paint + rng.normal(0, 8, (size, size, 1)), texture[..., None])
        images.append(image.clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
        word = "thing" if rng.random() < 0.25 else shapes[shape]
        captions.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(f"{colours[colour]} {word}"))
        labels.append(int(colour))
    return Pairs(torch.from_numpy(np.stack(images)), tuple(captions), torch.tensor(labels))


def write_tokenizer(path: str) -> FileTokenizer:
    """One token a word. Padding is 0 and the end token has the largest id, as CLIP's text tower expects."""
    text = " ".join([*TEMPLATES, *COLOURS, *SHAPES, "thing"]).replace("{}", " ")
    words = ["<pad>", "<start>", "<unknown>", *sorted(set(text.split())), "<end>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, vocabulary[word]) for word in ("<start>", "<end>")]
    )
    storage.write_bytes(path, tokenizer.to_str().encode())
    return FileTokenizer(path)


def build(spec: EncoderSpec, tokenizer: FileTokenizer, seed: int) -> Clip:
    """ModifiedResNet of width `spec.width` with one block a stage, and a text transformer of two layers; embeddings of 64."""
    torch.manual_seed(seed)
    visual = ModifiedResNet(spec.width, [1, 1, 1, 1], spec.image_size // 32, 64)
    text = TextTransformer(tokenizer.size, 12, 64, 2, 64, activation(spec))
    initialise(visual, text, seed)
    return fresh(spec, visual, text, tokenizer)
