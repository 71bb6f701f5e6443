"""Commands as a user types them: exit codes, messages, configuration."""

import re

import pytest
import yaml
from builders import write_shards, write_tar

from sanitize.config import FinetuneConfig, FitConfig, ScanConfig
from sanitize.config_loading import from_mapping
from sanitize.presets import FIT_PRESETS

FAST = (
    "--workers",
    "0",
    "--set",
    "training.epochs=1",
    "--set",
    "training.precision=fp32",
    "--set",
    "training.calibration_fraction=0.5",
)


def test_fit_then_scan_are_whole_commands_with_a_config_file(sanitize, tmp_path, encoder_yaml, aux_shards, shards):
    settings = {
        "fit": {"shards": str(aux_shards), "encoder": str(encoder_yaml), "training": {"epochs": 1}, "workers": 0},
        "scan": {"workers": 0, "policy": {"policy": "fraction", "fraction": 0.1}},
    }
    (tmp_path / "sanitize.yaml").write_text(yaml.safe_dump(settings))
    code, output = sanitize("fit")
    assert (code, "detector: trained on" in output) == (0, True)
    code, output = sanitize("scan", shards)
    assert code == 0
    assert "scanned: 54 samples scored, 0 without a score" in output
    assert "scanned/clean: 49 of 54 samples kept; 5 in scanned/quarantine" in output
    code, output = sanitize("clean", "scanned/", "--fraction", "0.2")
    assert (code, "43 of 54 samples kept" in output) == (0, True)
    code, output = sanitize("verify", "scanned/")
    assert (code, "0 problems" in output) == (0, True)


