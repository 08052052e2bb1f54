"""What goes to SLURM, against stand-ins for its commands: arrays, records, a second `make grid`; and the batch script as
a shell sees it: quoting, its log, what it requeues, what its job may import."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dbscale.launch.cli import main
from dbscale.launch.slurm import queue
from dbscale.launch.slurm.queue import make_uid, read_records, write_record


def calls(slurm: Path, name: str) -> list[str]:
    lines = (slurm / "calls").read_text().splitlines() if (slurm / "calls").exists() else []
    return [line for line in lines if line.startswith(f"{name} ")]


def scripts(slurm: Path) -> list[str]:
    return [path.read_text() for path in sorted(slurm.glob("script-*"))]


def records(workplace: Any) -> list[dict[str, Any]]:
    paths = sorted(workplace.store.grid_dir("tiny").glob("submits/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_one_array_a_wave_and_a_reducer_after_all(submit: Any, slurm: Path, workplace: Any) -> None:
    code, out = submit()[:2]
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("submitted")] == [
        "submitted 4 bundles of wave 1 as job 101", "submitted 2 bundles of wave 2 as job 102, after 101",
        "submitted the reducer as job 103, after 101, 102",
    ]  # fmt: skip
    first, second, reducer = scripts(slurm)
    assert "#SBATCH --array=0-3%4" in first
    assert "--dependency" not in first
    assert "#SBATCH --array=0-1%2" in second
    assert "#SBATCH --dependency=afterany:101\n" in second
    assert "#SBATCH --dependency=afterany:101:102\n" in reducer
    assert "--gpus-per-node" not in reducer
    for line in ("--partition=gpu", "--gpus-per-node=1", "--mem=4096M", "--requeue", "--signal=USR2@120"):
        assert f"#SBATCH {line}\n" in first
    assert "module load cuda\n" in first
    assert "export PYTHONSAFEPATH=1\n" in first
    made = records(workplace)
    assert [record["job"] for record in made] == [101, 102, 103]
    keys = [key for record in made for keys in record["elements"] for key in keys]
    assert len(keys) == len(set(keys)) == 18


def test_a_job_is_a_command_line_of_ids_and_paths_in_a_private_folder(submit: Any, slurm: Path, workplace: Any) -> None:
    """SLURM keeps it with its copy of the script: nothing that is executed lies in the store."""
    submit("--set", "cluster.slurm.staging=$TMPDIR", "--set", "cluster.resources.threads=2")
    commands = [
        shlex.split(next(line for line in text.splitlines() if line.startswith("srun "))) for text in scripts(slurm)
    ]
    for command, record in zip(commands, records(workplace), strict=True):
        module = "reducer" if record["kind"] == "reduce" else "job"
        assert command[-5:-1] == [sys.executable, "-u", "-m", f"dbscale.launch.slurm.{module}"]
        work = json.loads(command[-1])
        assert (work["grid"], work["uid"]) == ("tiny", record["uid"])
        assert (work["store"], work["data"]) == (str(workplace.store.root), str(workplace.folder / "data"))
        folder = workplace.store.grid_dir("tiny") / "jobs" / record["uid"]
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.suffix for path in folder.iterdir()} == {".sh"}
    elements, reducer = json.loads(commands[0][-1]), json.loads(commands[-1][-1])
    assert (elements["staging"], elements["requeue_limit"], elements["resources"]["threads"]) == ("$TMPDIR", 5, 2)
    assert (reducer["hand_ins"], reducer["cluster"]["slurm"]["setup"]) == (0, ["module load cuda"])


def test_a_dry_run_prints_the_scripts_that_would_be_submitted(submit: Any, slurm: Path, workplace: Any) -> None:
    _, shown, _ = submit("--dry-run")
    assert not calls(slurm, "sbatch")
    assert not workplace.store.root.exists()
    submit()

    def plain(text: str) -> str:
        text = re.sub(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{4}|UID", "UID", text)
        return re.sub(r"afterany:[\d:]+", "afterany:N", text)

    for script in scripts(slurm):
        assert plain(script) in plain(shown)


def test_a_dry_run_knows_the_clusters_limit_and_what_waits_there(submit: Any, slurm: Path) -> None:
    (slurm / "max_array").write_text("3")
    assert "--array=0-2%3" in submit("--dry-run")[1]
    submit()
    (slurm / "queue").write_text("".join(f"{job}|{i}|PENDING\n" for job in (101, 103) for i in range(3)))
    called = len(calls(slurm, "sbatch"))
    _, shown, _ = submit("--dry-run")
    assert shown.count("#!/bin/bash") == 2  # the one that job 102 no longer holds, and a reducer
    assert "--array" not in shown
    assert len(calls(slurm, "sbatch")) == called
    (slurm / "broken").touch()
    code, shown, said = submit("--dry-run")
    assert code == 0
    assert "shown is what an idle cluster" in said
    assert "--array=0-3%4" in shown


@pytest.mark.parametrize("reducer", ["none", "of an earlier submit"])
def test_a_reducer_that_a_dying_login_node_did_not_submit_is_made_up_for(
    submit: Any, slurm: Path, workplace: Any, reducer: str
) -> None:
    submit()
    last = workplace.store.grid_dir("tiny") / "submits" / f"{records(workplace)[-1]['uid']}.json"
    if reducer == "none":
        last.unlink()
    else:
        last.write_text(json.dumps({**json.loads(last.read_text()), "after": [101]}))
    waiting = [f"101|{i}|PENDING" for i in range(4)] + [f"102|{i}|PENDING" for i in range(2)]
    (slurm / "queue").write_text("\n".join([*waiting, "103|N/A|PENDING"]) + "\n")
    assert submit()[0] == 0
    made = records(workplace)[-1]
    assert (made["kind"], made["after"], made["job"]) == ("reduce", [101, 102], 104)
    (slurm / "queue").write_text("\n".join([*waiting, "104|N/A|PENDING"]) + "\n")
    assert "nothing to submit" in submit()[1]


def test_arrays_are_cut_at_the_clusters_limit(submit: Any, slurm: Path) -> None:
    (slurm / "max_array").write_text("3")
    assert submit()[0] == 0
    sizes = [found[1] for text in scripts(slurm) if (found := re.search(r"--array=0-(\d+)%", text))]
    assert sizes == ["2", "1"]  # 3 of wave 1; its fourth stands alone, no array; 2 of wave 2
    assert len(scripts(slurm)) == 4


def test_a_cluster_without_arrays_gets_a_job_a_bundle(submit: Any, slurm: Path, workplace: Any) -> None:
    """Each with a record, so that it is fenced, waited for and cancelled like an element."""
    assert submit("--set", "cluster.slurm.array=false")[0] == 0
    made, texts = records(workplace), scripts(slurm)
    assert [len(record["elements"]) for record in made] == [1] * 6 + [0]
    assert not any("--array" in text for text in texts)
    students = [record for record in made if record["wave"] == 2]
    assert all(len(record["after"]) == 1 for record in students), "its own teacher, and no other bundle"
    assert made[-1]["after"] == [101, 102, 103, 104, 105, 106]
    (slurm / "queue").write_text("101|N/A|RUNNING\n102|N/A|PENDING\n")
    submit(command="cancel")
    assert calls(slurm, "scancel") == ["scancel 101 102"]


def test_an_answer_of_sbatch_without_a_number_takes_the_submission_back(
    submit: Any, slurm: Path, workplace: Any
) -> None:
    (slurm / "sbatch-says").write_text("Welcome to the cluster!\n")
    code, _, said = submit()
    assert code == 1
    assert (
        "sbatch refused 4 jobs for partition gpu" in said
        and "Welcome to the cluster!" in said
        and "Traceback" not in said
    )
    (cancelled,) = calls(slurm, "scancel")
    assert cancelled.startswith("scancel --name=dbscale-tiny-") and records(workplace) == []


def test_a_cluster_may_want_smaller_arrays(submit: Any, slurm: Path) -> None:
    assert submit("--set", "cluster.slurm.array=2")[0] == 0
    sizes = [found[1] for text in scripts(slurm) if (found := re.search(r"--array=0-(\d+)%", text))]
    assert sizes == ["1", "1", "1"]


HOUSE_RULES = {
    "gres=gpu:a100:1": ("--gres=gpu:a100:1", "--gpus-per-node"),
    "gpus_per_node=a100:1": ("--gpus-per-node=a100:1", "--gres"),
    "licenses=matlab@srv:2": ("--licenses=matlab@srv:2", None),
    "sbatch={mail-type: END, nice: 5, comment: two words}": ("--comment='two words'", None),
    "sbatch={exclusive: true}": ("--exclusive", "--exclusive="),
    "sbatch={wckey: project}": ("--wckey=project", None),
}


@pytest.mark.parametrize("rule", HOUSE_RULES)
def test_house_rules_reach_sbatch(submit: Any, slurm: Path, rule: str) -> None:
    wanted, not_wanted = HOUSE_RULES[rule]
    assert submit("--set", f"cluster.slurm.{rule}")[0] == 0
    text = scripts(slurm)[0]
    assert f"#SBATCH {wanted}\n" in text
    assert not_wanted is None or f"#SBATCH {not_wanted}" not in text
    for owned in ("--requeue", "--output=/dev/null", "--signal=USR2@120", "--open-mode=append"):
        assert text.count(f"#SBATCH {owned}\n") == 1


def test_memory_by_the_cpu_alone(submit: Any, slurm: Path) -> None:
    assert submit("--set", "cluster.slurm.memory_gb=null", "--set", "cluster.slurm.memory_per_cpu_gb=1.5")[0] == 0
    first, *_, reducer = scripts(slurm)
    assert "#SBATCH --mem-per-cpu=1536M\n" in first and "#SBATCH --mem-per-cpu=4096M\n" in reducer
    assert not any("--mem=" in text for text in (first, reducer))


def test_names_of_options_are_those_of_the_clusters_sbatch(submit: Any, slurm: Path, workplace: Any) -> None:
    """Plugins of a cluster add some; where sbatch does not say, SLURM's own are known. Nothing is written before."""
    (slurm / "help").write_text("  -A, --account=name\n      --mail-type=type\n      --container-image=PATH\n")
    image = "cluster.slurm.sbatch={container-image: nvcr.io#nvidia/pytorch}"
    assert submit("--set", image, "--dry-run")[0] == 0
    for name in ("mail-tpye", "nice"):
        code, _, said = submit("--set", f"cluster.slurm.sbatch={{{name}: 5}}")
        assert code == 1
        assert f"slurm.sbatch.{name}: sbatch on this machine has no option --{name}; " in said
    assert "did you mean 'mail-type'? known: container-image, mail-type" in submit(
        "--set", "cluster.slurm.sbatch={mail-tpye: END}", "--dry-run"
    )[2]  # fmt: skip
    assert not workplace.store.root.exists() and not calls(slurm, "sbatch /")
    (slurm / "broken").touch()
    assert submit("--set", "cluster.slurm.sbatch={nice: 5}", "--dry-run")[0] == 0
    assert "sbatch has no option --container-image" in submit("--set", image, "--dry-run")[2]


