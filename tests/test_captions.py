"""Image-text shards: captions are read, compared with the image, kept byte for byte; bad ones become reasons."""

import dataclasses
import json
import shutil
import tarfile

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import encoded, fit_config, members, table, write_tar

from sanitize.artifacts.encoder_folder import save_clip
from sanitize.attacks import contrastive, tiny_clip
from sanitize.attacks.contrastive import ContrastiveConfig
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import EncoderSpec, ThresholdPolicy
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError, ConfigError, StorageError
from sanitize.stages.captions import MAX_CAPTION_BYTES, caption_text, split_member
from sanitize.stages.text import FileTokenizer, load_text_encoder
from sanitize.training.clip import load_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP that has seen 3,000 captioned shapes twice: encoder.yaml, encoder.safetensors, tokenizer.json."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_clip.write_tokenizer(str(folder / "words.json"))
    spec = EncoderSpec(
        "clip", "", 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), width=8, tokenizer=str(folder / "words.json")
    )
    clip = tiny_clip.build(spec, tokenizer, seed=0)
    contrastive.train(
        clip, tiny_clip.coloured_shapes(3000, 0), ContrastiveConfig(epochs=2, batch_size=64, learning_rate=2e-3), 0, CPU
    )
    save_clip(clip, str(folder))
    return folder


@pytest.fixture(scope="session")
def clip_detector(clip_folder, tmp_path_factory):
    """A detector fitted to the tiny CLIP."""
    root = tmp_path_factory.mktemp("clip-detector")
    write_tar(root / "aux" / "s.tar", captioned(tiny_clip.coloured_shapes(200, 5)))
    spec = load_encoder_spec(str(clip_folder / "encoder.yaml"))
    fit(fit_config(root / "aux", spec, root / "detector"))
    return root / "detector"


def captioned(pairs, captions=None, extension="txt"):
    """Members of image-text samples; captions replace the pairs' own."""
    found = []
    for number, (image, caption) in enumerate(zip(pairs.images, captions or pairs.captions, strict=True)):
        data = caption if isinstance(caption, bytes) else caption.encode()
        if extension == "json":
            data = json.dumps({"captions": [caption, "another"], "width": 32}).encode()
        found += [(f"p{number:04d}.png", encoded(image.permute(1, 2, 0).numpy())), (f"p{number:04d}.{extension}", data)]
    return found


@pytest.fixture
def scanned(clip_detector, scan_config, tmp_path):
    """Rows of a scan of these members with the tiny CLIP, by key."""

    def run(tar_members, out="scanned", **changes):
        write_tar(tmp_path / out / "in" / "s.tar", tar_members)
        changes = {"policy": ThresholdPolicy("fraction", fraction=0.2)} | changes
        scan(scan_config(tmp_path / out / "in", f"{out}/out", detector=str(clip_detector), **changes))
        return {row["key"]: row for row in table(tmp_path / out / "out", "s")}

    return run


# ---------------------------------------------------------------- the column


def test_swapped_captions_are_less_similar_than_true_ones(scanned):
    pairs = tiny_clip.coloured_shapes(60, 9)
    true = scanned(captioned(pairs), "true")
    swapped = scanned(captioned(pairs, (*pairs.captions[1:], pairs.captions[0])), "swapped")
    similar, other = (np.array([row["text_similarity"] for row in rows.values()]) for rows in (true, swapped))
    assert len(similar) == len(other) == 60
    assert similar.mean() > other.mean() + 0.2
    assert [row["score"] for row in true.values()] == [row["score"] for row in swapped.values()]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_similarity_is_the_plain_cosine_whatever_the_batch(scanned, clip_folder, batch_size):
    pairs = tiny_clip.coloured_shapes(12, 9)
    rows = scanned(captioned(pairs), batch_size=batch_size)
    clip = load_clip(load_encoder_spec(str(clip_folder / "encoder.yaml")))
    images = clip.image(pairs.images.float() / 255)
    texts = clip.text(pairs.captions)
    expected = [float(i @ t / (i.norm() * t.norm())) for i, t in zip(images, texts, strict=True)]
    assert [row["text_similarity"] for row in rows.values()] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_captions_can_be_a_field_of_a_json_member(scanned):
    pairs = tiny_clip.coloured_shapes(8, 3)
    from_text = scanned(captioned(pairs), "a")
    from_json = scanned(captioned(pairs, extension="json"), "b", caption_member="json:captions")
    assert [r["text_similarity"] for r in from_text.values()] == [r["text_similarity"] for r in from_json.values()]


