"""A published EfficientNet-Lite0 becomes the same model in timm's names; photographs are copied as they are."""

import hashlib
import tarfile

import pytest
import safetensors.torch
import timm
import torch
from builders import image_members, write_tar

from pipelines import photo_data
from sanitize.config_loading import load_encoder_spec
from sanitize.stages.encoders import load_encoder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """timm's model, its own weights under other names, as the package has them."""
    torch.manual_seed(0)
    model = timm.create_model(photo_data.ARCHITECTURE, pretrained=False).eval()
    path = tmp_path_factory.mktemp("package") / "weights.pth"
    torch.save({f"_{n}": tensor for n, tensor in enumerate(model.state_dict().values())}, path)
    return model, str(path)


def test_the_encoder_and_the_classifier_give_what_the_published_model_gives(published, tmp_path):
    model, checkpoint = published
    weights, classifier = tmp_path / "out" / "encoder.safetensors", tmp_path / "classifier.safetensors"
    safetensors.torch.save_file(photo_data.write_encoder(photo_data.ARCHITECTURE, checkpoint, weights), classifier)
    encoder = load_encoder(load_encoder_spec(str(weights.with_suffix(".yaml"))))
    images = torch.rand(2, 3, 224, 224)
    expected = model((255 * images - 127) / 128)
    torch.testing.assert_close(
        photo_data.load_classifier(str(classifier))(encoder(images)), expected, atol=1e-4, rtol=1e-4
    )
    assert set(safetensors.torch.load_file(weights)).isdisjoint(photo_data.CLASSIFIER)


def test_photographs_are_copied_byte_for_byte_with_a_class(tmp_path):
    write_tar(tmp_path / "in" / "s.tar", image_members("abc"))
    images = list(photo_data.images_of((str(tmp_path / "in"),)))
    photo_data.write_part(tmp_path / "test.tar", iter(images), torch.tensor([3, 1, 2]))
    with tarfile.open(tmp_path / "test.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    assert [members[f"test-{n:06d}.cls"] for n in range(3)] == [b"3", b"1", b"2"]
    for number, image in enumerate(images):
        assert hashlib.sha256(members[f"test-{number:06d}.jpg"]).digest() == hashlib.sha256(image).digest()
