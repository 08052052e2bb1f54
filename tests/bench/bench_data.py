"""Measure the data plane beside its peers: `make bench-data`, or `python tests/bench/bench_data.py [options]`.

Prints a markdown table: samples per CPU second of one thread, ratios from this very run, and the goals. CPU seconds,
not wall seconds, so that a shared machine disturbs less; each rate is the best of several rounds, and peers take turns.
Images are made here (photographs of 500 × 375 px as JPEG, fractals of 32 px) unless `--photographs` names an
ImageFolder. MosaicML Streaming is not a dependency: run this file with a Python that has it to measure it too.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from data_bench.measure import Row
from data_bench.photographs import make_photographs, photographs
from data_bench.remote import remote
from data_bench.sizes import sizes
from data_bench.small import no_decode, resident, tiny_vit

from dbscale.shards.pack import pack
from dbscale.shards.sources import source_of

PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "timm", "webdataset", "mosaicml-streaming")


def sections(work: Path, images: Path | None, *, quick: bool) -> dict[str, Callable[[], list[Row]]]:
    """What can be measured, by name; the inputs are made when first needed."""
    rounds, count, num_large = (2, 64, 1_000_000) if quick else (5, 256, 14_000_000)

    def small() -> Path:
        folder = work / "small"
        if not folder.exists():
            entry = {"source": "fractals", "num_train": 8192, "num_test": 64, "shard_samples": 1024}
            pack(source_of("small", entry), folder, jobs=1, progress=False)
        return folder

    def photos() -> Path:
        if images is None and not (work / "photographs").exists():
            make_photographs(work / "photographs", count)
        return images or work / "photographs"

    def packed() -> Path:
        if not (work / "original").exists():
            source = source_of("photos", {"source": "imagefolder", "path": str(photos())})
            pack(source, work / "original", jobs=1, progress=False)
        return work / "original"

    return {
        "no-decode": lambda: no_decode(small(), work, rounds),
        "photographs": lambda: photographs(photos(), work, rounds),
        "resident": lambda: resident(small(), rounds),
        "training": lambda: tiny_vit(small(), rounds),
        "sizes": lambda: sizes(packed(), work, num_large),
        "remote": lambda: remote(packed(), rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, a smaller index")
    parser.add_argument("--photographs", type=Path, help="an ImageFolder (train, test) to take instead of made ones")
    parser.add_argument("--only", nargs="+", help="sections to run (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        known = sections(Path(temporary), arguments.photographs, quick=arguments.quick)
        unknown = sorted(set(arguments.only or known) - known.keys())
        if unknown:
            parser.error(f"no section {unknown[0]!r}; there are: {', '.join(known)}")
        rows = [row for name in arguments.only or known for row in known[name]()]
    text = report(rows)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


def report(rows: list[Row]) -> str:
    """The table under a line that names machine and versions."""
    machine = f"{cpu_model()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    return "\n".join(
        [
            f"{machine}; Python {sys.version.split()[0]}, {', '.join(map(versioned, PACKAGES))}.",
            "Rates are samples per CPU second of one thread, best of several rounds.",
            "",
            "| what | who | figure | ratio | goal |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(cells)} |" for cells in rows),
            "",
        ]
    )


def versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def cpu_model() -> str:
    """As Linux names it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