def test_captions_are_kept_byte_for_byte(scanned, tmp_path):
    pairs = tiny_clip.coloured_shapes(20, 4)
    odd = ["", "\n\n tabs\t and newlines \r\n", b"\xff\xfe broken", "\N{SNOWMAN} \U0001f600", *pairs.captions[4:]]
    scanned(captioned(pairs, odd))
    source = members(tmp_path / "scanned" / "in" / "s.tar")
    out = tmp_path / "scanned" / "out"
    split = members(out / "clean" / "s.tar") + members(out / "quarantine" / "s.tar")
    assert sorted(split) == sorted(source)
    assert verify(str(out)).problems == ()


# ---------------------------------------------------------------- bad captions: a row with a reason, never a crash

BAD = {
    "not UTF-8": (b"\xff\xfe", "the caption is not UTF-8 (byte 0)"),
    "empty": (b" \n", "the caption is empty"),
    "a megabyte": (b"red " * (1 << 18), f"the caption's file has 1048576 bytes, the limit is {MAX_CAPTION_BYTES}"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_caption_is_a_reason_and_the_image_is_scored_all_the_same(scanned, case):
    caption, reason = BAD[case]
    pairs = tiny_clip.coloured_shapes(4, 3)
    row = scanned(captioned(pairs, [caption, *pairs.captions[1:]]))["p0000"]
    assert (row["status"], row["text_similarity"], row["reason"]) == ("ok", None, reason)
    assert row["score"] > 0


def test_a_missing_caption_is_a_reason(scanned):
    rows = scanned([m for m in captioned(tiny_clip.coloured_shapes(4, 3)) if m[0] != "p0002.txt"])
    assert rows["p0002"]["reason"] == "no caption: there is no .txt member"
    assert [row["text_similarity"] is None for row in rows.values()] == [False, False, True, False]


def test_a_very_long_caption_is_cut_to_the_context(scanned):
    pairs = tiny_clip.coloured_shapes(4, 3)
    rows = scanned(captioned(pairs, ["a red circle " * 4000, *pairs.captions[1:]]))
    assert -1 <= rows["p0000"]["text_similarity"] <= 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"caption": "one"}', ("one", "")),
        (b'{"caption": ["first", "second"]}', ("first", "")),
        (b'{"caption": []}', ("", "the JSON has no text in its field 'caption'")),
        (b'{"other": "one"}', ("", "the JSON has no text in its field 'caption'")),
        (b"[1]", ("", "the JSON has no text in its field 'caption'")),
        (b"{", ("", "the caption's JSON cannot be read")),
        (b"[" * 50_000, ("", "the caption's JSON cannot be read")),
        (b'{"caption": "\\ud800"}', ("?", "")),
    ],
)
def test_the_caption_of_a_json_member(data, expected):
    assert caption_text(data, "caption") == expected


# ---------------------------------------------------------------- wrong settings and files


@pytest.mark.parametrize("wrong", ["json", "txt:caption", ":caption"])
def test_a_caption_member_is_an_extension_or_a_json_field(wrong):
    with pytest.raises(ConfigError, match=r"is not an extension such as txt, or json:<field>"):
        split_member(wrong)


def test_an_encoder_without_text_tower_cannot_compare_captions(shards, scan_config):
    with pytest.raises(ConfigError, match=r"names no text tower to compare captions with. Add `tokenizer:"):
        scan(scan_config(shards, caption_member="txt"))


