"""Hugging Face folders as encoders: the library's own embeddings, every refusal in words, trained and written again."""

import json
import shutil
import time

import pytest
import torch
from builders import KEEP_ALL, captioned, fit_config, losses, random_images, scores_by_key, write_shards

from sanitize.commands.finetune import finetune
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.config import EncoderSpec, FinetuneConfig, ScanConfig
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import ConfigError, SanitizeError
from sanitize.stages.encoders import load_encoder
from sanitize.stages.text import load_text_encoder
from sanitize.training.clip import load_clip

transformers = pytest.importorskip(
    "transformers",
    reason="transformers is not installed: pip install 'sanitize-shards[hf]'; Hugging Face folders need it",
)
from huggingface_models import MEAN, MODELS, SIDE, STD, change_json, processed, write_huggingface  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
IMAGES = random_images(3, size=SIDE)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """model_type → its folder, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = write_huggingface(root / kind, kind)
        return made[kind]

    return folder


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a folder that a test may damage."""

    def make(kind):
        return shutil.copytree(folders(kind), tmp_path / kind)

    return make


def own_embeddings(folder, kind):
    """What the library's own documentation calls image features of this model."""
    pixels = processed(folder, IMAGES)
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(folder).eval()
    if kind in ("clip", "siglip"):
        found = model.get_image_features(pixel_values=pixels)
        return found if isinstance(found, torch.Tensor) else found.pooler_output
    if kind == "clip_vision_model":
        return model(pixel_values=pixels).image_embeds
    if kind in ("vit", "deit"):  # its classifier reads the class token behind the last layer norm
        hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        return getattr(model, kind).layernorm(hidden)[:, 0]
    base = model if model.__class__.__name__.endswith("Model") else getattr(model, model.base_model_prefix)
    return base(pixel_values=pixels).pooler_output.flatten(1)


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_are_the_librarys_own(folders, kind):
    folder = folders(kind)
    with torch.no_grad():
        expected = own_embeddings(folder, kind)
        found = load_encoder(EncoderSpec(f"hf:{folder}"))(IMAGES.float() / 255)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.01


def test_size_mean_and_std_are_the_folders_own_unless_the_yaml_says_otherwise(folders, tmp_path, caplog):
    folder = folders("dinov2")
    caplog.set_level("INFO", "sanitize")
    spec = load_encoder(EncoderSpec(f"hf:{folder}")).spec
    assert spec.image_size == SIDE
    assert [*spec.mean, *spec.std] == pytest.approx([*MEAN, *STD])
    shown = "image_size 32, mean 0.48 0.45 0.41, std 0.27 0.26 0.28 (preprocessor_config.json)"
    assert shown in caplog.text
    (tmp_path / "encoder.yaml").write_text(f"architecture: hf:{folder}\nmean: [0, 0, 0]\n")
    other = load_encoder(load_encoder_spec(str(tmp_path / "encoder.yaml")))
    assert [*other.spec.mean, *other.spec.std] == pytest.approx([0, 0, 0, *STD])
    assert other.fingerprint() != load_encoder(EncoderSpec(f"hf:{folder}")).fingerprint()


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({"do_normalize": False}, (0, 0, 0), (1, 1, 1)),
        ({"do_rescale": False}, [m / 255 for m in MEAN], [s / 255 for s in STD]),
        ({"rescale_factor": 1 / 127.5}, [m / 2 for m in MEAN], [s / 2 for s in STD]),
    ],
)
def test_every_way_to_normalise_becomes_one_mean_and_std(copy, changes, mean, std):
    folder = copy("vit")
    change_json(folder / "preprocessor_config.json", **changes)
    spec = load_encoder(EncoderSpec(f"hf:{folder}")).spec
    assert [*spec.mean, *spec.std] == pytest.approx([*mean, *std])


@pytest.mark.parametrize("size", [{"shortest_edge": SIDE}, SIDE, {"height": SIDE, "width": SIDE}])
def test_every_way_to_say_a_size_is_understood(copy, size):
    folder = copy("dinov2")
    change_json(folder / "preprocessor_config.json", size={"shortest_edge": 40}, crop_size=size, do_center_crop=True)
    assert load_encoder(EncoderSpec(f"hf:{folder}")).spec.image_size == SIDE


