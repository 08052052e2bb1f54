"""What a user sees of mistakes: one line that names the fix, the right exit code, and nothing lost."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dbscale.errors import VERBOSITY, ConfigError, log_to_stderr
from dbscale.launch.cli import main, make_parser
from dbscale.launch.cluster import CONFIGS
from dbscale.launch.commands import cells
from dbscale.launch.commands.cells import as_launched
from dbscale.launch.commands.laws import mixed
from dbscale.launch.commands.plan import design_of
from dbscale.launch.commands.submit import execute
from dbscale.launch.study import DEFAULT_GRID, load_study, plan_study, study_of
from dbscale.report.reader import parse_sheet
from dbscale.study.resources import Resources
from dbscale.study.store import Store


@pytest.fixture
def dbscale(workplace: Any, fakes: ModuleType, capsys: pytest.CaptureFixture[str]) -> Any:
    """`dbscale` in this process: (exit code, stdout, stderr)."""

    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        code = main([command, *workplace.where, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["studens=[h1]"], "did you mean 'students'"),
        (["seeds=zero"], "seeds"),
        (["students=[h9]"], "unknown student 'h9'"),
        (["upstream.num_samples=[5000]"], "holds 1000 training samples"),
        (["cluster.wrokers=1"], "did you mean 'workers'"),
        (["nonsense"], "write path.to.key=value"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_1(dbscale: Any, overrides: list[str], named: str) -> None:
    options = [word for each in overrides for word in ("--set", each)]
    code, _, errors = dbscale("submit", "--cluster", "inline", *options)
    assert code == 1
    assert named in errors
    assert len(errors.strip().splitlines()) == 1


def test_duplicate_keys_and_bad_yaml_name_file_and_line(dbscale: Any, workplace: Any) -> None:
    path = workplace.folder / "grid.yaml"
    path.write_text(path.read_text() + "\nname: again\n")
    code, _, errors = dbscale("plan")
    assert code == 1
    assert "grid.yaml" in errors and "'name' stands twice" in errors
    path.write_text("name: [")
    assert dbscale("plan")[0] == 1


def test_a_missing_grid_and_an_unknown_cluster_are_named(workplace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--grid", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["plan", *workplace.where, "--cluster", "loca"]) == 1
    assert "did you mean 'local'" in capsys.readouterr().err


def test_wrong_usage_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["submti"], ["run"], []):
        with pytest.raises(SystemExit) as raised:
            main(words)
        assert raised.value.code == 2
    capsys.readouterr()


def test_a_store_that_cannot_be_written_is_named(dbscale: Any, workplace: Any) -> None:
    (workplace.folder / "out").write_text("a file where the store should be")
    code, _, errors = dbscale("submit", "--cluster", "inline")
    assert code == 1
    assert "cannot write to the store" in errors


@pytest.mark.parametrize("owner", ["a living pid", "another host and a start in the future"])
def test_done_is_said_of_rows_alone(
    dbscale: Any, workplace: Any, num_cells: int, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row was removed and its last attempt says running, of a process that will never finish it."""
    assert dbscale("submit", "--cluster", "inline")[0] == 0
    monkeypatch.setattr("dbscale.launch.commands.submit.WAIT_FOR_OTHERS_S", 0.0)
    store = workplace.store
    key = next(key for key in workplace.done() if key.startswith("finetune"))
    (store.cell_dir(key) / "row.json").unlink()
    claims = {
        "a living pid": {"pid": os.getppid(), "host": socket.gethostname(), "boot": None, "start": None},
        "another host and a start in the future": {"host": "elsewhere", "started": time.time() + 1e6},
    }
    claim = store.last_attempt(key).model_copy(update={"status": "running", "ended": None, **claims[owner]})
    store.write_attempt(key, claim)
    (store.cell_dir(key) / "progress.json").unlink()  # or its last heartbeat counts for two minutes more
    code, out, errors = dbscale("submit", "--cluster", "inline")
    if owner == "a living pid":  # of an older version's attempt: nothing tells it from the run's own
        assert code == 3
        assert f"running: {key}: held by pid {os.getppid()}" in errors and "1 of 18 cells did not finish" in errors
        assert "all" not in out.replace("nothing to start", "")
        assert len(workplace.done()) == num_cells - 1
    else:
        assert code == 0
        assert "all 18 cells are done" in out
        assert len(workplace.done()) == num_cells


