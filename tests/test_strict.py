"""What YAML means here, and that every mistake is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbscale.errors import ConfigError
from dbscale.strict import load_yaml, override, parse_yaml


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
