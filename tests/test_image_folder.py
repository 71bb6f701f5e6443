"""A folder of images: which files are taken, which sub-folders are classes, what is refused."""

import os
import re

import pytest
from builders import encoded, random_image, write_tar
from source_builders import classes, refused, samples, write_images

from sanitize.sources import open_source
from sanitize.sources.samples import Wanted, image_extension


def test_sub_folders_are_classes_only_when_every_image_is_in_one(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / "cat" / "deep").mkdir()
    (tmp_path / "cat" / "deep" / "x.PNG").write_bytes(encoded(random_image(9)))
    assert classes(tmp_path) == ("cat", "dog")
    assert [(s.source, s.label, s.extension) for s in samples(tmp_path)][2:] == [
        ("cat/deep/x.PNG", 0, "png"),
        ("dog/0001.jpg", 1, "jpg"),
        ("dog/0003.jpg", 1, "jpg"),
    ]
    assert {s.label for s in samples(tmp_path, labels="none")} == {None}
    (tmp_path / "loose.jpg").write_bytes(b"x")
    assert classes(tmp_path) == ()
    refused(
        tmp_path,
        r"--labels folders: loose\.jpg is in no sub-folder of {at}, so it has no class\. Move",
        labels="folders",
    )


def test_what_is_no_image_by_its_name_is_left_out_and_counted(tmp_path):
    write_images(tmp_path, 2)
    for name in ("a.txt", "b.txt", "notes", ".hidden.jpg"):
        (tmp_path / name).write_text("x")
    source = open_source(str(tmp_path), Wanted())
    assert source.samples == 2
    assert "3 files are no images by their names and are left out (txt 2, no ending 1)" in source.notes


def test_file_names_of_any_bytes_are_packed_and_shown_escaped(tmp_path):
    for name in (b"caf\xe9.jpg", b"a\x1b[2J.jpg", "é\n.jpg".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    assert [(s.source, s.image) for s in samples(tmp_path)] == [
        (r"a\x1b[2J.jpg", b"a\x1b[2J.jpg"),
        (r"caf\xe9.jpg", b"caf\xe9.jpg"),
        (r"é\n.jpg", "é\n.jpg".encode()),
    ]


def test_an_image_that_changed_since_the_folder_was_listed_is_named(tmp_path):
    write_images(tmp_path, 2)
    source = open_source(str(tmp_path), Wanted())
    (tmp_path / "cat" / "0000.jpg").write_bytes(b"xyz")
    first, second = source.reader()(0, 2)
    assert re.search(
        r"cat/0000\.jpg: 3 bytes were read, its size was \d+: .* Run the same command again\.", first.problem
    )
    assert second.image


FOLDERS = {
    "nothing": ([], r"holds no samples\. Give a folder of images, Parquet files"),
    "shards": (["a.tar"], r"holds 1 tar shards already\. Scan them as they are: sanitize scan {at}"),
    "images and tables": (["a.jpg", "t.parquet"], r"holds 1 images and 1 tables \(t\.parquet\): which are the data\?"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_clear_data_is_refused(tmp_path, case):
    names, words = FOLDERS[case]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, words)


def test_columns_of_a_folder_are_refused(tmp_path):
    write_images(tmp_path, 2)
    refused(tmp_path, "--captions text: {at} is a folder of images, which has no columns", captions="text")
    refused(tmp_path, "--labels age: {at} is a folder of images, give folders or none", labels="age")


def test_a_link_to_a_folder_is_refused(tmp_path):
    write_images(tmp_path / "in", 2)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    refused(tmp_path / "in", "again: is a link to a folder, which is not followed .* put the folder itself here")


def test_a_path_that_is_not_there_and_a_file_of_another_kind_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "{at}: no such file or folder. Give a folder of images, Parquet files")
    write_tar(tmp_path / "a.tar", [])
    refused(tmp_path / "a.tar", "{at}: cannot be packed. Give a folder of images")


def test_the_name_decides_about_the_ending_and_the_bytes_where_it_does_not():
    assert image_extension("a.b.JPEG", b"\x89PNG\r\n\x1a\n") == "jpeg"
    assert image_extension("a.bin", b"\x89PNG\r\n\x1a\n") == "png"
    assert image_extension("png", b"text") == ""
