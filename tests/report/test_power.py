"""What `dbscale plan` says of a design, from rows at hand or from a default table."""

from __future__ import annotations

from dbscale.laws import NOISE_TABLES
from dbscale.report.power import ASSUMED_SLOPE, plan_power
from tests.report.test_findings import study

DESIGN = {"num_x": 5, "num_seeds": 4, "num_students": 2, "num_labels": 2, "finetunes": 1, "step_octaves": 1.0,
          "cost_upstream": 10.0, "cost_finetune": 1.0}  # fmt: skip


def test_a_plan_reads_the_noise_of_rows_at_hand():
    table = study(labels=(100, 1000))
    quiet = plan_power(table, **DESIGN)
    assert quiet[0].endswith("(noise of the rows at hand)")
    named = plan_power(None, "demo_digits", **DESIGN)
    assert named[0].endswith("(noise of the default table demo_digits)")
    usual = plan_power(table.where(seed=0), "no such table", **DESIGN)
    assert usual[0].endswith("(noise of the default table cifar10_fashion)")
    # Seeds of the study above differ by .002, those of the demo by .1.
    size = [float(lines[0].split("a ΔE of ")[1].split(" points")[0]) for lines in (quiet, named)]
    assert size[0] < 1 < size[1]


def test_a_plan_of_more_seeds_finds_less_and_one_seed_nothing():
    few, many = (plan_power(None, **DESIGN | {"num_seeds": seeds}) for seeds in (3, 12))
    size = [float(lines[0].split("a ΔE of ")[1].split(" points")[0]) for lines in (few, many)]
    assert size[1] < 0.6 * size[0]
    (nothing,) = plan_power(None, **DESIGN | {"num_seeds": 1})
    assert nothing.startswith("this design finds nothing: power of 1 seed")
    assert "cifar10_fashion" in NOISE_TABLES and f"by {100 * ASSUMED_SLOPE:.0f} points per octave" in few[1]
