"""Every path of the library may be a `pathlib.Path`; it gives what the same text gives."""

from pathlib import Path

import pytest
from builders import REMOVE_SOME, encoded, fit_config, random_image, write_shards
from torch import nn

import sanitize
from sanitize.artifacts.encoder_folder import load_encoder
from sanitize.paths import path_text, path_texts

URL = r"shards: PosixPath\('s3:/b/in'\): a pathlib.Path drops a slash of a URL. Give it as text: 's3://b/in'"
ONE = r"shards: PosixPath\('in'\) is one path, a list of paths was expected. Write \(PosixPath\('in'\),\)"


def test_fit_scan_and_what_follows_take_paths(tmp_path, aux_shards, encoder_spec, detector):
    spec = sanitize.EncoderSpec(**{**encoder_spec.__dict__, "weights": Path(encoder_spec.weights)})
    assert spec == encoder_spec
    config = sanitize.FitConfig(shards=[aux_shards], encoder=spec, out=tmp_path / "fitted")
    assert config == sanitize.FitConfig(shards=(str(aux_shards),), encoder=encoder_spec, out=str(tmp_path / "fitted"))
    assert sanitize.fit(fit_config(aux_shards, spec, tmp_path / "fitted")).fingerprint
    shards, out = write_shards(tmp_path / "in", [8, 4]), tmp_path / "scanned"
    scanned = sanitize.scan(
        sanitize.ScanConfig(
            shards=(shards,), detector=detector, out=out, policy=REMOVE_SOME, precision="fp32", workers=0
        )
    )
    assert scanned.out == str(out)
    assert sanitize.clean(out, REMOVE_SOME).kept == 8
    assert sanitize.verify(out, deep=True).problems == ()
    assert sanitize.audit(out, top=0).report == str(out / "audit" / "report.html")
    assert sanitize.list_samples(out, tmp_path / "kept.csv", only="kept").samples == 8
    kept = list(sanitize.KeptSamples(out, moved_to=shards))
    assert len(kept) == 8
    keep = sanitize.keep_only(out, moved_to=shards)
    assert all(keep(sample) for sample in kept)
    assert sanitize.check_encoder(spec, [shards]).images == 12


def test_finetune_and_load_head_take_paths(finetune_config, labelled_shards, validation, encoder_spec, tmp_path):
    config = finetune_config(tmp_path / "head", shards=[labelled_shards], validation=[validation], epochs=1)
    assert config == finetune_config(shards=(str(labelled_shards),), validation=(str(validation),), epochs=1)
    sanitize.finetune(config)
    assert sanitize.load_head(tmp_path / "head", load_encoder(encoder_spec)).classes


def test_pack_poison_and_export_encoder_take_paths(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(random_image(number)))
    packed, out = tmp_path / "packed", tmp_path / "poisoned"
    assert sanitize.pack(tmp_path / "photos", packed).samples == 4
    trigger = sanitize.make_trigger({"name": "patch", "side": 4})
    assert sanitize.poison([packed], out, rate=0.5, trigger=trigger).truth == str(out / "poison.json")
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    sanitize.export_encoder(module, tmp_path / "exported", image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert sanitize.load_encoder_spec(tmp_path / "exported" / "encoder.yaml").image_size == 16


def test_a_trigger_takes_a_path(tmp_path):
    texts = [repr(sanitize.make_trigger({"name": "file", "path": path})) for path in (tmp_path, str(tmp_path))]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([Path("s3://b/in")], URL),
        (Path("in"), ONE),
        ("in", r"shards: 'in' is one text, a list of paths was expected. Write \('in',\)"),
        ([3], "shards: 3 is no path. Give a text or a pathlib.Path"),
    ],
)
def test_what_is_no_list_of_paths_is_said(encoder_spec, given, words):
    with pytest.raises(sanitize.SanitizeError, match=words):
        sanitize.FitConfig(shards=given, encoder=encoder_spec)


def test_texts_stay_as_they_are():
    assert path_texts(["s3://b/in", Path("a") / "b"]) == ("s3://b/in", "a/b")
    assert path_text("a//b") == "a//b"
