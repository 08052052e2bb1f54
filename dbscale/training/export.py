"""A finished cell as a folder anyone can use: plain timm weights, timm's config, the recipe and a model card.

`timm.create_model("local-dir:<folder>", pretrained=True)` loads it as it stands. The command line face is launch's.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from timm.models._hub import save_config_for_hf

from dbscale.data import IMAGENET_MEAN, IMAGENET_STD, load_manifest
from dbscale.errors import DataError, TrainingError
from dbscale.files import atomic_open, write_json
from dbscale.study.cell import CellSpec
from dbscale.study.store import Row, Store
from dbscale.training.models import WEIGHTS_NAME, make_model, timm_arguments, verified_weights


def export_cell(store: Store, key: str, target: Path, data_dir: Path | None = None) -> Path:
    """Write `model.safetensors`, `config.json`, `recipe.json`, `row.json` and the card `README.md` into `target`.

    The names of the classes come from the packed dataset in `data_dir`, where that is the one the cell was trained on.

    Raises TrainingError when the cell is not done or its weights are damaged, FileError when `target` cannot be
    written.
    """
    spec, row = store.read_spec(key), store.read_row(key)
    if row is None:
        raise TrainingError(f"cell {key} is {store.state(key)}; only finished cells are exported")
    if spec.recipe.task is not None:
        raise TrainingError(
            f"cell {key} is a {spec.recipe.task_name}: its head is not timm's, and only classifiers are exported; the "
            f"backbone stands in {store.cell_dir(key) / WEIGHTS_NAME} as `backbone.<timm's name>`"
        )
    weights = verified_weights(store, row)
    target.mkdir(parents=True, exist_ok=True)
    with weights.open("rb") as source, atomic_open(target / WEIGHTS_NAME, "wb") as copy:
        shutil.copyfileobj(source, copy)
    names = class_names(spec, data_dir)
    _write_config(spec, row, names, target / "config.json")
    write_json(target / "recipe.json", spec.model_dump(mode="json"))
    write_json(target / "row.json", row.model_dump(mode="json"))
    with atomic_open(target / "README.md", "w") as file:
        file.write(model_card(spec, row, names))
    return target


def class_names(spec: CellSpec, data_dir: Path | None) -> tuple[str, ...] | None:
    """By label, of the dataset that the cell was trained on; None where that is not in `data_dir` (any more)."""
    try:
        manifest = load_manifest(data_dir / "shards" / spec.recipe.data.dataset) if data_dir is not None else None
    except DataError:
        return None
    return None if manifest is None or manifest.fingerprint != spec.fingerprint else manifest.classes


def push_export(folder: Path, target: str, *, private: bool = False) -> str:
    """Upload an exported cell to the hub as `hf-hub:owner/name`; returns its address. The token is the hub client's own.

    Raises TrainingError where the name is none, or the hub refuses or cannot be reached.
    """
    repository = target.removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise TrainingError(f"--push {target!r}: write hf-hub:owner/name, such as hf-hub:my-lab/birds-h4")
    api = HfApi(library_name="dbscale")
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}"))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise TrainingError(f"--push {target!r}: {why}; log in with `hf auth login`, and look at the network; the export is "
                            f"in {folder}") from error  # fmt: skip


def _write_config(spec: CellSpec, row: Row, names: tuple[str, ...] | None, path: Path) -> None:
    size = spec.recipe.data.image_size
    model = make_model(spec.recipe.model, num_classes=row.num_classes, image_size=size)
    preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, size, size), "crop_pct": 1.0}
    save_config_for_hf(model, str(path), {"label_names": names} if names else None, data_config=preprocessing)


def model_card(spec: CellSpec, row: Row, names: tuple[str, ...] | None = None) -> str:
    """Markdown: what it is, how good, how it was trained, how to load it."""
    recipe = spec.recipe
    name, arguments = timm_arguments(recipe.model, num_classes=row.num_classes, image_size=recipe.data.image_size)
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    top5 = "" if row.top5_error_rate is None else f", top-5 {row.top5_error_rate:.2%}"
    calibration = "" if row.calibration_error is None else f", expected calibration error {row.calibration_error:.4f}"
    classes = ("by label in `label_names` of `config.json`" if names else
               "not known here: export again with --data, where the packed dataset is")  # fmt: skip
    lineage = "".join(f"- {role}: `{parent}`\n" for role, parent in _parents(spec))
    return f"""---
library_name: timm
tags: [image-classification, timm, dbscale]
---
# {row.key}

`{row.model}` with {row.num_params:,} parameters, {row.num_classes} classes, {recipe.data.image_size} px: stage
{row.stage}, {row.arm} arm, trained on {row.num_samples:,} samples of `{row.dataset}`, seed {row.seed}.

- top-1 error {row.error_rate:.2%}{top5} on {row.num_test_samples:,} test images, loss {row.test_loss:.4f}{calibration}
- {row.num_steps:,} steps, {row.samples_seen:,} samples seen, {row.train_flops:.3g} training FLOPs, \
{row.timing.device_time_s:,.0f} device-seconds on {row.timing.device}
- names of the classes: {classes}
- SHA-256 of `{WEIGHTS_NAME}`: `{row.weights_sha256}`
{lineage}
The whole recipe is in `recipe.json`, all results in `row.json`.

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True)
# or, without config.json
model = timm.create_model("{name}", {keywords}, checkpoint_path="{WEIGHTS_NAME}")
```

Images: RGB on the 0…1 scale, normalised with mean {IMAGENET_MEAN} and standard deviation {IMAGENET_STD}.
"""


def _parents(spec: CellSpec) -> list[tuple[str, str]]:
    roles = (("distilled from", spec.teacher), ("finetuned from", spec.init))
    return [(role, parent) for role, parent in roles if parent is not None]
