"""Order, index and pixels: everything between packed shards on disk and the batches a training loop eats.

`open_dataset(path).subset(num_samples)` names the samples, `make_loader(subset, …)` serves them, `make_transform`
turns pixels into model input. Importing this package does not import torch: `plan` and `status` read manifests from
here and must answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dbscale.data.manifest import Manifest as Manifest
from dbscale.data.manifest import load_manifest as load_manifest
from dbscale.errors import DataError as DataError

if TYPE_CHECKING:
    from dbscale.data.augment import IMAGENET_MEAN as IMAGENET_MEAN
    from dbscale.data.augment import IMAGENET_STD as IMAGENET_STD
    from dbscale.data.augment import Transform as Transform
    from dbscale.data.augment import make_transform as make_transform
    from dbscale.data.dataset import Dataset as Dataset
    from dbscale.data.dataset import Subset as Subset
    from dbscale.data.dataset import open_dataset as open_dataset
    from dbscale.data.dense import DenseTransform as DenseTransform
    from dbscale.data.loader import Batch as Batch
    from dbscale.data.loader import EvalLoader as EvalLoader
    from dbscale.data.loader import TrainLoader as TrainLoader
    from dbscale.data.loader import make_eval_loader as make_eval_loader
    from dbscale.data.loader import make_loader as make_loader
    from dbscale.data.mix import MixTarget as MixTarget
    from dbscale.data.mix import mix_batch as mix_batch

_ROOMS = {
    "augment": ("IMAGENET_MEAN", "IMAGENET_STD", "Transform", "make_transform"),
    "dataset": ("Dataset", "Subset", "open_dataset"),
    "dense": ("DenseTransform",),
    "loader": ("Batch", "EvalLoader", "TrainLoader", "make_eval_loader", "make_loader"),
    "mix": ("MixTarget", "mix_batch"),
}


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
