"""`sanitize inspect`: the verdicts, the whole command, wrong use."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SIZE, encoded, image_members, random_image, write_encoder, write_shards, write_tar
from click.testing import CliRunner

from sanitize.cli import main
from sanitize.commands.inspect import inspect
from sanitize.config_loading import load_encoder_spec
from sanitize.detectors.decree import inversion as decree
from sanitize.detectors.decree.config import DecreeConfig
from sanitize.detectors.decree.inversion import Inversion, InvertedTrigger, Restart
from sanitize.detectors.decree.verdict import peer_p, verdict_on

# ---------------------------------------------------------------- verdicts


def inversion_of(l1: float | None, plain: float = 0.5, size: int = 10) -> Inversion:
    """A result with a trigger of that L1; on 10x10 pixels P-L1 is l1 / 300."""
    pattern = torch.zeros(3, size, size, dtype=torch.uint8)
    trigger = (
        None if l1 is None else InvertedTrigger(torch.full((1, size, size), l1 / (3 * size**2)), pattern, 1, 0.995)
    )
    return Inversion((Restart(trigger, 10, 1, 0.1, 1e-3),), plain, 64, size)


def test_p_is_a_clean_encoders_chance_of_a_trigger_this_small():
    peers = np.exp(np.random.default_rng(0).normal(5, 0.3, (20_000, 6)))
    chances = np.array([peer_p(row[0], row[1:]) for row in peers])
    for rate in (0.01, 0.1, 0.5):
        assert (chances < rate).mean() == pytest.approx(rate, rel=0.15)
    assert peer_p(50, [100, 100, 100]) < 0.01 and peer_p(100, [100, 100, 100]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("l1", "peers", "verdict", "rule", "words"),
    [
        (29, (), "trojaned", "fixed", "is below 0.1; weak evidence: a fixed threshold (0.1) transfers only within one"),
        (31, (), "clean", "fixed", "is not below 0.1; weak evidence"),
        (29, (30, 31, None), "trojaned", "fixed", "weak evidence"),  # two sizes have no spread
        (
            40,
            (90, 100, 110),
            "trojaned",
            "peers",
            "p = 0.0079 against 3 clean peers (median L1 100.0), flagged below 0.01",
        ),
        (50, (90, 100, 110), "clean", "peers", "p = 0.014 against 3 clean peers"),
        (29, (28, 30, 32), "clean", "peers", "p = 0.36"),  # small, but so are clean ones
        (None, (90, 100, 110), "clean", "none", "no trigger found; this encoder looks clean to DECREE; additive or"),
    ],
)
def test_the_verdict_and_its_reason(l1, peers, verdict, rule, words):
    result = verdict_on(inversion_of(l1), peers, 0.99)
    assert (result.verdict, result.rule) == (verdict, rule)
    assert words in result.reason


def test_an_encoder_that_maps_everything_to_one_point_is_not_judged():
    result = verdict_on(inversion_of(1, plain=0.995), (), 0.99)
    assert (result.verdict, "DECREE cannot judge it" in result.reason) == ("undecided", True)


# ---------------------------------------------------------------- the command

FAST = ("--restarts", "1", "--set", "blocks=0", "--set", "pool=64", "--set", "batch_size=32", "--set", "epochs=12")


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    """Run `sanitize inspect` in a folder with aux/ and encoder/; returns (exit code, output)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_inspect_is_a_whole_command(sanitize, tmp_path):
    shard = [*image_members({f"s{i}": i for i in range(40)}), ("bad.png", b"no image"), ("text.txt", b"none")]
    write_tar(tmp_path / "aux" / "a.tar", [shard[-2], *shard[:-2], shard[-1]])
    write_shards(tmp_path / "aux", [40], first_seed=100)
    encoder = write_encoder(tmp_path / "encoder")
    arguments = ("--encoder", encoder, "--images", "aux", *FAST, "--seed", "5")
    code, output = sanitize(*arguments)
    assert code == 0, output
    assert "verdict: " in output
    assert "1 samples skipped: undecodable" in output
    assert "numbers and image: inspected/inspect.json" in output
    report = json.loads((tmp_path / "inspected" / "inspect.json").read_text())
    assert (report["settings"]["seed"], report["images"], report["skipped"]) == (5, 64, {"undecodable": 1})
    assert report["convention"] == "l1 = sum of the mask over 3 channels; p_l1 = l1 / (3 H W); pixels = l1 / 3"
    assert len(report["encoder_fingerprint"]) == 64
    assert {"torch", "sanitize"} <= set(report["versions"])
    assert report["best"]["cosine"] > 0.99
    assert (tmp_path / "inspected" / "trigger.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "inspected" / "inspect.html").read_text()
    assert f"<dd>{report['verdict']['verdict']}<small>" in page
    assert "data:image/png;base64," in page
    assert f"smallest trigger: L1 {report['best']['l1']:.1f}, P-L1 {report['best']['p_l1']:.4f}" in output
    assert sanitize(*arguments, "--out", "again")[0] == 0
    assert json.loads((tmp_path / "again" / "inspect.json").read_text())["best"] == report["best"]


def test_the_image_shows_the_trigger_and_goes_when_there_is_none(tmp_path, monkeypatch):
    write_shards(tmp_path / "aux", [80])
    spec = load_encoder_spec(str(write_encoder(tmp_path / "encoder")))
    found = dataclasses.replace(inversion_of(None), restarts=(Restart(white_trigger(), 10, 1, 0.1, 1e-3),))
    for inversion, there in ((found, True), (inversion_of(None), False)):
        monkeypatch.setattr(decree, "invert", lambda *_, result=inversion: result)
        result = inspect(spec, [str(tmp_path / "aux")], str(tmp_path / "out"), DecreeConfig(pool=64))
        assert (tmp_path / "out" / "trigger.png").exists() == there
        assert ("smallest trigger: L1 48.0, P-L1 0.0625, 16.0 pixels" in result.text) == there


def white_trigger() -> InvertedTrigger:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, -4:, -4:] = 1
    return InvertedTrigger(mask, torch.full((3, SIZE, SIZE), 255, dtype=torch.uint8), 1, 0.995)


