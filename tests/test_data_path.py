"""The benchmark of the data path: its parts are what they claim to be."""

import io
import itertools

import pytest
import torch
from builders import write_shards
from PIL import Image

from benchmarks.data import MIXED, random_crops
from benchmarks.data_path import EveryPixel
from benchmarks.raw_decode import decode


@pytest.mark.parametrize("cores", [1, 3])
def test_every_image_is_decoded_by_one_core(tmp_path, cores, monkeypatch):
    folder = write_shards(tmp_path / "in", [4, 3])
    decoded = []
    real = Image.open

    def noted(file: io.BytesIO) -> Image.Image:
        decoded.append(file.getvalue())
        return real(file)

    monkeypatch.setattr(Image, "open", noted)
    parts = [decode((sorted(map(str, folder.glob("*.tar"))), core, cores)) for core in range(cores)]
    assert sum(part.images for part in parts) == len(set(decoded)) == len(decoded) == 7


def test_mixed_images_have_sides_of_their_own():
    shapes = {image.size for image in itertools.islice(random_crops(MIXED), 5)}
    assert len(shapes) == 5
    assert all(100 <= side <= 500 for shape in shapes for side in shape)


@pytest.mark.parametrize("side", [32, 224])
def test_the_null_encoder_takes_a_grid_of_pixels(side):
    images = torch.rand(2, 3, side, side)
    embeddings = EveryPixel()(images)
    assert embeddings.shape == (2, 48)
    assert torch.equal(embeddings[:, 1], images[:, 0, 0, side // 4])
