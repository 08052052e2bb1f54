"""Faults of all kinds at random while a grid runs: at the end every row exists once, as if nothing had happened.

DBSCALE_CHAOS_SEED repeats the faults of another run; DBSCALE_CHAOS_FAULTS is how many are injected. When a run
fails, its store and SLURM's logs are kept in a folder that the output names, under DBSCALE_CHAOS_KEEP or the system's
temporary folder.
"""

from __future__ import annotations

import csv
import os
import random
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slurm
ONE_LINEAGE_EACH = ["--set", "cluster.target_min=0.01", "--set", "cluster.requeue_limit=200"]
STEPS = 60
LONG_STEPS = 1500
"""A cell of the long form trains for ten seconds or so, longer than a process takes to start."""
PATIENCE_S = 1200.0
"""For real training on a machine that others use as well."""


@pytest.fixture
def seed() -> int:
    found = int(os.environ.get("DBSCALE_CHAOS_SEED", secrets.randbelow(10**6)))
    print(f"\nchaos seed {found} (DBSCALE_CHAOS_SEED={found} repeats it)", flush=True)
    return found


def kept(seed: int) -> Path:
    """Where what a failed run leaves behind can be looked at afterwards."""
    return Path(os.environ.get("DBSCALE_CHAOS_KEEP", tempfile.gettempdir())) / f"dbscale-chaos-{seed}-{os.getpid()}"


def options(place: Any) -> list[str]:
    return ["--cluster", str(place.folder / "cluster.yaml"), *ONE_LINEAGE_EACH]


def check_whole(place: Any, num_cells: int) -> None:
    """Every row exists once, those of points in the reducer's table too, and nothing was left lying about."""
    assert len(place.done()) == num_cells
    name = yaml.safe_load((place.folder / "grid.yaml").read_text())["name"]
    with (place.store.grid_dir(name) / "rows.csv").open() as file:
        keys = Counter(row["key"] for row in csv.DictReader(file))
    assert keys == Counter(key for key in place.done() if key.startswith("finetune-"))
    assert not list(place.store.root.glob("cells/*/checkpoints/*"))


def test_a_few_faults_cost_no_step_and_no_row(
    place: Any, sandbox: Any, faults: ModuleType, seed: int, num_cells: int, all_ended: Callable[..., None]
) -> None:
    """The short form, with stand-ins for training; told of a number of faults, it takes kinds that last longer, too."""
    count = int(os.environ.get("DBSCALE_CHAOS_FAULTS", "0"))
    keep = faults.kept_when_it_fails(place.store.root, sandbox, kept(seed))
    with faults.disk_of_its_own(place.store.root) as own_disk, keep:
        place.behave(steps=STEPS, step_s=0.2, checkpoint=5)
        kinds = [each for each in faults.FAULTS if each not in faults.RARE]
        chaos = faults.Chaos(place, sandbox, random.Random(seed), options(place), own_disk)
        faults.submit(chaos)
        hand = faults.deal(chaos.die, count) if count else chaos.die.sample(kinds, 6)
        injected = faults.unleash(chaos, hand, (0.5, 2))
        chaos.say(f"{injected} faults")
        assert injected == 6 or count
        place.behave(steps=STEPS, step_s=0, checkpoint=5)
        all_ended()
        assert len(place.done()) == num_cells
        for steps in place.steps().values():
            assert sorted(set(steps)) == list(range(STEPS))
        assert (place.store.grid_dir("tiny") / "report.html").exists()


@pytest.mark.slow
def test_many_faults_change_no_bit_of_real_training(
    real: Callable[..., Any], results: Callable[[Any], dict[str, Any]], sandbox: Any, seed: int,
    faults: ModuleType, all_ended: Callable[..., None],
) -> None:  # fmt: skip
    """The long form: rounds of a real grid, until so many faults were injected; each equals the undisturbed one."""
    count, die = int(os.environ.get("DBSCALE_CHAOS_FAULTS", "20")), random.Random(seed)
    quiet = real("quiet", steps=LONG_STEPS, wide=True)
    assert quiet.run("submit", *options(quiet)).returncode == 0
    all_ended(PATIENCE_S)
    expected = results(quiet)
    print(f"undisturbed: {len(expected)} cells", flush=True)
    hand, injected, rounds = faults.deal(die, count), 0, 0
    while injected < count:
        rounds += 1
        place = real(f"round-{rounds}", steps=LONG_STEPS, wide=True)
        keep = faults.kept_when_it_fails(place.store.root, sandbox, kept(seed))
        with faults.disk_of_its_own(place.store.root) as own_disk, keep:
            chaos = faults.Chaos(place, sandbox, die, options(place), own_disk)
            chaos.say(f"round {rounds}")
            faults.submit(chaos)
            injected += faults.unleash(chaos, hand[injected:], (1, 6), first=injected + 1)
            all_ended(PATIENCE_S)
            found = results(place)
            attempts = sum(len(place.store.attempts(key)) for key in found)
            chaos.say(f"round {rounds}: {len(found)} cells done in {attempts} attempts; {injected} faults so far")
            assert found == expected
            check_whole(place, len(expected))
    print(f"{injected} faults in {rounds} rounds: all rows as in the undisturbed run", flush=True)