def test_only_a_clip_can_have_a_tokenizer():
    with pytest.raises(ConfigError, match="only architectures clip and hf: have a text tower"):
        EncoderSpec("resnet18", tokenizer="tokenizer.json")


@pytest.fixture
def own_clip(clip_folder, tmp_path):
    """A copy of the tiny CLIP that a test may damage."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    return tmp_path / "clip"


def test_a_checkpoint_without_text_tower_says_so(own_clip):
    tensors = safetensors.torch.load_file(own_clip / "encoder.safetensors")
    visual = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    safetensors.torch.save_file(visual, own_clip / "encoder.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no CLIP text tower in it .*Give the whole CLIP checkpoint, or remove `tokenizer`"
    ):
        load_text_encoder(load_encoder_spec(str(own_clip / "encoder.yaml")))


def test_a_missing_tokenizer_file_says_so_before_any_work(own_clip, shards, scan_config, clip_detector):
    (own_clip / "tokenizer.json").unlink()
    spec = load_encoder_spec(str(own_clip / "encoder.yaml"))
    with pytest.raises(StorageError, match=r"tokenizer.json: no such file"):
        scan(scan_config(shards, detector=str(clip_detector), encoder=spec))


def test_a_tokenizer_of_another_model_or_format_says_so(own_clip, tmp_path):
    (own_clip / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a tokenizer file .*Give the tokenizer.json of this CLIP"):
        load_text_encoder(load_encoder_spec(str(own_clip / "encoder.yaml")))
    tiny_clip.write_tokenizer(str(own_clip / "tokenizer.json"))
    tensors = safetensors.torch.load_file(own_clip / "encoder.safetensors")
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:10].clone()
    safetensors.torch.save_file(tensors, own_clip / "encoder.safetensors")
    text = load_text_encoder(load_encoder_spec(str(own_clip / "encoder.yaml")))
    with pytest.raises(ConfigError, match=r"gives token \d+, the text tower knows 10. Give the tokenizer of this very"):
        text(["a red circle"])


def test_the_tokenizer_pads_with_zero_and_keeps_the_end_token(tmp_path):
    tokenizer = tiny_clip.write_tokenizer(str(tmp_path / "t.json"))
    tokens = tokenizer(["a red circle", "red " * 40, "Nonsense RED"], 12)
    end = tokenizer.size - 1
    assert tokens.shape == (3, 12)
    assert (tokens[0, 4].item(), tokens[0, 5:].sum().item()) == (end, 0)
    assert tokens[1, -1].item() == end
    assert tokens[2, 2] == tokens[0, 2]  # case does not matter
    assert torch.equal(FileTokenizer(str(tmp_path / "t.json"))(["a red circle"], 12), tokens[:1])


# ---------------------------------------------------------------- real photographs


@pytest.mark.parametrize(("name", "samples"), [("flickr8k-captions", 1000), ("coco-captions", 116)])
@pytest.mark.slow
def test_real_captioned_photos_get_a_similarity_and_come_back_intact(
    shared_data, clip_detector, scan_config, tmp_path, name, samples
):
    source = shared_data / f"{name}-000000.tar"
    for out, member in (("text", "txt"), ("json", "json:captions")):
        scan(scan_config(source, out, detector=str(clip_detector), caption_member=member, batch_size=64))
        rows = table(tmp_path / out, source.stem)
        assert len(rows) == samples
        assert all(row["text_similarity"] is not None for row in rows)
    with tarfile.open(source) as tar:
        count = len(tar.getnames())
    split = members(tmp_path / "text" / "clean" / source.name) + members(tmp_path / "text" / "quarantine" / source.name)
    assert len(split) == count
    assert sorted(split) == sorted(members(source))


def test_the_tokenizer_does_not_change_which_encoder_this_is(clip_folder):
    from sanitize.stages.encoders import load_encoder

    spec = load_encoder_spec(str(clip_folder / "encoder.yaml"))
    other = dataclasses.replace(spec, tokenizer="")
    assert load_encoder(spec).fingerprint() == load_encoder(other).fingerprint()
