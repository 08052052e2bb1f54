"""`dbscale shards pack|verify|info` as typed: what is printed, and the exit code."""

import os
from pathlib import Path

import pytest

from dbscale.launch.cli import main


@pytest.fixture
def packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A data folder in which the demo's digits are packed."""
    arguments = ["shards", "pack", "digits", "--data", str(tmp_path)]
    assert main(arguments) == 0
    assert f"digits: {tmp_path / 'shards' / 'digits'}" in capsys.readouterr().out
    return tmp_path


def test_info_tells_balance_counts_and_fingerprint(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dbscale.data import load_manifest

    assert main(["shards", "info", "--data", str(packed)]) == 0
    text = capsys.readouterr().out
    manifest = load_manifest(packed / "shards" / "digits")
    train = manifest.split("train")
    assert f"fingerprint {manifest.fingerprint}" in text
    assert f"class-balanced within one up to {train.balanced_up_to:,} samples" in text
    lines = [line.split() for line in text.splitlines()]
    for label, name in enumerate(manifest.classes):
        counts = [f"{split.class_counts[label]:,}" for split in manifest.splits.values()]
        assert [str(label), name, *counts] in lines


def test_verify_names_what_is_wrong_and_pack_mends_it(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "verify", "digits", "--data", str(packed)]) == 0
    assert "digits: all samples good" in capsys.readouterr().out
    tar = packed / "shards" / "digits" / "train-000000.tar"
    whole = tar.read_bytes()
    os.truncate(tar, 5000)
    assert main(["shards", "verify", "--data", str(packed)]) == 1
    text = capsys.readouterr().out
    assert "digits: 1 problems" in text
    assert f"train-000000.tar: has 5,000 bytes, expected {len(whole):,}" in text
    assert "dbscale shards pack digits" in text
    assert main(["shards", "pack", "digits", "--data", str(packed)]) == 0
    assert tar.read_bytes() == whole


def test_names_that_are_not_there(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "info", str(packed / "shards" / "digits")]) == 0
    assert "digits: 10 classes" in capsys.readouterr().out
    assert main(["shards", "info", "digit", "--data", str(packed)]) == 1
    assert "no packed dataset 'digit'" in capsys.readouterr().err
    assert main(["shards", "pack", "digit", "--data", str(packed)]) == 1
    assert "no dataset 'digit'" in capsys.readouterr().err
    assert main(["shards", "info", "--data", str(packed / "empty")]) == 0
    assert "no packed dataset" in capsys.readouterr().out