def test_submit_says_how_long_the_report_took(dbscale: Any) -> None:
    _, out, _ = dbscale("submit", "--cluster", "inline")
    took = re.search(r"^reduced and reported in ([\d.]+) (ms|s): \S+report.html$", out, re.MULTILINE)
    assert took and float(took[1]) < 60


def test_two_drivers_within_one_second_have_folders_of_their_own(dbscale: Any, workplace: Any) -> None:
    """Waves of a hunt that have nothing left to run follow each other as fast."""
    assert dbscale("submit", "--cluster", "inline", "--no-report")[0] == 0
    study = load_study(
        grid=workplace.folder / "grid.yaml", cluster="local", store=workplace.store.root, data=workplace.folder / "data"
    )
    plan, cost = plan_study(study)
    for _ in range(2):
        assert not execute(study, plan, cost).requested
    folders = list((workplace.store.grid_dir("tiny") / "jobs").iterdir())
    assert len(folders) == 2 and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)


def test_a_log_outside_the_store_is_not_shown(
    dbscale: Any, workplace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dbscale("submit", "--cluster", "inline")[0] == 0
    store, key = workplace.store, workplace.done()[0]
    secret, inside = tmp_path / "secret", store.grid_dir("tiny") / "jobs" / "1_0_log.out"
    secret.write_text("secret")
    inside.parent.mkdir()
    inside.write_text("=== start")
    for log, code in ((secret, 1), (inside, 0), (inside.parent / "link", 1)):
        if log.name == "link":
            log.symlink_to(secret)
        store.write_attempt(key, store.last_attempt(key).model_copy(update={"log": str(log)}))
        assert main(["logs", key, "--store", str(store.root)]) == code
        out, err = capsys.readouterr()
        assert "secret" not in out
        assert ("=== start" in out) is (code == 0)
        assert ("which is not in the store" in err) is (code == 1)


def test_plan_lists_what_a_grid_needs_and_writes_nothing(dbscale: Any, workplace: Any) -> None:
    code, out, _ = dbscale("plan", "--cells")
    assert code == 0
    assert "12 points measured by 18 cells" in out
    assert "not packed yet: up, down" in out
    assert not workplace.store.root.exists()


def test_plan_says_what_the_main_contrast_can_tell_apart(workplace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the tiny grid: 16 and 32 images, one student with a teacher, 10 and 20 labels, here with three seeds."""
    words = ["plan", *workplace.where, "--set", "seeds=[0,1,2]"]
    plan, cost = plan_study(study_of(make_parser().parse_args(words)))
    design = design_of(plan, cost)
    assert design is not None
    upstream = [cell for cell in plan.cells if cell.recipe.stage != "finetune" and cell.recipe.model.heads == 2]
    finetunes = [cell for cell in plan.cells if cell.recipe.stage == "finetune" and cell.recipe.model.heads == 2]
    assert len(upstream) == 12 and len(finetunes) == 24
    assert design == {
        "num_x": 2, "num_seeds": 3, "num_students": 1, "num_labels": 2, "finetunes": 1, "step_octaves": 1.0,
        "cost_upstream": pytest.approx(sum(map(cost.seconds, upstream)) / 12),
        "cost_finetune": pytest.approx(sum(map(cost.seconds, finetunes)) / 12),
    }  # fmt: skip
    assert main(words) == 0
    assert "this design finds a ΔE of" in capsys.readouterr().out
    assert main([*words, "--set", "noise=cifar10_mnist"]) == 0
    assert "cifar10_mnist" in capsys.readouterr().out
    assert main(["plan", *workplace.where]) == 0
    assert "this design finds nothing: power of 1 seed(s)" in capsys.readouterr().out
    assert main([*words, "--set", "arms=[plain]"]) == 0
    assert "this design" not in capsys.readouterr().out


def test_a_run_in_this_process_fills_status_logs_and_run(dbscale: Any, workplace: Any, num_cells: int) -> None:
    workplace.behave(fail=["distill"])
    assert dbscale("submit", "--cluster", "inline")[0] == 3
    _, out, _ = dbscale("status")
    assert "12/18 cells done" in out
    assert out.count("loss is not finite") == 2
    key = next(path.name for path in workplace.store.root.glob("cells/distill-*"))
    assert main(["logs", key, "--store", str(workplace.store.root)]) == 1
    workplace.behave()
    assert main(["run", key.rpartition("-")[2], "--store", str(workplace.store.root)]) == 0
    assert main(["run", "no-such-cell", "--store", str(workplace.store.root)]) == 1
    assert dbscale("submit", "--cluster", "inline")[0] == 0
    assert len(workplace.done()) == num_cells


def test_a_cell_of_a_grid_runs_before_anything_was_submitted(
    dbscale: Any, workplace: Any, fakes: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def keys() -> list[str]:
        return re.findall(r"^(pretrain\S+)", dbscale("plan", "--cells")[1], re.MULTILINE)

    code, _, err = dbscale("run", keys()[0])
    assert code == 1 and "not packed yet: up, down; `dbscale shards pack --grid" in err
    for name in ("up", "down"):
        fakes.ensure_packed(name, {}, workplace.folder / "data")
    key = keys()[0]
    assert main(["run", key, *workplace.where[2:]]) == 1
    assert "it holds none" in capsys.readouterr().err
    assert dbscale("run", key)[0] == 0
    assert workplace.done() == [key]
    code, _, err = dbscale("run", key[:-1])
    assert code == 1 and f"no cell '{key[:-1]}' in grid tiny; the nearest: {key}" in err


def test_fit_finds_a_law_in_any_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("seen,loss,kind\n" + "\n".join(f"{x},{3 * x**-0.5},a" for x in (10, 100, 1000, 10000)))
    words = ["fit", str(table), "--law", "power", "--x", "seen", "--y", "loss"]
    assert main([*words, "--where", "kind=a", "--out", str(tmp_path / "fit.json")]) == 0
    params = json.loads((tmp_path / "fit.json").read_text())["params"]
    assert params["c"] == pytest.approx(-0.5, abs=1e-3)
    for wrong, named in (
        ([*words[:-1], "los"], "did you mean 'loss'"),
        ([*words, "--where", "knd=a"], "did you mean 'kind'"),
        ([*words[:-1], "kind"], "line 2: kind"),
        ([*words, "--bound", "c=0"], "write PARAM=LOW:HIGH"),
        ([*words, "--bound", "gamma=:1"], "no parameter 'gamma'"),
        (["fit", str(tmp_path / "x.csv"), *words[2:]], "no table"),
        (["fit", str(table), "--law", "pwer", "--x", "seen", "--y", "loss"], "power"),
    ):
        assert main(wrong) == 1
        assert named in capsys.readouterr().err


def test_fit_keeps_to_bounds_and_says_what_it_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    rows = [f"{x},{scale * x**-0.5},{arm}" for arm, scale in (("plain", 3), ("distilled", 2)) for x in (10, 100, 1000)]
    table.write_text("seen,loss,arm\n" + "\n".join(rows))
    words = ["fit", str(table), "--law", "power", "--x", "seen", "--y", "loss", "--out", str(tmp_path / "fit.json")]
    assert main([*words, "--bound", "c=-0.4:0"]) == 0
    assert json.loads((tmp_path / "fit.json").read_text())["params"]["c"] == pytest.approx(-0.4, abs=1e-6)
    assert "although arm differs (distilled, plain)" in capsys.readouterr().out
    assert main([*words, "--where", "arm=plain"]) == 0
    assert "although" not in capsys.readouterr().out


def test_words_that_sort_rows_into_groups_are_pointed_at() -> None:
    """Three rows a group at least; numbers, one word for all and columns that the law uses are no groups."""
    text = "x,half,third,one,size\n" + "".join(f"{k},{'ab'[k % 2]},{'abc'[k % 3]},w,{k % 2}\n" for k in range(6))
    sheet = parse_sheet(text.encode(), "t.csv")
    assert mixed(sheet, {"x"}) == {"half": ["a", "b"]}
    assert mixed(sheet, {"x", "half"}) == {}


@pytest.mark.parametrize(
    ("words", "grid"),
    [
        (["plan"], DEFAULT_GRID),
        (["plan", "demo"], DEFAULT_GRID),
        (["run", "a", "--grid", "paper/boundary_38m"], CONFIGS / "grids" / "paper" / "boundary_38m.yaml"),
        (["plan", "demp"], Path("demp")),
        (["plan", "a.yaml"], Path("a.yaml")),
        (["plan", "--grid", "a.yaml"], Path("a.yaml")),
        (["plan", "--grid", "a.yaml", "--store", "s"], Path("a.yaml")),
        (["submit", "--store", "s", "a.yaml"], Path("a.yaml")),
    ],
)
def test_a_grid_is_given_with_or_without_its_option(words: list[str], grid: Path) -> None:
    assert make_parser().parse_args(words).grid == grid


def test_a_tracker_is_named_by_an_option_of_its_own(workplace: Any) -> None:
    words = ["submit", *workplace.where, "--set", "cluster.resources.threads=2", "--tracker", "mlflow"]
    resources = study_of(make_parser().parse_args(words)).cluster.shape("pretrain").resources
    assert (resources.tracker, resources.threads) == ("mlflow", 2)
    assert study_of(make_parser().parse_args(words[:-2])).cluster.shape("pretrain").resources.tracker is None


def test_the_script_for_accelerate_runs_a_cell_as_the_command_does(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "launch" / "train.py"
    command = [sys.executable, str(script), "--cell", "pretrain-nobody-000000000000", "--store", "out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "pretrain-nobody-000000000000" in ended.stderr and "Traceback" not in ended.stderr


def test_shipped_deepspeed_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dbscale.launch.commands.cells import _deepspeed_config

    monkeypatch.chdir(tmp_path)
    assert _deepspeed_config("configs/deepspeed/zero1.json") == CONFIGS / "deepspeed" / "zero1.json"
    (tmp_path / "own.json").write_text("{}")
    assert _deepspeed_config("own.json") == tmp_path / "own.json"
    with pytest.raises(ConfigError, match=r"names nowhere\.json, which is neither here nor in"):
        _deepspeed_config("nowhere.json")


def test_accelerate_says_which_engine_and_how_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Resources(num_processes=4, zero_stage=3, threads=2)
    for name in ("MIXED_PRECISION", "USE_DEEPSPEED", "DEEPSPEED_ZERO_STAGE", "DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    assert as_launched(own) == own, "not under accelerate launch"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert as_launched(own) == Resources(num_processes=1, zero_stage=None, threads=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert as_launched(own) == Resources(num_processes=2, zero_stage=2, threads=2), "Accelerate's own default"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    assert as_launched(own).zero_stage == 0
    path = tmp_path / "own.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert as_launched(own).zero_stage == 1
    for content in ("{}", '{"zero_optimization": {}}', '{"zero_optimization": {"stage": "two"}}', "[]"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"own\.json names no zero_optimization\.stage"):
            as_launched(own)


def test_a_driver_is_asked_to_stop_where_it_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked, held = Store(tmp_path), [], [True]
    monkeypatch.setattr(cells.os, "kill", lambda *words: asked.append(words))
    monkeypatch.setattr(cells, "is_held", lambda root: held[0])

    def drive(grid: str, alive: bool | None) -> list[str]:
        process = SimpleNamespace(pid=7, host="node9", alive=alive)
        monkeypatch.setattr(cells, "holder", lambda root: SimpleNamespace(grid=grid, process=process))
        return cells.stop_driver(store, "tiny")

    assert drive("tiny", alive=True) == ["asked pid 7 to save and stop"] and asked == [(7, signal.SIGTERM)]
    for alive in (None, False):
        with pytest.raises(ConfigError, match="is driven by pid 7 on node9; cancel it there"):
            drive("tiny", alive)
    assert drive("other", alive=True) == []
    held[0] = False
    assert drive("tiny", alive=True) == [] and len(asked) == 1


def test_a_damaged_plan_is_written_anew_by_submit(dbscale: Any, workplace: Any) -> None:
    assert dbscale("submit", "--cluster", "inline")[0] == 0
    path = workplace.store.grid_dir("tiny") / "plan.json"
    whole = path.read_text()
    path.write_text("{")
    assert dbscale("submit", "--cluster", "inline")[0] == 0
    assert json.loads(path.read_text())["points"] == json.loads(whole)["points"]


@pytest.mark.parametrize("missing", ["--dp", "--df", "--params"])
def test_advice_needs_a_place_on_every_axis(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for option in ("--dp", "--df", "--params") if option != missing for word in (option, "1k")]
    with pytest.raises(SystemExit) as ended:
        main(["advise", "--table", "rows.csv", *words])
    assert ended.value.code == 2 and missing in capsys.readouterr().err


def test_a_dataset_without_test_split_is_refused_by_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "flowers").mkdir(parents=True)
    pixels = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixels, "PNG")
    with tarfile.open(tmp_path / "data" / "flowers" / "train-0.tar", "w") as tar:
        for number in range(6):
            for suffix, content in (("png", pixels.getvalue()), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "grid.yaml").write_text(
        f"extends: {DEFAULT_GRID}\nname: flowers\ndatasets:\n"
        "  flowers: {source: webdataset, path: flowers, train: 'train-*.tar', test: null}\n"
        "downstream: [{dataset: flowers, num_samples: [6]}]\n"
    )
    where = ["--grid", str(tmp_path / "grid.yaml"), "--data", str(tmp_path / "data")]
    assert main(["shards", "pack", "flowers", *where]) == 0
    assert main(["plan", *where, "--store", str(tmp_path / "out")]) == 1
    assert "dataset 'flowers' has no test split, on which errors are measured" in capsys.readouterr().err


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(list(words)) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_and_status_speak_json(workplace: Any, fakes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    plan = said(capsys, "plan", *workplace.where, "--json", "--cells")
    assert (plan["grid"], plan["num_cells"], plan["num_points"]) == ("tiny", 18, 12)
    assert plan["cells_by_stage"] == {"pretrain": {"new": 4}, "distill": {"new": 2}, "finetune": {"new": 12}}
    assert sum(wave["cells"] for wave in plan["waves"]) == len(plan["cells"]) == 18
    assert plan["predicted_s"] == pytest.approx(sum(cell["predicted_s"] for cell in plan["cells"]))
    assert plan["not_packed"] == ["up", "down"]
    assert "cells" not in said(capsys, "plan", *workplace.where, "--json")
    assert main(["submit", *workplace.where, "--cluster", "inline"]) == 0
    capsys.readouterr()
    status = said(capsys, "status", *workplace.where, "--json")
    assert (status["num_cells"], status["num_done"], status["running"]) == (18, 18, [])
    assert sum(each["count"] for each in status["counts"] if each["state"] == "done") == 18


def test_the_version_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    from dbscale import __version__

    with pytest.raises(SystemExit) as version:
        main(["--version"])
    assert (version.value.code, capsys.readouterr().out) == (0, f"dbscale {__version__}\n")
    with pytest.raises(SystemExit) as completion:
        main(["--completion", "bash"])
    script = capsys.readouterr().out
    assert completion.value.code == 0
    assert all(word in script for word in ("compare", "--min-effect", "verify"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(("words", "level"), [([], "WARNING"), (["-v"], "INFO"), (["-vv"], "DEBUG")])
def test_verbose_sets_what_is_logged(
    workplace: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], level: str
) -> None:
    monkeypatch.setenv(VERBOSITY, "0")
    assert main([*words, "plan", *workplace.where]) == 0
    assert logging.getLevelName(logging.getLogger("dbscale").level) == level
    logging.getLogger("dbscale").setLevel(logging.WARNING)
    log_to_stderr()  # as a job does that this command starts
    assert logging.getLevelName(logging.getLogger("dbscale").level) == level


def test_verbose_shows_what_the_rooms_do(workplace: Any) -> None:
    """Typed as a user does: the plugin's import is told with -v alone, and never among the results."""
    grid = workplace.folder / "grid.yaml"
    (workplace.folder / "own_part.py").write_text("X = 1\n")
    grid.write_text(f"plugins: [own_part.py]\n{grid.read_text()}")

    def told(*words: str) -> tuple[bool, bool]:
        command = [sys.executable, "-m", "dbscale.launch.cli", *words, "plan", *workplace.where]
        done = subprocess.run(command, env=workplace.environment, capture_output=True, text=True, check=True)
        return tuple("imported the plugin own_part" in text for text in (done.stderr, done.stdout))

    assert told("-v") == (True, False)
    assert told() == (False, False)


WITHOUT_TORCH = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "timm", "accelerate", "deepspeed", "submitit", "safetensors", "PIL"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from dbscale.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_tables_are_judged_without_torch_and_training_names_the_extra(workplace: Any) -> None:
    rows = Path(__file__).parents[2] / "docs" / "studies" / "cifar10" / "rows.csv"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_TORCH, *words]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(rows.parents[3])}, capture_output=True,
                              text=True, cwd=workplace.folder, check=False)  # fmt: skip

    fitted = run(
        "fit", str(rows), "--law", "power", "--x", "upstream_samples", "--y", "error_rate", "--where", "arm=plain"
    )
    assert fitted.returncode == 0, fitted.stderr
    refused = run("submit", *workplace.where, "--cluster", "inline")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("dbscale: this command needs ")
    assert "pip install 'dbscale[train]'" in refused.stderr