def test_other_shapes_are_other_arrays(submit: Any, slurm: Path) -> None:
    change = "cluster.stages={finetune: {slurm: {gpus_per_node: 0, partition: cpu}}}"
    assert submit("--set", change)[0] == 0
    partitions = [re.search(r"--partition=(\w+)", text)[1] for text in scripts(slurm)]  # type: ignore[index]
    assert partitions == ["gpu", "cpu", "gpu", "cpu", "gpu"]
    waits = [re.search(r"afterany:([\d:]+)", text) for text in scripts(slurm)]
    assert [found and found[1] for found in waits] == [None, "101", "101", "103", "101:102:103:104"]


def test_what_waits_or_runs_is_not_submitted_again(submit: Any, slurm: Path, workplace: Any) -> None:
    submit()
    waiting = [f"101|{i}|PENDING" for i in range(4)] + ["102|0|PENDING", "103|N/A|PENDING"]
    (slurm / "queue").write_text("\n".join(waiting) + "\n999|N/A|RUNNING\n102|1|CANCELLED\n")
    code, out, _ = submit()
    assert code == 0
    assert len(calls(slurm, "sbatch")) == 3 + 2  # the cancelled element of 102, and a new reducer
    again = records(workplace)[3]
    assert again["elements"] == [records(workplace)[1]["elements"][1]]
    assert again["after"] == [101]  # where its teacher waits
    assert calls(slurm, "scancel") == ["scancel 103"]  # the reducer that would come too early
    (slurm / "queue").write_text("\n".join(waiting) + "\n104|N/A|RUNNING\n105|N/A|PENDING\n")
    _, out, _ = submit()
    assert "nothing to submit: 18 cells wait or run" in out
    assert len(calls(slurm, "sbatch")) == 5


