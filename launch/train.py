"""The script that `accelerate launch` is given to run one cell by hand, with any number of processes.

    accelerate launch --config_file configs/accelerate/zero1.yaml launch/train.py \\
        --cell KEY --grid configs/grids/demo.yaml --store out --data data

The same as `accelerate launch … -m dbscale.launch.cli run KEY …`, for those who name a file, from any folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbscale.launch.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", required=True, help="key of the cell; all other options are those of `dbscale run`")
    known, others = parser.parse_known_args()
    sys.exit(main(["run", known.cell, *others]))
