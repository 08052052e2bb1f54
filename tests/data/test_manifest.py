"""A manifest is what its packer wrote, or refused; it cannot make anyone read outside its folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dbscale.data import DataError, load_manifest, open_dataset
from dbscale.data.manifest import make_fingerprint, save_manifest


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_classes(content: dict) -> None:
    content["classes"].reverse()


def set_count(content: dict) -> None:
    content["splits"]["train"]["num_samples"] -= 1


def swap_splits(content: dict) -> None:
    splits = content["splits"]
    splits["train"], splits["test"] = splits["test"], splits["train"]


def set_extra(content: dict) -> None:
    content["extra"]["seed"] = 12


def test_prefixes_are_balanced_over_classes_or_over_one_stratum_of_masks(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert (manifest.num_classes, manifest.num_strata) == (4, 4)
    dense = manifest.model_copy(update={"target": "mask"})
    assert (dense.num_classes, dense.num_strata) == (4, 1)


@pytest.mark.parametrize("change", [set_classes, set_count, swap_splits, set_extra])
def test_a_manifest_that_was_edited_is_refused(own_folder: Path, change: Callable[[dict], object]) -> None:
    edit(own_folder, change)
    with pytest.raises(DataError, match=r"manifest.json: damaged or foreign manifest \(checksum .*: it changed"):
        open_dataset(own_folder)


def test_manifests_of_earlier_releases_have_no_checksum(own_folder: Path) -> None:
    expected = load_manifest(own_folder)
    edit(own_folder, lambda content: content.pop("checksum"))
    assert load_manifest(own_folder) == expected.model_copy(update={"checksum": None})


def test_formatting_is_not_content(own_folder: Path) -> None:
    expected = load_manifest(own_folder)
    edit(own_folder, lambda content: None)
    assert load_manifest(own_folder) == expected


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "a/b.tar", ".hidden", ""])
def test_names_that_lead_out_of_the_folder_are_refused(own_folder: Path, name: str) -> None:
    def shard(content: dict) -> None:
        content["splits"]["train"]["shards"][0]["name"] = name

    def index(content: dict) -> None:
        content["splits"]["train"]["index"] = name

    for change in (shard, index):
        edit(own_folder, lambda content, change=change: (content.pop("checksum", None), change(content)))
        with pytest.raises(DataError, match=r"damaged or foreign manifest .*pattern"):
            load_manifest(own_folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"name": "x"}', "\xff\xfe", "[" * 5000, '{"a":' * 5000])
def test_what_is_no_manifest_is_named(own_folder: Path, text: str) -> None:
    (own_folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="damaged or foreign manifest"):
        load_manifest(own_folder)


def test_absent_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest .the folder does not exist."):
        load_manifest(tmp_path / "absent")
    with pytest.raises(DataError, match="the folder holds no finished dataset"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest.json: cannot be read \(Is a directory\)"):
        load_manifest(tmp_path)


def test_another_format_is_refused(own_folder: Path) -> None:
    edit(own_folder, lambda content: content.update(format_version=2))
    with pytest.raises(DataError, match="format version 2, this release reads 1; pack again"):
        load_manifest(own_folder)


def test_the_fingerprint_is_of_classes_encoding_and_samples_alone(own_folder: Path) -> None:
    manifest = load_manifest(own_folder)
    splits = dict(manifest.splits)
    assert make_fingerprint(manifest.classes, "raw", splits) == manifest.fingerprint
    renamed = splits["train"].model_copy(update={"index": "other.npy", "shards": ()})
    assert make_fingerprint(manifest.classes, "raw", {**splits, "train": renamed}) == manifest.fingerprint
    assert make_fingerprint(manifest.classes[::-1], "raw", splits) != manifest.fingerprint
    assert make_fingerprint(manifest.classes, "jpeg256", splits) != manifest.fingerprint
    assert (
        make_fingerprint(manifest.classes, "raw", {"train": splits["test"], "test": splits["train"]})
        != manifest.fingerprint
    )


def test_saving_returns_what_is_read(own_folder: Path) -> None:
    saved = save_manifest(own_folder, load_manifest(own_folder).model_copy(update={"seed": 5}))
    assert load_manifest(own_folder) == saved and saved.seed == 5


def test_importing_the_wing_does_not_import_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, dbscale.data.dataset, dbscale.shards.pack, dbscale.shards.verify; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
