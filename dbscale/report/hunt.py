"""What a hunt is judged by, and how its path is told: the pairs of its targets, a figure, a section of the page.

Which runs are bought is decided in `dbscale.laws.design`; the log of the waves is `dbscale.study.hunt`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dbscale.laws import Pairs, make_pairs
from dbscale.report.pairing import pair_arms
from dbscale.report.table import Run, RunTable
from dbscale.study.grid import Hunt
from dbscale.study.hunt import Target

ARMS = ({"arm": "plain"}, {"arm": "distilled"})


def target_pairs(
    table: RunTable, hunt: Hunt, target: Target, wrong: Mapping[str, np.ndarray] | None = None
) -> Pairs | None:
    """Δ of one target along the hunt's axis, from the runs that are finished; None without a pair.

    Of plain against distilled along D_p these are the report's own pairs, so that both come to one verdict; `wrong` is
    then the noise of the test set, as `pair_arms` takes it.
    """
    runs = table.pretrained.where(dataset=target.dataset)
    if not len(runs):
        return None
    if (hunt.a, hunt.b) == ARMS and hunt.along == "upstream_samples":
        pairs, _ = pair_arms(runs, runs.settings[0], metric=hunt.metric, wrong=wrong)
    else:
        pairs = _pair_sides(runs, hunt)
    if pairs is None or target.size is None:
        return pairs
    kept = [k for k, labels in enumerate(pairs.labels.tolist()) if labels == target.size]
    kept = [k for k in kept if target.student is None or pairs.student.tolist()[k] == target.student]
    return pairs.rows(np.array(kept)) if kept else None


def _pair_sides(runs: RunTable, hunt: Hunt) -> Pairs | None:
    """Runs of the two sides that agree in everything else; strata are students and the size that is not the axis."""
    size = "upstream_samples" if hunt.along == "downstream_samples" else "downstream_samples"
    by_student = hunt.along != "num_params" and "student" not in hunt.a

    def key(run: Run) -> tuple:
        return getattr(run, hunt.along), run.seed, run.student if by_student else "", getattr(run, size), run.finetune

    one, other = (
        {key(run): value for run in runs.where(**side) if (value := getattr(run, hunt.metric)) is not None}
        for side in (hunt.a, hunt.b)
    )
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    x, seed, student, labels, draw = zip(*shared, strict=True)
    delta = [one[each] - other[each] for each in shared]
    return make_pairs(x, delta, seed=seed, student=student, labels=labels, draw=draw)
