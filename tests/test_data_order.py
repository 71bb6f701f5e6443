"""The data order: every sample once an epoch, the same batches and the same number of steps for any number of workers."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from builders import encoded, image_members, random_image, write_shards, write_tar

from sanitize.errors import ConfigError
from sanitize.stages.shards import list_shards
from sanitize.training.data_order import Order, lane_numbers, lane_pieces, lanes_of, piece_bounds, shuffled
from sanitize.training.sample_index import DataSet, class_count, index_shard

UNEVEN = [97, 1, 2, 30, 5]


def data_set(folder, label_member="cls", caption_member=""):
    shards = list_shards([str(folder)])
    found = [index_shard(shard, "", label_member, caption_member)[0] for shard in shards]
    return DataSet(tuple(shards), tuple(found))


@pytest.fixture
def uneven(tmp_path):
    return data_set(write_shards(tmp_path / "in", UNEVEN))


def pieces(data, order, epoch, rank, world, first=0):
    """Sample numbers of every piece that one rank reads."""
    sizes, samples = lane_pieces(data, order, epoch, first, lanes_of(rank, world, order.lanes))
    numbers = [sample.index for sample in samples]
    assert len(numbers) == sum(sizes)
    ends = np.cumsum(sizes)
    return [numbers[end - size : end] for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("buffer", [0, 12, 1000])
def test_every_sample_is_read_exactly_once_an_epoch(uneven, world, buffer):
    order = Order(lanes=8, pieces=5, buffer=buffer, seed=3)
    read = Counter(n for rank in range(world) for piece in pieces(uneven, order, 0, rank, world) for n in piece)
    assert read == Counter(range(sum(UNEVEN)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_rank_has_the_same_number_of_pieces_whatever_the_shards(uneven, world):
    order = Order(lanes=8, pieces=5, buffer=12, seed=3)
    assert {len(pieces(uneven, order, 0, rank, world)) for rank in range(world)} == {5}


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_in_a_piece_does_not_depend_on_the_number_of_workers(uneven, world):
    order = Order(lanes=8, pieces=5, buffer=40, seed=3)
    alone = [sorted(piece) for piece in pieces(uneven, order, 1, 0, 1)]
    parts = [pieces(uneven, order, 1, rank, world) for rank in range(world)]
    assert [sorted(chain(*ranks)) for ranks in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize(
    ("samples", "lanes", "pieces"), [(135, 8, 5), (8, 8, 3), (1000, 24, 31), (17, 3, 17), (5, 5, 1)]
)
def test_pieces_have_the_same_number_of_samples_or_one_more(samples, lanes, pieces):
    order = Order(lanes, pieces, 0, 0)
    sizes = [len(numbers) for numbers in lane_numbers(order, np.array([samples]), 0)]
    bounds = [piece_bounds(order, samples, lane) for lane in range(lanes)]
    assert [(b[0], b[-1]) for b in bounds] == [(0, size) for size in sizes]
    whole = np.sum([np.diff(b) for b in bounds], axis=0)
    assert whole.max() - whole.min() <= 1
    assert max(sizes) - min(sizes) <= 1


def test_an_epoch_that_goes_on_in_the_middle_reads_what_is_left_in_the_same_order(uneven):
    order = Order(lanes=4, pieces=6, buffer=40, seed=3)
    whole = pieces(uneven, order, 2, 0, 1)
    assert pieces(uneven, order, 2, 0, 1, first=4) == whole[4:]


def test_epochs_and_seeds_give_other_orders_and_buffer_0_gives_tar_order(uneven):
    def first_epoch(**changes):
        values = {"lanes": 4, "pieces": 3, "buffer": 40, "seed": 3} | changes
        return pieces(uneven, Order(**values), changes.get("seed", 0), 0, 1)

    assert first_epoch() == first_epoch()
    assert first_epoch() != first_epoch(seed=4)
    assert list(chain(*first_epoch(lanes=1, buffer=0))) == list(range(sum(UNEVEN)))


@pytest.mark.parametrize("buffer", [1, 7, 50, 200])
def test_a_shuffle_buffer_mixes_and_holds_no_more_than_its_size(buffer):
    order = shuffled(100, buffer, np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    read = np.maximum.accumulate(order) + 1  # samples read before each leaves
    assert (read - np.arange(100)).max() <= buffer
    assert (order != np.arange(100)).mean() > (0.7 if buffer > 1 else -1)


def test_a_sample_is_read_with_its_own_bytes_and_caption(tmp_path):
    members = []
    for number in range(9):
        members += [
            (f"s{number}.png", encoded(random_image(number))),
            (f"s{number}.txt", f"caption {number}".encode()),
        ]
    write_tar(tmp_path / "s.tar", members)
    data = data_set(tmp_path, "", "txt")
    _, samples = lane_pieces(data, Order(2, 2, 5, 0), 0, 0, [0, 1], "txt")
    for sample in samples:
        assert sample.image == encoded(random_image(sample.index))
        assert sample.caption == f"caption {sample.index}"


# ---------------------------------------------------------------- index


def test_samples_that_cannot_be_used_are_counted_by_reason(tmp_path):
    members = [
        ("a.png", b"x"),
        ("b.txt", b"words"),
        ("c.png", b"x"),
        ("c.jpg", b"x"),
        ("d.png", b"x"),
        ("d.txt", b"words"),
    ]
    write_tar(tmp_path / "s.tar", members)
    index, unusable, damage = index_shard(list_shards([str(tmp_path)])[0], "", "", "txt")
    assert index.position.tolist() == [3]
    assert unusable == {"no_caption": 1, "no_image": 1, "several_images": 1}
    assert damage == ""


def test_labels_come_from_cls_or_a_json_field(tmp_path):
    for stem, name, data in (("a", "x.cls", b" 7\n"), ("b", "x.json", b'{"label": 7}')):
        write_tar(tmp_path / f"{stem}.tar", [("x.png", b"x"), (name, data)])
    first, second = list_shards([str(tmp_path)])
    assert index_shard(first, "", "cls", "")[0].label.tolist() == [7]
    assert index_shard(second, "", "json:label", "")[0].label.tolist() == [7]


def test_a_missing_label_says_which_sample_and_what_it_has(tmp_path):
    write_tar(tmp_path / "s.tar", [*image_members(["a"]), ("b.png", b"x"), ("b.txt", b"x")])
    with pytest.raises(
        ConfigError, match=r"s\.tar: sample 'b' has no label: no \.cls member \(it has png txt\)\. Name the"
    ):
        data_set(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "member", "words"),
    [
        ("a.cls", b"cat", "cls", "it is 'cat'"),
        ("a.cls", b"-1", "cls", "it is '-1'"),
        ("a.cls", b"1.5", "cls", "it is '1.5'"),
        ("a.cls", b"", "cls", "it is ''"),
        ("a.cls", b"1" * 70_000, "cls", "its file has more than 65536 bytes"),
        ("a.json", b'{"label": "3"}', "json:label", "it is '3'"),
        ("a.json", b'{"label": true}', "json:label", "it is 'True'"),
        ("a.json", b"{", "json:label", "its JSON cannot be read"),
    ],
)
def test_a_label_that_is_not_an_integer_says_what_it_is(tmp_path, name, data, member, words):
    write_tar(tmp_path / "s.tar", [("a.png", b"x"), (name, data)])
    message = rf"the label of sample 'a' \({member}\) is not an integer from 0: {words}\. Number the classes"
    with pytest.raises(ConfigError, match=message):
        data_set(tmp_path, member)


def test_a_label_member_is_an_extension_or_a_json_field(tmp_path):
    write_tar(tmp_path / "s.tar", image_members(["a"]))
    with pytest.raises(
        ConfigError, match="label_member: 'json' is not an extension such as cls, or json:<field> such as json:label"
    ):
        data_set(tmp_path, "json")


def test_more_labels_than_class_names_say_so():
    assert class_count((), np.array([0, 4]), "classes") == 5
    assert class_count(("a", "b", "c"), np.array([0, 1]), "classes") == 3
    with pytest.raises(
        ConfigError, match=r"classes: a sample has the label 3, but there are 2 classes \(labels 0 to 1\)"
    ):
        class_count(("a", "b"), np.array([0, 3]), "classes")
