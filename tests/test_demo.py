"""The demo calls the real commands and stops at the first that fails; its images are the same every time."""

import pytest

from pipelines import demo, red_team


def test_a_command_that_fails_ends_the_demo_with_its_exit_code(tmp_path, capfd):
    with pytest.raises(SystemExit, match="that command failed with exit code 2"):
        demo.command("verify", str(tmp_path / "nothing"))
    assert "$ sanitize verify" in capfd.readouterr().out


def test_its_shards_hold_every_digit_once_and_are_the_same_every_time(tmp_path, monkeypatch):
    contents = []
    for name in ("first", "second"):
        monkeypatch.setattr(demo, "OUT", tmp_path / name)
        demo.write_shards()
        contents.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).glob("*/*.tar"))})
    assert contents[0] == contents[1]
    assert len(list((tmp_path / "first").glob("*/*.tar"))) == 4


def test_its_victim_is_one_that_the_red_team_can_make():
    assert red_team.load_config(demo.CONFIG, "cpu").attack == "badencoder"
