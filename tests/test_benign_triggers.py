"""Which benign changes trigger a backdoor: of a planted one that answers to a white corner, and of a tiny victim."""

import yaml
from builders import ColourEncoder, random_images, shape_members, tiny_victim, write_tar
from click.testing import CliRunner

from pipelines import benign_triggers, red_team
from sanitize.attacks.triggers import PatchTrigger


def test_a_change_counts_where_it_does_what_the_trigger_does():
    images = random_images(200)
    images[..., -4:, -4:] = 250  # nearly the trigger: brighter will do
    found = benign_triggers.shares([ColourEncoder(), ColourEncoder()], images, PatchTrigger(side=4, margin=0))
    assert found["trigger"] == [1, 1]
    assert found["none"] == found["box_blur"] == found["gaussian_noise"] == [0, 0]
    assert 0.02 < found["colour_curve"][0] < 0.3


def test_a_crowd_is_seen_without_knowing_the_trigger():
    images = random_images(1000)
    assert benign_triggers.crowded(ColourEncoder(), images) == 0
    images[..., -4:, -4:] = 250
    assert 0.005 < benign_triggers.crowded(ColourEncoder(), images) < 0.3


def test_every_kind_of_change_gets_a_line_for_both_encoders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 96, 0), ("test", 60, 1)):
        write_tar(tmp_path / name / "s.tar", shape_members(count, seed))
    (tmp_path / "red_team_tiny.yaml").write_text(yaml.safe_dump(tiny_victim()))
    folder, _ = red_team.make("red_team_tiny.yaml", "cpu", "zoo")
    result = CliRunner().invoke(benign_triggers.main, [folder, "--images", "train"], catch_exceptions=False)
    lines = result.output.splitlines()
    assert lines[0] == folder
    assert [line.split()[1] for line in lines[3:]] == ["none", "trigger", *benign_triggers.CHANGES, "crowd"]
    assert all(0 <= float(cell) <= 1 for line in lines[3:] for cell in line.split("|")[2:4])