BAD_YAML = {
    "a section that is text": ("scan: text", "sanitize.yaml: scan holds 'text', a block of settings was expected."),
    "aliases that unfold to gigabytes": (
        "scan:\n  a0: &a0 [1]\n" + "".join(f"  a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
        "sanitize.yaml: not valid YAML (its aliases unfold to more than 100000 values). Correct",
    ),
    "a list that holds itself": ("scan: &a [*a]", "its aliases unfold to more than 100000 values"),
    "a list inside a list, very often": ("[" * 20_000, "sanitize.yaml: not valid YAML (maximum recursion depth"),
    "not text": ("scan: \0", "sanitize.yaml: not valid YAML ("),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_a_configuration_that_cannot_be_read_is_one_line(sanitize, tmp_path, case):
    text, words = BAD_YAML[case]
    (tmp_path / "sanitize.yaml").write_text(text)
    code, output = sanitize("scan", "shards/")
    assert (code, words in output, output.count("\n")) == (2, True, 1), output[:500]


@pytest.mark.parametrize("out", ["", "/"])
@pytest.mark.parametrize("command", ["fit", "scan", "finetune"])
def test_an_output_that_is_no_folder_of_its_own_is_refused(sanitize, encoder_yaml, command, out):
    settings = ("--set", f"encoder={encoder_yaml}") if command != "scan" else ()
    code, output = sanitize(command, "shards/", "--out", out, *settings)
    assert code == 2
    assert f"out: {out!r} is no folder of your own. Name one to write to." in output


def test_poison_scan_audit_with_truth(sanitize, detector, tmp_path):
    write_shards(tmp_path / "in", [60])
    code, output = sanitize("poison", "in", "--rate", "0.1", "--set", "side=8", "--out", "poisoned")
    assert (code, "6 of 60 samples poisoned; truth in poisoned/poison.json" in output) == (0, True)
    code, _ = sanitize("scan", "poisoned", "--detector", detector, "--workers", "0", "--fraction", "0.1")
    assert code == 0
    code, output = sanitize("audit", "scanned", "--truth", "poisoned/poison.json", "--top", "4")
    assert code == 0
    assert re.search(r"truth: 6 poisoned, 54 clean: AUROC 0\.\d+", output)
    made = sorted(p.name for p in (tmp_path / "scanned" / "audit").iterdir())
    assert made == ["report.html", "summary.json"]


def test_a_failed_shard_gives_exit_code_1_and_is_named(sanitize, detector, tmp_path):
    write_shards(tmp_path / "in", [5])
    (tmp_path / "in" / "bad.tar").write_bytes(b"<html>")
    code, output = sanitize("scan", "in", "--detector", detector, "--workers", "0", "--threshold", "1e9")
    assert code == 1
    assert "bad.tar: not a tar archive" in output
    assert "1 shard(s) failed or are damaged; everything else is done." in output
    assert (tmp_path / "scanned" / "clean" / "part-0000.tar").exists()


def test_removing_more_than_half_gives_exit_code_3_unless_forced(sanitize, detector, shards):
    arguments = ("scan", shards, "--detector", detector, "--workers", "0", "--fraction", "0.9")
    code, output = sanitize(*arguments)
    assert (code, "more than half" in output) == (3, True)
    assert sanitize(*arguments, "--force")[0] == 0


def test_init_writes_settings_that_load(sanitize, tmp_path):
    code, output = sanitize("init")
    assert (code, output.split()) == (0, ["wrote", "sanitize.yaml", "wrote", "encoder.yaml"])
    values = yaml.safe_load((tmp_path / "sanitize.yaml").read_text())
    encoder = yaml.safe_load((tmp_path / "encoder.yaml").read_text())
    fit = {key: value for key, value in values["fit"].items() if key != "preset"} | {"encoder": encoder}
    from_mapping(FitConfig, fit, "fit")
    from_mapping(ScanConfig, values["scan"], "scan")
    from_mapping(FinetuneConfig, values["finetune"] | {"encoder": encoder}, "finetune")
    code, output = sanitize("init")
    assert (code, "sanitize.yaml: is here already" in output) == (2, True)


WRONG = {
    "no shards": (["scan"], "no shards given. Name a folder: sanitize scan shards/"),
    "missing folder": (["scan", "nowhere"], "nowhere: no such file or folder. Check the path"),
    "no encoder to fine-tune": (["finetune", "in"], "no encoder given. Describe it in a YAML file"),
    "no encoder": (["fit", "in"], "no encoder given. Describe it in a YAML file"),
    "missing encoder file": (["fit", "in", "--encoder", "e.yaml"], "e.yaml: no such file. Check the path."),
    "unknown preset": (
        ["fit", "in", "--preset", "best"],
        "Invalid value for '--preset': 'best' is not one of 'default', 'paper'",
    ),
    "unknown setting": (
        ["scan", "in", "--set", "colour=1"],
        "settings of scan: unknown key 'colour'. Known keys: shards, detector",
    ),
    "wrong type": (["scan", "in", "--set", "batch_size=many"], "batch_size holds 'many', int was expected"),
    "not key=value": (["scan", "in", "--set", "batch_size"], "--set batch_size: write it as key=value"),
    "unknown policy": (["scan", "in", "--policy", "magic"], "'--policy': 'magic' is not one of 'calibrated', 'fdr'"),
    "unknown precision": (
        ["scan", "in", "--precision", "int8"],
        "'--precision': 'int8' is not one of 'auto', 'bf16', 'fp32'",
    ),
    "unknown mode": (
        ["finetune", "in", "--mode", "lora"],
        "'--mode': 'lora' is not one of 'linear', 'mlp', 'full', 'contrastive'",
    ),
    "two cuts": (
        ["scan", "in", "--fraction", "0.1", "--threshold", "3"],
        "the options: fraction, threshold do not go together (fraction belongs to fraction; threshold belongs to absolute). Give one",
    ),
    "a cut of another policy": (
        ["scan", "in", "--policy", "fdr", "--mad", "3"],
        "the options: policy fdr, mad do not go together (mad belongs to robust). Give one of them.",
    ),
    "rate out of range": (["scan", "in", "--fpr", "7"], "fpr: 7.0 is not between 0 and 1"),
    "unknown trigger": (
        ["poison", "in", "--trigger", "star"],
        "Invalid value for '--trigger': 'star' is not one of 'patch', 'file', 'image', 'blend'",
    ),
    "trigger too large": (
        ["poison", "in", "--set", "side=99", "--rate", "1"],
        "trigger of side 99 with margin 1 does not fit a 16 x 16 image",
    ),
    "unknown trigger setting": (
        ["poison", "in", "--set", "size=9"],
        "trigger patch: unknown key 'size'. Known keys: side",
    ),
    "too few to poison": (["poison", "in"], "rate 0.01 of 3 samples rounds to none. Use a higher rate"),
    "no scan there": (["audit", "in"], "in: no scan there (run.json is missing)"),
    "too many workers": (["scan", "in", "--workers", "4000"], "do not fit: there are"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_clear_line_and_exit_code_2(sanitize, tmp_path, detector, case):
    write_shards(tmp_path / "in", [3])
    (tmp_path / "detector").symlink_to(detector)
    arguments, words = WRONG[case]
    code, output = sanitize(*arguments)
    assert words in output
    assert code == 2
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scan: {detektor: x}", "settings of scan: unknown key 'detektor'"),
        ("skan: {}", "sanitize.yaml: unknown section 'skan'. Known sections: fit, scan, finetune."),
        ("scan: [", "sanitize.yaml: not valid YAML"),
        ("scan: {policy: {policy: magic}}", "policy: 'magic' is not one of calibrated, fdr"),
        ("scan: {policy: fdr}", "sanitize.yaml: policy holds 'fdr', a block of settings was expected"),
        (
            "scan: {policy: {policy: calibrated, fraction: 0.2}}",
            "sanitize.yaml: policy calibrated, fraction do not go together (fraction belongs to fraction). Give one of them.",
        ),
        ("just text", "holds str, settings were expected"),
        (
            "fit: {encoder: {architecture: resnet18, image_size: -1}}",
            "encoder: image_size: -1 is not between 1 and 4096 pixels",
        ),
        ("fit: {decoder: {patch_size: 3}}", "decoder: decoder.patch_size: 3 does not divide decoder.image_size 8"),
    ],
)
def test_mistakes_in_the_config_file_name_the_file_and_the_key(sanitize, tmp_path, text, words):
    write_shards(tmp_path / "in", [3])
    (tmp_path / "sanitize.yaml").write_text(text)
    command = ["fit", "in"] if text.startswith("fit") else ["scan", "in"]
    if "decoder" in text:
        (tmp_path / "e.yaml").write_text("architecture: resnet18")
        command += ["--encoder", "e.yaml"]
    code, output = sanitize(*command)
    assert (words in output, code) == (True, 2), output


def test_truth_of_other_shards_is_refused(sanitize, detector, tmp_path):
    write_shards(tmp_path / "in", [30])
    sanitize("scan", "in", "--detector", detector, "--workers", "0", "--fraction", "0.1")
    (tmp_path / "t.json").write_text('{"poisoned": [{"shard": "other", "key": "k", "index": 0}]}')
    code, output = sanitize("audit", "scanned", "--truth", "t.json")
    assert (code, "names 1 samples that the scan does not have (first: shard other, index 0)" in output) == (2, True)
    (tmp_path / "t.json").write_text('{"poisoned": []}')
    code, output = sanitize("audit", "scanned", "--truth", "t.json")
    assert (code, "all 30 scored samples are clean; metrics need both" in output) == (2, True)
    (tmp_path / "t.json").write_text('{"keys": []}')
    code, output = sanitize("audit", "scanned", "--truth", "t.json")
    assert (code, "not a truth file" in output) == (2, True)


def test_a_tar_without_images_is_a_failed_shard(sanitize, detector, tmp_path):
    write_tar(tmp_path / "in" / "s.tar", [("a.wav", b"x")])
    code, output = sanitize("scan", "in", "--detector", detector, "--workers", "0")
    assert (code, "none of its 1 samples has an image" in output) == (1, True)


@pytest.mark.parametrize(
    "command", ["fit", "scan", "clean", "finetune", "audit", "verify", "poison", "check-encoder", "init"]
)
def test_help_of_every_command_shows_an_example(sanitize, command):
    code, output = sanitize(command, "--help")
    assert code == 0
    assert f"Example:  sanitize {command}" in output


def test_the_paper_preset_is_the_reference_code():
    paper = FIT_PRESETS["paper"]
    assert paper["decoder"] == {
        "image_size": 32,
        "patch_size": 4,
        "width": 192,
        "heads": 3,
        "encoder_depth": 12,
        "decoder_depth": 4,
        "standardize_embedding": False,
    }
    assert (paper["training"]["epochs"], paper["training"]["mask_ratio_min"], paper["test_mask_ratio"]) == (
        200,
        0.9,
        0.99,
    )
