"""Plugins: imported once, hashed, found by child processes, and refused with a reason when missing or changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dbscale import plugins
from dbscale.errors import ConfigError, LawError
from dbscale.laws import find_form
from dbscale.study.grid import load_grid
from dbscale.study.recipe import Budget, Data, DeiT, Optim, Recipe, Training
from dbscale.study.resources import Resources
from dbscale.training.losses import make_objective


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries, the path and the environment as they were."""
    for registry in (plugins.SOURCES, plugins.LOSSES, plugins.METRICS, plugins.LAWS, plugins.loaded):
        for name in list(registry):
            monkeypatch.delitem(registry, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(plugins.ENVIRONMENT, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    for registry in (plugins.SOURCES, plugins.LOSSES, plugins.METRICS, plugins.LAWS, plugins.loaded):
        registry.clear()


PART = """
from dbscale.plugins import register_loss

@register_loss("small")
def small(logits, target, images):
    return logits.square().mean()
"""


def test_a_file_is_imported_once_hashed_and_handed_to_children(tmp_path: Path) -> None:
    (tmp_path / "own_part.py").write_text(PART)
    first = plugins.load(["own_part.py"], tmp_path)
    assert (
        first == plugins.load(["own_part.py"], tmp_path) == {"own_part": plugins.source_hash(tmp_path / "own_part.py")}
    )
    assert set(plugins.LOSSES) == {"small"}
    assert os.environ[plugins.ENVIRONMENT] == str(tmp_path / "own_part.py")
    plugins.require(first)
    with pytest.raises(ConfigError, match="has changed since the cell was planned"):
        plugins.require({"own_part": "0" * 64})
    with pytest.raises(ConfigError, match="needs the plugin 'other_part', which this process was not given"):
        plugins.require({"other_part": "0" * 64})


def test_a_package_is_hashed_whole(tmp_path: Path) -> None:
    package = tmp_path / "lab_parts"
    package.mkdir()
    (package / "__init__.py").write_text("from lab_parts import inner\n")
    (package / "inner.py").write_text("X = 1\n")
    one = plugins.source_hash(package / "__init__.py")
    (package / "inner.py").write_text("X = 2\n")
    two = plugins.source_hash(package / "__init__.py")
    (package / "inner.py").rename(package / "other.py")
    assert len({one, two, plugins.source_hash(package / "__init__.py")}) == 3


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        ("missing.py", None, "no file .*missing.py"),
        ("json.py", PART, "'json' is a module already"),
        ("two words.py", PART, "is no module's name"),
        ("broken_part.py", "import nothing_of_this_name", "cannot be imported here .ModuleNotFoundError"),
        ("no_such_module_here", None, "install it on every machine"),
    ],
)
def test_what_cannot_be_imported_is_told(tmp_path: Path, place: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / place).write_text(content)
    with pytest.raises(ConfigError, match=message):
        plugins.load([place], tmp_path)


def test_two_parts_of_one_name_are_refused_and_unknown_ones_named() -> None:
    plugins.register_metric("brier")(len)
    with pytest.raises(ConfigError, match="two plugins register the metric 'brier'"):
        plugins.register_metric("brier")(len)
    with pytest.raises(ConfigError, match="unknown metric 'brie'; did you mean 'brier'"):
        plugins.part_of(plugins.METRICS, "metric", "brie")


def test_a_grid_names_plugins_and_cells_are_named_after_them(tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples" / "plugins"
    text = (examples / "stripes.yaml").read_text()
    grid = load_grid(examples / "stripes.yaml")
    assert grid.plugins == {"parts": plugins.source_hash(examples / "parts.py")}
    (tmp_path / "stripes.yaml").write_text(text.replace("plugins: [parts.py]\n", ""))
    assert load_grid(tmp_path / "stripes.yaml").plugins == {}
    assert find_form("two_thirds").param_names == ("E", "b")
    with pytest.raises(LawError, match="did you mean 'two_thirds'"):
        find_form("two_third")


def test_a_loss_term_is_added_with_its_weight() -> None:
    def objective(terms: dict[str, float] | None) -> Any:
        training = Training(
            budget=Budget(steps=1), optim=Optim(lr=1e-3), global_batch=2, precision="fp32", loss_terms=terms
        )
        data = Data(dataset="d", num_samples=2, image_size=8)
        recipe = Recipe(stage="pretrain", model=DeiT(heads=1), data=data, training=training, seed=0)
        return make_objective(recipe, Resources(), None, model)

    plugins.register_loss("squares")(lambda logits, target, images: logits.square().mean() + images.mean())
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images, target = torch.ones(2, 3, 2, 2), torch.tensor([0, 2])
    base = objective(None)(model, images, target)
    with_term = objective({"squares": 0.5})(model, images, target)
    expected = base.loss + 0.5 * (model(images).square().mean() + 1)
    assert torch.allclose(with_term.loss, expected)
    assert torch.equal(with_term.ce, base.ce)
    assert torch.equal(objective({"squares": 0.0})(model, images, target).loss, base.loss)
    with pytest.raises(ConfigError, match="unknown loss term 'square'; did you mean 'squares'"):
        objective({"square": 1.0})
