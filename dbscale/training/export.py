"""A finished cell as a folder anyone can use: plain timm weights, timm's config, the recipe and a model card.

`timm.create_model("local-dir:<folder>", pretrained=True)` loads it as it stands. Of a dense task that is the backbone; its
head, which timm has no place for, lies beside it, and `load_export` joins both. The command line face is launch's.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import timm
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from timm.models._hub import save_config_for_hf
from torch import Tensor

from dbscale.data import IMAGENET_MEAN, IMAGENET_STD, load_manifest
from dbscale.errors import DataError, TrainingError
from dbscale.files import atomic_open, read_model, write_json, write_model
from dbscale.strict import Strict
from dbscale.study.cell import CellSpec
from dbscale.study.recipe import Recipe
from dbscale.study.store import Row, Store
from dbscale.study.task import ERRORS, DenseTask
from dbscale.training.dense import DenseModel
from dbscale.training.models import (
    WEIGHTS_NAME,
    fill,
    make_model,
    read_weights,
    sha256_of,
    timm_arguments,
    verified_weights,
    write_weights,
)
from dbscale.training.tasks import join_head

HEAD_NAME = "head.safetensors"
BACKBONE = "backbone."
HUB_TAGS = {"segmentation": "image-segmentation", "detection": "object-detection"}


class Head(Strict):
    """`head.json`: what the tensors of `head.safetensors` are."""

    task: DenseTask
    num_classes: int
    label_names: tuple[str, ...] | None = None
    """By label, where they are known."""
    image_size: int
    """Side of the images it was trained on, px."""


def export_cell(store: Store, key: str, target: Path, data_dir: Path | None = None) -> Path:
    """Write `model.safetensors`, `config.json`, `recipe.json`, `row.json` and the card `README.md` into `target`; for a
    dense cell the backbone alone is in the first two, and `head.safetensors` and `head.json` hold the rest.

    The names of the classes come from the packed dataset in `data_dir`, where that is the one the cell was trained on.

    Raises TrainingError when the cell is not done or its weights are damaged, FileError when `target` cannot be
    written.
    """
    spec, row = store.read_spec(key), store.read_row(key)
    if row is None:
        raise TrainingError(f"cell {key} is {store.state(key)}; only finished cells are exported")
    weights = verified_weights(store, row)
    target.mkdir(parents=True, exist_ok=True)
    names = class_names(spec, data_dir)
    if spec.recipe.task is None:
        with weights.open("rb") as source, atomic_open(target / WEIGHTS_NAME, "wb") as copy:
            shutil.copyfileobj(source, copy)
    else:
        _write_parts(spec.recipe, weights, target)
        head = Head(task=spec.recipe.task, num_classes=row.num_classes, label_names=names,
                    image_size=spec.recipe.data.image_size)  # fmt: skip
        write_model(target / "head.json", head)
    _write_config(spec, row, names, target / "config.json")
    write_json(target / "recipe.json", spec.model_dump(mode="json"))
    write_json(target / "row.json", row.model_dump(mode="json"))
    with atomic_open(target / "README.md", "w") as file:
        file.write(model_card(spec, row, names) if spec.recipe.task is None else dense_card(spec, row, names, target))
    return target


def load_export(folder: str | Path) -> DenseModel:
    """The segmenter or detector that `export_cell` wrote, ready to judge: `predict` takes images [B, 3, S, S].

    Raises TrainingError where the folder is no such export or its weights do not fit, FileError where `head.json` is
    damaged.
    """
    folder = Path(folder)
    if not (folder / "head.json").is_file():
        raise TrainingError(f"{folder} has no head.json, so it is no export of a segmenter or a detector; a classifier is "
                            f'loaded by timm.create_model("local-dir:{folder}", pretrained=True)')  # fmt: skip
    head = read_model(Head, folder / "head.json")
    # timm does not load the weights here: `join_head` prunes the backbone, and a misfit is told in our words.
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=False)
    network = join_head(backbone, head.task, head.num_classes)
    kept = network.backbone.state_dict()
    state = {f"{BACKBONE}{name}": value for name, value in read_weights(folder / WEIGHTS_NAME).items() if name in kept}
    fill(network, folder / HEAD_NAME, state | read_weights(folder / HEAD_NAME))
    return network.eval()


def _write_parts(recipe: Recipe, weights: Path, target: Path) -> None:
    """The weights of a dense cell as timm's backbone and as what is not timm's."""
    state = read_weights(weights)
    backbone = {name.removeprefix(BACKBONE): value for name, value in state.items() if name.startswith(BACKBONE)}
    write_weights(target / HEAD_NAME, {name: value for name, value in state.items() if not name.startswith(BACKBONE)})
    # timm has layers behind the feature maps, such as a norm after pooling, that no dense task passes through: they stand
    # in the file as they are initialised, so that timm finds every name it asks for.
    whole: dict[str, Tensor] = make_model(recipe.model, num_classes=0, image_size=recipe.data.image_size).state_dict()
    write_weights(target / WEIGHTS_NAME, whole | backbone)


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
    dense = spec.recipe.task is not None
    model = make_model(spec.recipe.model, num_classes=0 if dense else row.num_classes, image_size=size)
    preprocessing = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, size, size), "crop_pct": 1.0}
    labels = {"label_names": names} if names and not dense else None
    save_config_for_hf(model, str(path), labels, data_config=preprocessing)


def model_card(spec: CellSpec, row: Row, names: tuple[str, ...] | None = None) -> str:
    """Markdown: what it is, how good, how it was trained, how to load it."""
    recipe = spec.recipe
    name, arguments = timm_arguments(recipe.model, num_classes=row.num_classes, image_size=recipe.data.image_size)
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    top5 = "" if row.top5_error_rate is None else f", top-5 {row.top5_error_rate:.2%}"
    calibration = "" if row.calibration_error is None else f", expected calibration error {row.calibration_error:.4f}"
    errors = f"top-1 error {row.error_rate:.2%}{top5} on {row.num_test_samples:,} test images, loss {row.test_loss:.4f}"
    return f"""{_card_head(spec, row, "image-classification")}
{_card_facts(spec, row, errors + calibration, names, "`label_names` of `config.json`")}
- SHA-256 of `{WEIGHTS_NAME}`: `{row.weights_sha256}`
{_lineage(spec)}
The whole recipe is in `recipe.json`, all results in `row.json`.

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True)
# or, without config.json
model = timm.create_model("{name}", {keywords}, checkpoint_path="{WEIGHTS_NAME}")
```

{_PIXELS}
"""


def dense_card(spec: CellSpec, row: Row, names: tuple[str, ...] | None, folder: Path) -> str:
    """The same of a segmenter or a detector whose weights stand in `folder`."""
    recipe = spec.recipe
    kind, size = recipe.task_name, recipe.data.image_size
    says, found = _PREDICTS[kind]
    errors = (
        f"error {row.error_rate:.2%} on {row.num_test_samples:,} test images: {ERRORS[kind]}; loss {row.test_loss:.4f}"
    )
    digests = "".join(f"- SHA-256 of `{name}`: `{sha256_of(folder / name)}`\n" for name in (WEIGHTS_NAME, HEAD_NAME))
    return f"""{_card_head(spec, row, HUB_TAGS[kind])}
{_card_facts(spec, row, errors, names, "`label_names` of `head.json`")}
{digests}{_lineage(spec)}
The whole recipe is in `recipe.json`, all results in `row.json`. `{WEIGHTS_NAME}` and `config.json` are the backbone, plain
timm; `{HEAD_NAME}` and `head.json` are the head, which timm has no place for.

```python
from dbscale.training.export import load_export

