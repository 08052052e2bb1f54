"""Which test samples each run got wrong, from the cells' `correct.npz`: what the bootstrap draws from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbscale.errors import TableError
from dbscale.report.table import RunTable
from dbscale.study.store import Store


def load_mistakes(store: Store, table: RunTable) -> dict[str, np.ndarray]:
    """Per run key the mistakes [samples] as booleans, in the test split's order; runs without the file are left out."""
    paths = {run.key: store.cell_dir(run.key) / "correct.npz" for run in table}
    return {key: read_mistakes(path) for key, path in paths.items() if path.exists()}


def read_mistakes(path: Path) -> np.ndarray:
    """Booleans [samples] over the samples that could be decoded. Raises TableError where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            count = int(file["num_samples"])
            correct, counted = (np.unpackbits(file[name], count=count).astype(bool) for name in ("correct", "counted"))
    except (OSError, KeyError, ValueError) as error:
        raise TableError(f"{path} cannot be read ({error}); remove the cell's folder to run it again") from error
    return ~correct[counted]