def test_clean_peers_set_the_scale(sanitize, tmp_path, monkeypatch):
    write_shards(tmp_path / "aux", [70])
    encoders = [write_encoder(tmp_path / f"encoder{seed}", seed) for seed in range(4)]
    sizes = iter([40, 90, 100, 110])
    monkeypatch.setattr(decree, "invert", lambda *_: inversion_of(next(sizes), size=SIZE))
    peers = [argument for peer in encoders[1:] for argument in ("--peer", peer)]
    code, output = sanitize("--encoder", encoders[0], "--images", "aux", *peers)
    assert code == 0
    assert "verdict: trojaned (p = 0.0079 against 3 clean peers (median L1 100.0), flagged below 0.01)" in output
    assert "clean peers: L1 90.0, L1 100.0, L1 110.0" in output
    report = json.loads((tmp_path / "inspected" / "inspect.json").read_text())
    assert [peer["l1"] for peer in report["peers"]] == pytest.approx([90, 100, 110], rel=1e-6)


IMAGES = ("--images", "aux")
ENCODER = ("--encoder", "encoder/encoder.yaml")
OTHERS = ("--peer", "other/encoder.yaml")
WRONG = {
    "no encoder": (IMAGES, "no encoder given. Name its YAML file: sanitize inspect --encoder encoder.yaml"),
    "no images": (ENCODER, "no images given. Name auxiliary shards: sanitize inspect --encoder encoder/encoder.yaml"),
    "missing encoder": (("--encoder", "e.yaml", *IMAGES), "e.yaml: no such file. Check the path."),
    "missing images": ((*ENCODER, "--images", "nowhere"), "nowhere: no such file or folder"),
    "too few images": ((*ENCODER, *IMAGES), "3 usable auxiliary images, 1 undecodable: DECREE needs at least 64."),
    "unknown setting": (
        (*ENCODER, *IMAGES, "--set", "colour=1"),
        "settings of inspect: unknown key 'colour'. Known keys: pool, batch_size",
    ),
    "wrong type": ((*ENCODER, *IMAGES, "--set", "pool=many"), "pool holds 'many', int was expected"),
    "no restart": ((*ENCODER, *IMAGES, "--restarts", "0"), "epochs and restarts must be at least 1"),
    "negative seed": ((*ENCODER, *IMAGES, "--seed", "-1"), "seed: -1 is negative"),
    "small pool": ((*ENCODER, *IMAGES, "--set", "pool=8"), "batch_size: must be at least 2 and at most pool"),
    "threshold": ((*ENCODER, *IMAGES, "--set", "threshold=2"), "threshold: 2.0 is not between 0 and 1"),
    "milestones": ((*ENCODER, *IMAGES, "--set", "milestones=[9]"), "learning_rates: give one more than milestones"),
    "two peers": ((*ENCODER, *IMAGES, *OTHERS, *OTHERS), "2 peer(s) given: how clean encoders differ takes at least 3"),
    "same peer": ((*ENCODER, *IMAGES, *OTHERS * 3), "peer 2: is the encoder under test or an earlier peer"),
    "peer of another kind": (
        (*ENCODER, *IMAGES, *("--peer", "wide/encoder.yaml") * 3),
        "peer 1: its width is 8, that of the encoder under test is 4. Sizes of triggers compare only within one",
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Folders of encoders by name: one under test, another, and one of another width."""
    root = tmp_path_factory.mktemp("encoders")
    shapes = {"encoder": (0, 4), "other": (1, 4), "wide": (2, 8)}
    return {name: write_encoder(root / name, seed, width=width).parent for name, (seed, width) in shapes.items()}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_clear_line_and_exit_code_2(sanitize, tmp_path, encoders, case):
    write_tar(tmp_path / "aux" / "a.tar", [*image_members(["a", "b", "c"]), ("d.png", encoded(random_image(1))[:40])])
    for name, folder in encoders.items():
        (tmp_path / name).symlink_to(folder)
    arguments, words = WRONG[case]
    code, output = sanitize(*arguments)
    assert (words in output, code, "Traceback" in output) == (True, 2, False), output


def test_help_shows_an_example(sanitize):
    code, output = sanitize("--help")
    assert (code, "Example:  sanitize inspect --encoder encoder.yaml --images aux/" in output) == (0, True)