model = load_export(".")
{found} = model.predict(images)  # images: float [B, 3, {size}, {size}]; {says}
```

The backbone alone, without dbscale:

```python
import timm

backbone = timm.create_model("local-dir:.", pretrained=True)
```

{_PIXELS} The whole image is stretched to {size} × {size} px.
"""


_PREDICTS = {
    "segmentation": ("a class for every pixel, [B, S, S]", "classes"),
    "detection": ("for each image its `boxes` (left, top, right, bottom in px), `scores` and `labels`", "finds"),
}
_PIXELS = f"Images: RGB on the 0…1 scale, normalised with mean {IMAGENET_MEAN} and standard deviation {IMAGENET_STD}."


def _card_head(spec: CellSpec, row: Row, tag: str) -> str:
    recipe = spec.recipe
    return f"""---
library_name: timm
tags: [{tag}, timm, dbscale]
---
# {row.key}

`{row.model}` with {row.num_params:,} parameters, {row.num_classes} classes, {recipe.data.image_size} px: stage
{row.stage}, {row.arm} arm, trained on {row.num_samples:,} samples of `{row.dataset}`, seed {row.seed}.
"""


def _card_facts(spec: CellSpec, row: Row, errors: str, names: tuple[str, ...] | None, place: str) -> str:
    classes = (
        f"by label in {place}" if names else "not known here: export again with --data, where the packed dataset is"
    )
    return f"""- {errors}
- {row.num_steps:,} steps, {row.samples_seen:,} samples seen, {row.train_flops:.3g} training FLOPs, \
{row.timing.device_time_s:,.0f} device-seconds on {row.timing.device}
- names of the classes: {classes}"""


def _lineage(spec: CellSpec) -> str:
    return "".join(f"- {role}: `{parent}`\n" for role, parent in _parents(spec))


def _parents(spec: CellSpec) -> list[tuple[str, str]]:
    roles = (("distilled from", spec.teacher), ("finetuned from", spec.init))
    return [(role, parent) for role, parent in roles if parent is not None]
