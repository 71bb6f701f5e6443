"""Storage: a finished name means complete content, here and on a remote store; errors say what to do."""

import contextlib
import errno
import hashlib
import os
import tempfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sanitize import storage
from sanitize.errors import StorageError


class FullStore(MemoryFileSystem):
    """A remote store whose uploads fail."""

    protocol = "full"
    store: dict = {}  # noqa: RUF012 - as MemoryFileSystem has it
    pseudo_dirs = [""]  # noqa: RUF012

    def put_file(self, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "the connection was lost")


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where files wait that are on their way to a remote store."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def memory(temporary):
    """An empty memory://."""
    store = fsspec.filesystem("memory")
    yield store
    with contextlib.suppress(FileNotFoundError):
        store.rm("/store", recursive=True)


@pytest.fixture
def full(temporary):
    fsspec.register_implementation("full", FullStore, clobber=True)
    return fsspec.filesystem("full")


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- writing


def test_a_file_appears_under_its_name_with_all_of_its_content(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with storage.atomic_write(str(path)) as file:
        file.write(b"one ")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    assert files(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_neither_the_file_nor_a_partial_one(tmp_path, error):
    with pytest.raises(error), storage.atomic_write(str(tmp_path / "a.txt")) as file:
        file.write(b"half")
        raise error
    assert files(tmp_path) == []


def test_a_block_that_raises_leaves_the_earlier_file_as_it_was(tmp_path):
    storage.write_bytes(str(tmp_path / "a.txt"), b"before")
    with pytest.raises(ValueError), storage.atomic_write(str(tmp_path / "a.txt")) as file:
        file.write(b"after")
        raise ValueError
    assert (tmp_path / "a.txt").read_bytes() == b"before"


def test_a_file_url_is_a_local_file(tmp_path):
    storage.write_json(f"file://{tmp_path}/a.json", {"b": 1})
    assert storage.read_json(str(tmp_path / "a.json")) == {"b": 1}
    assert storage.exists(f"file://{tmp_path}/a.json")


def test_a_remote_file_is_put_in_one_piece(memory, temporary):
    with storage.atomic_write("memory://store/a/b.txt") as file:
        file.write(b"one ")
        assert not memory.exists("/store/a/b.txt")
        file.write(b"two")
    assert storage.read_bytes("memory://store/a/b.txt") == b"one two"
    assert storage.list_files("memory://store", ".txt") == ["a/b.txt"]
    assert files(temporary) == []


def test_a_block_that_raises_puts_nothing_on_the_remote_store(memory, temporary):
    with pytest.raises(ValueError), storage.atomic_write("memory://store/a.txt") as file:
        file.write(b"half")
        raise ValueError
    assert not memory.exists("/store/a.txt")
    assert files(temporary) == []


def test_an_upload_that_fails_is_an_error_that_names_the_object_and_leaves_none(full, temporary):
    with pytest.raises(
        StorageError, match=r"full://store/a\.txt: .*the connection was lost.* then run the same command again"
    ):
        storage.write_bytes("full://store/a.txt", b"data")
    assert not full.exists("/store/a.txt")
    assert files(temporary) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on the device. Free some space"),
        (errno.EDQUOT, "the quota of this user is used up. Free some space"),
        (errno.EACCES, "no permission to write. Choose another --out"),
        (errno.EROFS, "the file system is read-only. Choose another --out"),
        (errno.EIO, "Input/output error. Check the device"),
    ],
)
def test_a_write_error_says_what_to_do(number, words):
    with pytest.raises(StorageError) as failure, storage.explain_write_errors("out/a.tar"):
        raise OSError(number, os.strerror(number))
    message = str(failure.value)
    assert message.startswith("out/a.tar: ")
    assert words in message
    assert message.endswith(", then run the same command again; finished files are kept.")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    for path in (tmp_path / "out" / "a.txt", tmp_path / "out" / "deep" / "a.txt"):
        with pytest.raises(StorageError, match=r"a\.txt: a part of the path is a file, not a folder\. Choose another"):
            storage.write_bytes(str(path), b"data")


def test_the_hash_and_size_are_those_of_what_was_written(tmp_path):
    with storage.atomic_write(str(tmp_path / "a")) as file:
        assert file.write(b"one ") == 4
        file.write(b"two")
        assert (file.size, file.tell()) == (7, 7)
    assert file.sha256() == hashlib.sha256(b"one two").hexdigest() == storage.file_sha256(str(tmp_path / "a"))


def test_json_reads_back_and_is_written_the_same_whatever_the_order_of_keys(tmp_path):
    first, second = {"b": [1, "é"], "a": None}, {"a": None, "b": [1, "é"]}
    for name, value in (("x", first), ("y", second)):
        storage.write_json(str(tmp_path / name), value)
    assert storage.read_json(str(tmp_path / "x")) == first
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_hash_of_settings_does_not_depend_on_the_order_of_keys():
    assert storage.json_sha256({"a": 1, "b": {"c": 2, "d": 3}}) == storage.json_sha256({"b": {"d": 3, "c": 2}, "a": 1})
    assert storage.json_sha256({"a": [1, 2]}) != storage.json_sha256({"a": [2, 1]})