def test_a_folder_in_shards_gives_the_same_embeddings_and_fingerprint(folders, tmp_path):
    sharded = write_huggingface(tmp_path / "sharded", "vit", shards="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    whole, parts = (load_encoder(EncoderSpec(f"hf:{folder}")) for folder in (folders("vit"), sharded))
    assert whole.fingerprint() == parts.fingerprint()
    torch.testing.assert_close(whole(IMAGES / 255), parts(IMAGES / 255))


def test_the_fingerprint_knows_weights_and_activation_but_not_the_place(copy, folders):
    moved = copy("clip")
    fingerprint = load_encoder(EncoderSpec(f"hf:{folders('clip')}")).fingerprint()
    assert load_encoder(EncoderSpec(f"hf:{moved}")).fingerprint() == fingerprint
    config = json.loads((moved / "config.json").read_text())
    change_json(moved / "config.json", vision_config=config["vision_config"] | {"hidden_act": "gelu"})
    assert load_encoder(EncoderSpec(f"hf:{moved}")).fingerprint() != fingerprint


def test_a_relative_folder_lies_beside_the_yaml(copy, tmp_path, monkeypatch):
    folder = copy("vit")
    (tmp_path / "encoder.yaml").write_text("architecture: hf:vit\n")
    monkeypatch.chdir("/")
    assert load_encoder_spec(str(tmp_path / "encoder.yaml")).architecture == f"hf:{folder}"


# ---------------------------------------------------------------- refused in words


def without(name):
    return lambda folder: (folder / name).unlink()


def with_config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def with_preprocessing(**changes):
    return lambda folder: change_json(folder / "preprocessor_config.json", **changes)


def with_bin_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_index(files):
    def damage(folder):
        without("model.safetensors")(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return damage


REFUSED = {
    "no config": (without("config.json"), r"no Hugging Face model there \(config.json is missing\).*hf download"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    "remote code": (with_config(auto_map={"AutoModel": "m.M"}), "refused, the model needs Python code of its own"),
    "quantised": (with_config(quantization_config={}), "refused, the weights are quantised.*before quantising"),
    "another kind": (with_config(model_type="llama"), "model_type 'llama' is not supported. Use one of clip,.*dinov2"),
    "no kind": (with_config(model_type=["clip"]), r"model_type \['clip'\] is not supported"),
    "pickle": (with_bin_only, "refused, its weights are a pickle.*which can run any code.*save_pretrained"),
    "no weights": (without("model.safetensors"), "no weights there.*Download the folder again"),
    "index of elsewhere": (with_index({"a": "../../x.safetensors"}), "not an index of safetensors files beside it"),
    "index of a pickle": (with_index({"a": "pytorch_model.bin"}), "not an index of safetensors files beside it"),
    "other shapes": (
        with_config(intermediate_size=128),
        r"do not fit config.json \(as ViTModel\): .* of another shape",
    ),
    "other depth": (with_config(num_hidden_layers=3), r"do not fit config.json .* missing \(first: layers.2"),
    "a bomb of width": (with_config(hidden_size=1 << 19), "describes .* weights, the files hold"),
    "a huge number": (with_config(hidden_size=1 << 40), "hidden_size is 1099511627776, more than"),
    "a bomb of depth": (with_config(num_hidden_layers=10**6), "num_hidden_layers is 1000000, more than 1000"),
    "a long list": (with_config(patch_size=[1] * 2000), "patch_size is a list of more than 1000"),
    "odd type": (with_config(hidden_size="wide"), "config.json"),
    "odd scale": (with_preprocessing(rescale_factor="a"), "rescale_factor 'a' is not a number above 0. Correct it"),
    "odd mean": (with_preprocessing(image_mean="grey"), "image_mean and image_std are not three numbers each"),
    "not square": (with_preprocessing(size={"height": 32, "width": 64}), "its images are not square"),
    "no mean": (without("preprocessor_config.json"), "does not say mean, std.*Copy that file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_used_says_why_and_what_to_do(copy, case):
    folder = copy("vit")
    damage, words = REFUSED[case]
    damage(folder)
    start = time.monotonic()
    with pytest.raises(SanitizeError, match=words) as caught:
        load_encoder(EncoderSpec(f"hf:{folder}"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "field", ["attn_implementation", "_attn_implementation", "fusion_config", "_name_or_path", "return_dict"]
)
def test_settings_that_name_code_or_files_are_not_looked_at(copy, folders, field):
    folder = copy("vit")
    change_json(folder / "config.json", **{field: False if field == "return_dict" else "somebody/kernel"})
    found = load_encoder(EncoderSpec(f"hf:{folder}"))(IMAGES / 255)
    torch.testing.assert_close(found, load_encoder(EncoderSpec(f"hf:{folders('vit')}"))(IMAGES / 255))


def test_a_wrong_image_size_names_the_right_one(folders):
    with pytest.raises(ConfigError, match=r"does not take images of 64 pixels \(.*Set `image_size: 32`, its own size"):
        load_encoder(EncoderSpec(f"hf:{folders('vit')}", image_size=64))


def test_weights_beside_the_folder_are_refused(folders):
    with pytest.raises(ConfigError, match=r"`weights: w.safetensors` is not used, they are in the folder. Remove it"):
        load_encoder(EncoderSpec(f"hf:{folders('vit')}", weights="w.safetensors"))


def test_a_name_of_the_hub_without_the_hub_says_how_to_download_it(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as on a machine without internet
    start = time.monotonic()
    words = r"no such folder, and it cannot be downloaded \(.*hf download nobody/no-model --local-dir no-model"
    with pytest.raises(ConfigError, match=words) as caught:
        load_encoder(EncoderSpec("hf:nobody/no-model"))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_caption_embeddings_are_the_librarys_own(folders, kind):
    folder = folders(kind)
    captions = ["a photo of a red circle", "an image of one " + "blue " * 20, "one ring in the middle"]
    text = load_text_encoder(EncoderSpec(f"hf:{folder}", tokenizer=str(folder / "tokenizer.json")))
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(folder).eval()
    tokens = text.tokens(captions)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tokens)
        expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    torch.testing.assert_close(text(captions), torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=1e-5)
    padding = {"clip": 0, "siglip": 2}[kind]  # SigLIP's text tower sees its padding
    assert tokens[0, -1] == padding
    assert tokens[1, -1] == tokens[0].max()  # cut, with its end


def test_an_image_model_has_no_text_tower(folders):
    with pytest.raises(ConfigError, match=r"a dinov2 has no text tower. Remove `tokenizer`"):
        load_text_encoder(EncoderSpec(f"hf:{folders('dinov2')}", tokenizer="open_clip"))


# ---------------------------------------------------------------- the whole way


def test_fit_and_scan_with_captions(folders, tmp_path):
    folder = folders("clip")
    aux, shards = captioned(tmp_path / "aux", [120], seed=1), captioned(tmp_path / "in", [20, 5], seed=2)
    spec = EncoderSpec(f"hf:{folder}", tokenizer=str(folder / "tokenizer.json"))
    detector = fit(fit_config(aux, spec, tmp_path / "detector"))
    assert detector.encoder.image_size == SIDE  # what was filled in is remembered
    assert list(detector.encoder.mean) == pytest.approx(MEAN)
    config = ScanConfig((str(shards),), str(tmp_path / "detector"), str(tmp_path / "out"), workers=0, policy=KEEP_ALL)
    assert scan(config).samples == 25
    scores = scores_by_key(tmp_path / "out")
    assert len(scores) == 25
    assert None not in scores.values()


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_full_fine_tuning_writes_a_folder_that_transformers_reads(folders, tmp_path, kind):
    shards = write_shards(tmp_path / "in", [40])
    config = FinetuneConfig(
        (str(shards),),
        EncoderSpec(f"hf:{folders(kind)}"),
        str(tmp_path / "out"),
        "full",
        epochs=2,
        batch_size=16,
        workers=0,
    )
    finetune(config)
    spec = load_encoder_spec(str(tmp_path / "out" / "encoder.yaml"))
    tuned = load_encoder(spec)
    assert tuned.fingerprint() != load_encoder(config.encoder).fingerprint()
    written = transformers.AutoModel.from_pretrained(tmp_path / "out" / "encoder").eval()
    pixels = processed(tmp_path / "out" / "encoder", IMAGES)
    with torch.no_grad():
        hidden = written(pixel_values=pixels).pooler_output
        found = tuned(IMAGES / 255)
    if kind == "dinov2":
        torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)
    assert found.shape == load_encoder(config.encoder)(IMAGES / 255).shape


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_contrastive_fine_tuning_writes_both_towers(folders, tmp_path, kind):
    folder = folders(kind)
    spec = EncoderSpec(f"hf:{folder}", tokenizer=str(folder / "tokenizer.json"))
    shards = captioned(tmp_path / "in", [60])
    config = FinetuneConfig(
        (str(shards),),
        spec,
        str(tmp_path / "out"),
        "contrastive",
        epochs=3,
        batch_size=20,
        learning_rate=1e-3,
        workers=0,
    )
    result = finetune(config)
    assert losses(result)[-1] < losses(result)[0]
    before, after = load_clip(spec), load_clip(load_encoder_spec(str(tmp_path / "out" / "encoder.yaml")))
    assert before.image.fingerprint() != after.image.fingerprint()
    assert not torch.allclose(before.text(["a red ring"]), after.text(["a red ring"]))
    model = getattr(transformers, MODELS[kind][0]).from_pretrained(tmp_path / "out" / "encoder").eval()
    with torch.no_grad():
        features = model.get_image_features(pixel_values=processed(folder, IMAGES))
        features = features if isinstance(features, torch.Tensor) else features.pooler_output
    torch.testing.assert_close(after.image(IMAGES / 255), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logit_scale.detach().reshape(()), after.logit_scale.detach())
