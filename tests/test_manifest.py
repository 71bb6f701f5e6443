"""A manifest of paths: CSV, TSV or Parquet; what it names and what it cannot."""

import fsspec
import pyarrow as pa
import pytest
from builders import encoded, random_image
from source_builders import classes, refused, samples, write_images, write_parquet


def test_a_manifest_names_paths_beside_it_absolute_and_remote(tmp_path):
    fsspec.filesystem("memory").pipe("/manifest/far.png", encoded(random_image(2)))
    write_images(tmp_path / "in" / "photos", 1)
    (tmp_path / "abs.png").write_bytes(encoded(random_image(1)))
    lines = [
        "id,file_name,caption,label",
        '1,photos/cat/0000.jpg,"a ""cat"",\nindoors",pet',
        f"2,{tmp_path}/abs.png,,wild",
        "3,memory://manifest/far.png,far,",
        "4,photos/gone.jpg,x,pet",
        "5,,x,pet",
    ]
    manifest = tmp_path / "in" / "pairs.csv"
    manifest.write_text("\n".join(lines) + "\n")
    found = samples(manifest)
    assert [(s.row, s.source) for s in found[:4]] == [
        (0, "photos/cat/0000.jpg"),
        (1, f"{tmp_path}/abs.png"),
        (2, "memory://manifest/far.png"),
        (3, "photos/gone.jpg"),
    ]
    assert [s.caption for s in found[:3]] == [b'a "cat",\nindoors', None, b"far"]
    assert [s.label for s in found[:3]] == [0, 1, None]
    assert [s.image for s in found[1:3]] == [encoded(random_image(1)), encoded(random_image(2))]
    assert "gone.jpg: no such file. Check the path" in found[3].problem
    assert found[4].problem == "there are no image bytes"
    assert classes(manifest) == ("pet", "wild")


def test_a_manifest_may_be_parquet_or_tab_separated(tmp_path):
    files = write_images(tmp_path, 2)
    write_parquet(tmp_path / "m.parquet", pa.table({"url": list(files), "label": [4, 5]}))
    (tmp_path / "m.tsv").write_text(
        "label\turl\n" + "".join(f"{n}\t{path}\n" for n, path in zip((4, 5), files, strict=True))
    )
    for name in ("m.parquet", "m.tsv"):
        assert [(s.image, s.label) for s in samples(tmp_path / name)] == list(zip(files.values(), (4, 5), strict=True))


MANIFESTS = {
    "no paths": ("a,b\n1,2\n", r"no column holds images or their paths \(columns: a, b\)\. Name one: --images COLUMN"),
    "a line too long": ("path,label\na.jpg,1\nb.jpg,1,2\n", r"cannot be read as a table \(.*Expected 2 columns, got 3"),
    "nothing at all": ("", r"cannot be read as a table \(.*\)\. Correct it, or write it again"),
    "no rows": ("path\n", "holds no samples"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_cannot_be_used_is_one_line(tmp_path, case):
    text, words = MANIFESTS[case]
    (tmp_path / "m.csv").write_text(text)
    refused(tmp_path / "m.csv", words)


@pytest.mark.parametrize("path", ["a\0.jpg", "x" * 5000 + ".jpg", "nowhere://x/y.jpg", "/dev/zero", ".", "secret.txt"])
def test_a_path_that_is_no_image_file_is_named_and_the_rest_is_read(tmp_path, path):
    files = write_images(tmp_path, 1)
    (tmp_path / "secret.txt").write_text("not for shards")
    write_parquet(tmp_path / "m.parquet", pa.table({"path": [path, *files]}))
    bad, good = samples(tmp_path / "m.parquet")
    assert (bad.image, bool(bad.problem), good.image) == (None, True, *files.values())