# ---------------------------------------------------------------- reading


def test_a_missing_file_says_so(tmp_path):
    for path in (str(tmp_path / "none"), "memory://store/none"):
        with pytest.raises(StorageError, match=r"none: no such file\. Check the path\."):
            storage.open_read(path)
        assert not storage.exists(path)


def test_a_folder_in_place_of_a_file_says_so(tmp_path):
    with pytest.raises(StorageError, match=r": is a folder, a file was expected\."):
        storage.open_read(str(tmp_path))


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    """The refusal is planted: root may read everything."""
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    if os.access(path, os.R_OK):
        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=r"secret: no permission to read\. Check the owner and mode of the file\."):
        storage.open_read(str(path))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match=r"pipe: is a pipe, a socket or a device, a file was expected"):
        storage.open_read(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"x\.json: not valid JSON \(.*\)\. Restore the file or write it again"),
        (b"\xff\xfe\xfa", r"x\.json: not valid JSON"),
        (b"[1]", r"x\.json: holds list, a JSON object was expected"),
    ],
)
def test_json_that_cannot_be_used_says_so(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StorageError, match=words):
        storage.read_json(str(tmp_path / "x.json"))


@pytest.mark.parametrize("address", ["nonsense://bucket/a.txt", "s4://bucket/a.txt"])
def test_an_address_of_an_unknown_kind_says_so(address):
    with pytest.raises(StorageError, match=r"a\.txt: cannot be reached \(.*\)\. Correct the address, or install"):
        storage.exists(address)


def test_a_local_name_with_the_marks_of_a_url_chain_is_a_file(tmp_path):
    storage.write_bytes(str(tmp_path / "a::b.tar"), b"x")
    assert storage.exists(str(tmp_path / "a::b.tar"))
    assert storage.list_files(str(tmp_path), ".tar") == ["a::b.tar"]


# ---------------------------------------------------------------- listing and deleting


def test_listing_is_sorted_relative_and_leaves_out_what_is_hidden_or_unfinished(tmp_path, memory):
    names = ["b.tar", "a/c.tar", "a/.hidden.tar", ".cache/d.tar", "e.json", ".f.tar.1234.partial"]
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"x")
        memory.pipe(f"/store/{name}", b"x")
    for folder in (str(tmp_path), f"{tmp_path}/", "memory://store", "memory://store/"):
        assert storage.list_files(folder, ".tar") == ["a/c.tar", "b.tar"]
    assert storage.list_files(str(tmp_path / "none"), ".tar") == []


def test_only_what_an_interrupted_run_left_is_removed(tmp_path):
    left, kept = (".a.tar.1f.partial", "deep/.b.1f.partial"), ("a.tar", "mine.partial", ".partially.txt")
    for name in (*left, *kept):
        storage.write_bytes(str(tmp_path / name), b"x")
    storage.remove_partials(str(tmp_path))
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == set(kept)
    storage.remove_partials("memory://store")  # a remote store holds no partial file
    storage.remove_partials(str(tmp_path / "none"))


def test_deleting_what_is_not_there_is_fine(tmp_path, memory):
    for path in (str(tmp_path / "a"), "memory://store/a"):
        storage.delete(path)
        storage.write_bytes(path, b"x")
        storage.delete(path)
        assert not storage.exists(path)


def test_a_folder_goes_with_all_it_holds(tmp_path, memory):
    for folder in (str(tmp_path / "f"), "memory://store/f"):
        storage.remove_folder(folder)
        storage.write_bytes(f"{folder}/a/b.txt", b"x")
        storage.remove_folder(folder)
        assert not storage.exists(f"{folder}/a/b.txt")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("parts", "joined"),
    [(("a", "b"), "a/b"), (("a/", "b", "c"), "a/b/c"), (("memory://x/", "b"), "memory://x/b")],
)
def test_names_are_joined_with_one_slash(parts, joined):
    assert storage.join(*parts) == joined


def test_a_local_name_becomes_absolute_and_a_url_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.absolute("~/b") == str(tmp_path / "home" / "b")
    assert storage.absolute("memory://a/b") == "memory://a/b"


def test_a_remote_file_needs_room_where_it_is_built(tmp_path):
    with pytest.raises(
        StorageError,
        match=r"GiB free, and up to 1073741824\.00 GiB pass through it on the way to memory://out\. .* set TMPDIR",
    ):
        storage.require_temporary_space("memory://out", 1 << 60)
    storage.require_temporary_space("memory://out", 1)
    storage.require_temporary_space(str(tmp_path), 1 << 60)  # built where it stays


@pytest.mark.parametrize(
    ("error", "may_pass"), [(OSError("SlowDown"), True), (TimeoutError(), True), (PermissionError("expired"), False)]
)
def test_a_request_that_a_store_refused_for_now_may_pass_later(error, may_pass):
    for path, expected in (("memory://x", may_pass), ("/x", False)):
        with pytest.raises(StorageError) as raised, storage.explain_read_errors(path):
            raise error
        assert raised.value.may_pass is expected
