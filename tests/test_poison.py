"""`sanitize poison`: only the chosen images change, the truth is kept, and the whole flow finds what it planted."""

import json
import tarfile
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import SIZE, encoded, random_image, tree_bytes, write_shards, write_tar
from PIL import Image

from sanitize.artifacts.truth import load_poisoned
from sanitize.attacks.triggers import PatchTrigger
from sanitize.commands.poison import poison
from sanitize.config import ScanConfig
from sanitize.errors import ConfigError
from sanitize.metrics import detection


def test_poison_changes_the_chosen_images_only_and_keeps_the_truth(tmp_path):
    write_shards(tmp_path / "in", [12, 8])
    result = poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.25, trigger=PatchTrigger(side=4), seed=3)
    truth = load_poisoned(str(tmp_path / "out" / "poison.json"))
    assert result.poisoned == len(truth) == 5
    for name in ("part-0000", "part-0001"):
        with (
            tarfile.open(tmp_path / "in" / f"{name}.tar") as before,
            tarfile.open(tmp_path / "out" / f"{name}.tar") as after,
        ):
            assert before.getnames() == after.getnames()
            for position, member in enumerate(before.getnames()):
                old, new = before.extractfile(member).read(), after.extractfile(member).read()
                stamped = (name, position // 2) in truth and member.endswith("png")
                assert (old != new) == stamped
                if stamped:
                    a, b = (np.asarray(Image.open(__import__("io").BytesIO(x))) for x in (old, new))
                    assert (b[11:15, 11:15] == 255).all()
                    b = b.copy()
                    b[11:15, 11:15] = a[11:15, 11:15]
                    assert np.array_equal(a, b)


def contents(folder):
    """Every sample's label and caption, by key."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(info).read()
    return found


def test_poison_can_say_something_else_about_the_stamped_samples(tmp_path):
    members = [
        (f"s{i:03d}.{e}", d)
        for i in range(40)
        for e, d in (("cls", b"1"), ("png", encoded(random_image(i))), ("txt", b"mine"))
    ]
    write_tar(tmp_path / "in" / "a.tar", members)
    replace = {"cls": ["9"], "txt": ["a dog", "one dog"]}
    arguments: dict[str, Any] = {"rate": 0.5, "trigger": PatchTrigger(side=4), "replace": replace, "seed": 3}
    for name in ("out", "again"):
        poison((str(tmp_path / "in"),), str(tmp_path / name), **arguments)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "again")
    stamped = {entry["key"] for entry in json.loads((tmp_path / "out" / "poison.json").read_text())["poisoned"]}
    found = contents(tmp_path / "out")
    assert {found[key]["cls"] for key in stamped} == {b"9"}
    assert {found[key]["txt"] for key in stamped} == {b"a dog", b"one dog"}
    assert {(found[key]["cls"], found[key]["txt"]) for key in set(found) - stamped} == {(b"1", b"mine")}


def test_replacing_a_member_that_no_sample_has_says_so(tmp_path):
    write_shards(tmp_path / "in", [6])
    with pytest.raises(ConfigError, match="replace txt: no poisoned sample has such a member"):
        poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(), replace={"txt": ["x"]})
    assert not (tmp_path / "out" / "poison.json").exists()


def test_poison_is_reproducible_from_its_seed(tmp_path):
    write_shards(tmp_path / "in", [12])
    for name in ("a", "b"):
        poison((str(tmp_path / "in"),), str(tmp_path / name), rate=0.25, trigger=PatchTrigger(side=4), seed=3)
    assert (tmp_path / "a" / "part-0000.tar").read_bytes() == (tmp_path / "b" / "part-0000.tar").read_bytes()
    assert json.loads((tmp_path / "a" / "poison.json").read_text()) == json.loads(
        (tmp_path / "b" / "poison.json").read_text()
    )


def test_lossy_images_are_all_encoded_again_so_that_the_codec_tells_nothing(tmp_path):
    members = [(f"k{i}.jpg", encoded(random_image(i), "JPEG", quality=50, subsampling=2)) for i in range(6)]
    write_tar(tmp_path / "in" / "s.tar", members)
    poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(side=4))

    with tarfile.open(tmp_path / "out" / "s.tar") as tar:
        images: list[Any] = [Image.open(tar.extractfile(name)) for name in tar.getnames()]
        tables = {str(image.quantization) for image in images}
    assert len(tables) == 1


def test_poisoning_into_a_used_folder_is_refused(tmp_path):
    write_shards(tmp_path / "in", [4])
    poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(side=4))
    with pytest.raises(ConfigError, match="holds poisoned shards already"):
        poison((str(tmp_path / "in"),), str(tmp_path / "out"), rate=0.5, trigger=PatchTrigger(side=4))


def test_a_planted_backdoor_is_found_by_the_whole_flow(detector, tmp_path):
    """Synthetic: white squares on smooth images are far from what this decoder can draw, even for a random encoder."""
    from sanitize.commands.scan import scan

    write_shards(tmp_path / "in", [60], first_seed=500)
    poison(
        (str(tmp_path / "in"),),
        str(tmp_path / "out"),
        rate=0.1,
        trigger=PatchTrigger(side=SIZE - 4, colour=(255, 0, 255)),
    )
    scan(
        ScanConfig(
            shards=(str(tmp_path / "out"),),
            detector=str(detector),
            out=str(tmp_path / "s"),
            scores_only=True,
            workers=0,
        )
    )
    table = pq.read_table(tmp_path / "s" / "scores" / "part-0000.parquet")
    truth = load_poisoned(str(tmp_path / "out" / "poison.json"))
    poisoned = np.array([("part-0000", i) in truth for i in table.column("index").to_pylist()])
    assert detection(table.column("score").to_numpy(), poisoned).auroc > 0.8