def test_what_is_ending_is_waited_for_because_it_may_be_cancelled(
    submit: Any, slurm: Path, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit()
    (slurm / "queue").write_text("".join(f"101|{i}|COMPLETING\n" for i in range(4)))

    def sleep(seconds: float) -> None:
        (slurm / "queue").write_text("101|0|PENDING\n")

    monkeypatch.setattr("dbscale.launch.slurm.submit.time.sleep", sleep)
    _, out, _ = submit()
    assert "waiting for jobs that are ending" in out
    again = records(workplace)[3]
    assert again["elements"] == records(workplace)[0]["elements"][1:]


def test_what_never_ends_is_taken_for_running_and_said(
    submit: Any, slurm: Path, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit()
    (slurm / "queue").write_text("101|0|COMPLETING\n")
    monkeypatch.setattr("dbscale.launch.slurm.submit.ENDING_WAIT_S", -1.0)
    cells = len(records(workplace)[0]["elements"][0])
    _, out, _ = submit()
    assert f"{cells} cells are taken for running, though their jobs are still ending" in out
    assert records(workplace)[0]["elements"][0] not in [
        each for made in records(workplace)[3:] for each in made["elements"]
    ]


def test_a_cell_that_another_grid_has_queued_is_waited_for_and_not_submitted(
    submit: Any, slurm: Path, workplace: Any
) -> None:
    """Two grids of one store share their baselines."""
    submit()
    (slurm / "queue").write_text("".join(f"101|{i}|PENDING\n" for i in range(4)) + "103|N/A|PENDING\n")
    other = ("--set", "name=other")
    assert submit(*other)[0] == 0
    paths = sorted(workplace.store.grid_dir("other").glob("submits/*.json"))
    made = [json.loads(path.read_text()) for path in paths]
    assert [(record["kind"], record["after"]) for record in made] == [("bundles", [101]), ("reduce", [101, 104])]
    assert made[0]["elements"] == records(workplace)[1]["elements"]
    _, out, _ = submit(*other, command="status")
    assert re.search(r"finetune +8 ", out)  # of the first wave, queued by the other grid
    submit(*other, command="cancel")
    assert not calls(slurm, "scancel")  # none of its own is in the queue


def test_cells_that_are_done_are_not_submitted(submit: Any, slurm: Path, workplace: Any) -> None:
    workplace.behave(fail=["distill"])
    main(["submit", *workplace.where, "--cluster", "inline"])
    workplace.behave()
    submit()
    keys = [key for record in records(workplace) for keys in record["elements"] for key in keys]
    assert len(keys) == 6


@pytest.mark.parametrize("job", [101, 102, 103])
def test_a_login_node_that_dies_while_submitting_leaves_no_orphans(
    submit: Any, slurm: Path, workplace: Any, job: int
) -> None:
    (slurm / f"die-after-{job}").touch()
    words = ["submit", "--cluster", str(workplace.folder / "cluster.yaml")]
    environment = {**workplace.environment, "FAKE_SLURM": str(slurm), "PATH": os.environ["PATH"]}
    process = replace(workplace, environment=environment).start(*words)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    cut_off = next(record for record in records(workplace) if record["job"] is None)
    (slurm / "queue").write_text("".join(f"{each}|0|RUNNING\n" for each in range(101, job)))
    assert submit()[0] == 0
    assert calls(slurm, "scancel")[0] == f"scancel --name=dbscale-tiny-{cut_off['uid']}"
    assert all(record["job"] is not None for record in records(workplace))
    cells = [key for record in records(workplace) for keys in record["elements"][:1] for key in keys]
    assert len(cells) == len(set(cells))


def test_cancel_touches_only_this_grids_jobs(submit: Any, slurm: Path) -> None:
    submit()
    (slurm / "queue").write_text("101|0|RUNNING\n103|N/A|PENDING\n7|N/A|RUNNING\n")
    code, out, _ = submit(command="cancel")
    assert code == 0
    assert calls(slurm, "scancel") == ["scancel 101 103"]
    assert "cancelled job 101" in out


def test_cancel_finds_what_a_reducer_hands_in_meanwhile(
    submit: Any, slurm: Path, workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit()
    (slurm / "queue").write_text("103|N/A|RUNNING\n")
    (first, *_), cancel = read_records(workplace.store, "tiny"), queue.cancel_jobs

    def cancel_and_submit(jobs: Any) -> None:
        cancel(jobs)
        write_record(workplace.store, first.model_copy(update={"uid": make_uid(), "job": 104}))
        (slurm / "queue").write_text("103|N/A|COMPLETING\n104|0|PENDING\n")

    monkeypatch.setattr(queue, "cancel_jobs", cancel_and_submit)
    _, out, _ = submit(command="cancel")
    assert calls(slurm, "scancel") == ["scancel 103", "scancel 104"]
    assert out == "cancelled job 103\ncancelled job 104\n"


def test_status_counts_what_waits_and_works_while_slurm_is_silent(submit: Any, slurm: Path, workplace: Any) -> None:
    submit()
    (slurm / "queue").write_text("".join(f"101|{i}|PENDING\n" for i in range(3)))
    (slurm / "ended").write_text("101_3|FAILED|1:0\n102_0|NODE_FAIL|0:0\n102_[1]|CANCELLED by 0|0:0\n")
    _, out, _ = submit(command="status")
    assert "0 jobs run and 3 wait in SLURM" in out
    assert re.search(r"wave +stage +queued +new", out)
    assert "SLURM says FAILED, exit code 1:0" in out
    assert "SLURM says NODE_FAIL" in out
    assert len(calls(slurm, "squeue")) == 1 + 1
    assert len(calls(slurm, "sacct")) == 1
    (slurm / "no-accounts").touch()
    (slurm / "queue").write_text("101|2|PENDING|Priority\n101|3|OUT_OF_MEMORY|OutOfMemory\n")
    _, out, _ = submit(command="status")
    assert "SLURM says OUT_OF_MEMORY, OutOfMemory" in out and "SLURM says nothing about it any more" in out
    (slurm / "broken").touch()
    code, out, _ = submit(command="status")
    assert code == 0
    assert "Unable to contact slurm controller; what follows is from the store alone" in out
    assert submit()[0] == 1


@pytest.mark.parametrize("bad", ["$(touch x)", "a\nb", "`id`", "it's", 'say "x"', "100%", "a\\b", "a;b"])
def test_paths_that_a_shell_or_slurm_could_misread_are_refused(
    submit: Any, slurm: Path, workplace: Any, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = str(workplace.folder / "cluster.yaml")
    code = main(["submit", *workplace.where, "--cluster", cluster, "--store", str(workplace.folder / bad)])
    assert code == 1
    assert "could misread" in capsys.readouterr().err
    assert not calls(slurm, "sbatch")


def test_a_space_in_a_path_is_one_word_to_the_shell(submit: Any, slurm: Path, workplace: Any) -> None:
    store = workplace.folder / "my store"
    assert submit("--store", str(store))[0] == 0
    lines = (slurm / "script-101").read_text().splitlines()
    command = shlex.split(next(line for line in lines if line.startswith("srun ")))
    assert json.loads(command[-1])["store"] == str(store)
    assert run_script(slurm, "echo said >&2").returncode == 0
    (log,) = store.glob("grids/tiny/jobs/*/55_0_log.out")
    assert log.read_text() == "said\n"


def run_script(slurm: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The first script, with `body` in place of srun and of the modules it loads, as job 55."""
    shadow = slurm / "run-101"
    shadow.write_text((slurm / "script-101").read_text().replace("module load cuda", f"srun() {{ {body}; }}"))
    return subprocess.run(
        ["bash", str(shadow)], env={**os.environ, "SLURM_JOB_ID": "55", **environment}, cwd=slurm, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def log_folder(slurm: Path) -> Path:
    found = re.search(r"^log=(\S+)/", (slurm / "script-101").read_text(), re.MULTILINE)
    assert found is not None
    return Path(found[1])


@pytest.mark.parametrize(
    ("start", "restarts", "requeued"),
    [("0         RUNNING             None      ", "0", 1), ("5 RUNNING None", "5", 0), ("0 CANCELLED None", "0", 0)],
)  # fmt: skip
@pytest.mark.parametrize("body", ["return 9", "exit 9", "set -e; (exit 9)", "kill -9 $BASHPID"])
def test_the_script_keeps_the_exit_code_and_requeues_while_the_limit_allows_and_this_start_still_runs(
    submit: Any, slurm: Path, body: str, start: str, restarts: str, requeued: int
) -> None:
    submit()
    (slurm / "queue").write_text(start)
    (slurm / "calls").unlink()
    done = run_script(slurm, body, SLURM_RESTART_COUNT=restarts)
    if "kill" in body:
        assert done.returncode == -signal.SIGKILL  # of the shell itself: left to rank 0
    else:
        assert done.returncode == 9
        assert len(calls(slurm, "scontrol")) == requeued


def test_a_log_that_cannot_be_opened_is_waited_for(submit: Any, slurm: Path) -> None:
    """SLURM itself would give the job up for good, had it been told to open the log."""
    submit()
    script, folder = slurm / "script-101", log_folder(slurm)
    assert "#SBATCH --output=/dev/null" in script.read_text()
    folder.rename(slurm / "away")
    script.write_text(script.read_text().replace("sleep 5", f"mv {slurm}/away {folder}"))
    assert run_script(slurm, "echo said").returncode == 0
    assert (folder / "55_0_log.out").read_text() == "said\n"


@pytest.mark.parametrize("path", ["/mine:", ":/mine", "/mine::.", "lib:/mine:."])
def test_a_job_imports_nothing_from_the_folder_it_was_submitted_from(submit: Any, slurm: Path, path: str) -> None:
    """`export PYTHONPATH=$MINE:$PYTHONPATH` with nothing in one of them names the working folder."""
    submit()
    (slurm / "show.py").write_text(f"import sys; print([p for p in sys.path if p in ('', '/mine') or '{slurm}' in p])")
    python = shlex.quote(sys.executable)
    assert run_script(slurm, f"cat show.py | {python}; {python} -m show", PYTHONPATH=path).returncode == 1
    assert (log_folder(slurm) / "55_0_log.out").read_text().startswith("['/mine']\n")
