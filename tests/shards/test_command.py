"""`dbscale shards pack|verify|info` as typed: what is printed, and the exit code."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbscale.errors import ConfigError, DataError
from dbscale.launch.cli import main
from dbscale.shards.publish import guess_entry


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


def photos(folder: Path, *parts: str) -> Path:
    """An image folder of two classes, with these splits or none."""
    for part in parts or ("",):
        for label, name in enumerate(("finch", "wren")):
            (place := folder / part / name).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (24, 20), (label * 90, number * 20, 0)).save(place / f"{number}.png")
    return folder


def test_any_folder_is_packed_without_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dbscale.data import open_dataset

    out = tmp_path / "packed" / "birds"
    assert main(["shards", "pack", f"{photos(tmp_path / 'birds', 'train', 'val')}", str(out), "--option", "encoding=raw",
                 "--option", "raw_size=16"]) == 0  # fmt: skip
    assert f"as {out}" in capsys.readouterr().out
    dataset = open_dataset(out)
    assert (dataset.num_samples, open_dataset(out, "test").num_samples) == (20, 20)
    assert (dataset.manifest.name, dataset.manifest.classes) == ("birds", ("finch", "wren"))
    assert dataset.manifest.image.max_side == 16


def test_any_folder_is_packed_to_a_url_and_used_by_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dbscale.data import load_manifest, open_dataset
    from dbscale.shards.pack import ensure_packed

    source = photos(tmp_path / "birds")
    assert main(["shards", "pack", str(source), "memory://nest/birds"]) == 0
    entry = {"source": "remote", "url": "memory://nest/birds"}
    folder = ensure_packed("birds", entry, tmp_path / "data")
    assert ensure_packed("birds", entry, tmp_path / "data") == folder
    assert not list(folder.glob("*.tar"))
    manifest = load_manifest(folder)
    assert manifest.source == {"source": "imagefolder", "path": "birds", "test": 0.1}
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 18, "test": 2}
    assert open_dataset(folder, image_size=16).reader.fetch(np.arange(18))[1] == []
    assert main(["shards", "pack", "birds", "--data", str(tmp_path / "data")]) == 0
    with pytest.raises(DataError, match="comes from memory://nest/birds, now asked for memory://nest/other"):
        ensure_packed("birds", {"source": "remote", "url": "memory://nest/other"}, tmp_path / "data")
    with pytest.raises(ConfigError, match="source remote"):
        ensure_packed("birds", {"source": "remote", "url": "nest/birds"}, tmp_path / "data")


def test_a_folder_that_holds_nothing_to_pack_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "pack", f"{tmp_path}/none", f"{tmp_path}/out"]) == 1
    assert "none: no such folder" in capsys.readouterr().err
    assert main(["shards", "pack", f"{tmp_path}/", f"{tmp_path}/out"]) == 1
    assert "holds neither images nor tars nor parquet tables" in capsys.readouterr().err
    assert main(["shards", "pack", "./birds"]) == 1
    assert "where to pack it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "entry"),
    [
        (["data/train-0.parquet", "data/test-0.parquet"],
         {"source": "parquet", "train": ["**/*train*.parquet"], "test": ["**/*test*.parquet"]}),
        (["a.tar", "b.tar.gz"], {"source": "webdataset", "train": ["**/*.tar", "**/*.tar.gz"], "test": 0.1}),
        (["train/a/1.jpg", "val/a/1.jpg"], {"source": "imagefolder", "test": "val"}),
        (["train/a/1.jpg"], {"source": "imagefolder", "test": 0.1}),
    ],
)  # fmt: skip
def test_the_kind_of_a_folder_is_told_by_its_files(tmp_path: Path, names: list[str], entry: dict[str, object]) -> None:
    for name in names:
        (path := tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert guess_entry(tmp_path / "d") == {"path": "d", **entry}
