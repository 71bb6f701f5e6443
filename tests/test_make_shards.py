"""The benchmark's shards from torchvision's data sets; the download itself is torchvision's."""

from PIL import Image

from benchmarks import make_shards
from pipelines.data import load_images


class Digits:
    """30 small images of 3 classes, as a torchvision data set gives them."""

    def __len__(self):
        return 30

    def __getitem__(self, number):
        return Image.new("RGB", (20, 20), (number, 0, 0)), number % 3


def test_every_image_is_in_one_shard_with_its_class_and_a_rerun_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(make_shards, "SHARD", 12)
    paths = make_shards.write_set("gtsrb32", Digits(), tmp_path)
    assert [path.name for path in paths] == ["gtsrb32-000000.tar", "gtsrb32-000001.tar", "gtsrb32-000002.tar"]
    images = load_images((str(tmp_path),), 0, 32)
    numbers = images.pixels[:, 0, 0, 0].tolist()
    assert sorted(numbers) == list(range(30)) != numbers
    assert images.labels.tolist() == [number % 3 for number in numbers]
    times = [path.stat().st_mtime_ns for path in paths]
    assert [p.stat().st_mtime_ns for p in make_shards.write_set("gtsrb32", Digits(), tmp_path)] == times


def test_a_set_can_take_so_many_images_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setitem(make_shards.PER_CLASS, "gtsrb32", 4)
    make_shards.write_set("gtsrb32", Digits(), tmp_path)
    assert sorted(load_images((str(tmp_path),), 0, 32).labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
