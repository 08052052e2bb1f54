"""What YAML means here, and that every mistake is named with its place."""

from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pydantic import Field, PositiveInt

from dbscale.errors import ConfigError
from dbscale.strict import Strict, load_yaml, override, parse_yaml, validate
from dbscale.study.grid import Grid, load_grid


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("-2.5e+3", -2500.0), ("1_281_167", 1281167), ("0", 0),
        ("4:00:00", "4:00:00"), ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("null", None),
        ("~", None), ("012", 12.0), ("1.2.3", "1.2.3"), ("2026-11-22", "2026-11-22"), ("0x1f", "0x1f"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}", where="t")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_no_is_a_key() -> None:
    assert parse_yaml("no: 1\ny: 2", where="t") == {"no": 1, "y": 2}


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("a: 1\nb: {c: 1, c: 2}\n")
    with pytest.raises(ConfigError, match=r"grid\.yaml: line 2: key 'c' stands twice"):
        load_yaml(path)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "a: !!python/object/apply:os.system ['true']", "\t- x: 1"])
def test_what_is_no_mapping_of_plain_data_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"grid\.yaml"):
        load_yaml(path)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary"):
        load_yaml(tmp_path / "binary.yaml")


def test_override_sets_deep_values_and_leaves_the_original() -> None:
    data = {"a": {"b": [1, 2]}, "c": 3}
    changed = override(data, ["a.b.1=5", "d.e=1e-3", "c=[x, y]"])
    assert changed == {"a": {"b": [1, 5]}, "c": ["x", "y"], "d": {"e": 1e-3}}
    assert data == {"a": {"b": [1, 2]}, "c": 3}


@pytest.mark.parametrize("assignment", ["a.b.7=1", "a.b.x=1", "noequals", "=3"])
def test_override_refuses_what_leads_nowhere(assignment: str) -> None:
    with pytest.raises(ConfigError):
        override({"a": {"b": [1, 2]}}, [assignment])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefg")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "stands for more than 100,000 values"),
        ("a: &a [*a]", "stands for more than"),
        ("a: &a {b: *a}", "stands for more than"),
        ("a: " + "[" * 70 + "]" * 70, "60 levels"),
        ("a: " + "[" * 5000, "nested more than 60 deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 60 deep"),
        ("? [a, b]\n: c", "line 1: a list or mapping cannot be a key"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!timestamp 2020-99-99", "not valid YAML"),
        (f"a: {'9' * 5000}", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: *b", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_bomb_is_one_short_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 700


def test_as_many_values_and_levels_as_a_config_may_have() -> None:
    wide = f"a: [{', '.join('1' * 99_998)}]"
    assert len(parse_yaml(wide, where="x")["a"]) == 99_998
    with pytest.raises(ConfigError, match="100,000 values"):
        parse_yaml(wide.replace("[", "[1, "), where="x")
    assert parse_yaml("a: " + "[" * 58 + "1" + "]" * 58, where="x")
    with pytest.raises(ConfigError, match="60 levels"):
        parse_yaml("a: " + "[" * 59 + "1" + "]" * 59, where="x")
    shared = parse_yaml("a: &a [1, 2]\nb: *a", where="x")
    assert shared == {"a": [1, 2], "b": [1, 2]}, "aliases may be used"


def test_a_large_wrong_value_is_not_repeated_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Grid, {"name": ["x" * 10_000]}, where="grid.yaml")
    assert "name: " in str(caught.value) and len(str(caught.value)) < 1500


TOKENS = ["*a", "&a ", "[", "]", "{", "}", ":", "- ", "? ", "!!int ", "!!set ", "<<: ", "\x00", "\ufeff", "\u2028", "1e999",
          "0x1f", "~", "|\n", ">\n", "%YAML 9.9\n", "---\n", "'", '"', "\\ud800", "#", "@", "`", "\t"]  # fmt: skip


def test_grids_broken_by_chance_are_right_or_one_sentence(tmp_path: Path) -> None:
    """The demo's grid cut, doubled, filled and spiked with what has a meaning in YAML; `FUZZ` multiplies."""
    whole = (Path(__file__).parents[1] / "configs" / "grids" / "demo.yaml").read_text()
    path, outcomes, count = tmp_path / "grid.yaml", Counter(), 60 * int(os.environ.get("FUZZ", "1"))
    for number in range(count):
        rng = np.random.default_rng([7, number])
        text = whole
        for _ in range(rng.integers(1, 4)):
            start, size = int(rng.integers(len(text))), int(rng.integers(1, 40))
            piece = [text[start : start + size] * 2, "", TOKENS[rng.integers(len(TOKENS))], "9" * size][rng.integers(4)]
            text = text[:start] + piece + text[start + (size if rng.integers(2) else 0) :]
        path.write_text(text)
        try:
            load_grid(path)
            outcomes["right"] += 1
        except ConfigError as error:
            outcomes["refused"] += 1
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 4000, number
    assert outcomes.total() == count and len(outcomes) == 2


class Named(Strict):
    name: str = Field(pattern="^[A-Za-z0-9]*$")
    count: Literal["auto"] | PositiveInt = "auto"


def test_a_message_keeps_the_case_of_a_pattern_and_leaves_out_the_kinds_of_a_union() -> None:
    with pytest.raises(ConfigError, match=r"name: string should match pattern '\^\[A-Za-z0-9\]"):
        validate(Named, {"name": "a b"}, where="t")
    with pytest.raises(ConfigError) as caught:
        validate(Named, {"name": "a", "count": 0}, where="t")
    assert (
        str(caught.value) == "t: count: input should be 'auto', found 0; count: input should be greater than 0, found 0"
    )
    with pytest.raises(ConfigError, match="missing key 'name'"):
        validate(Named, {}, where="t")
