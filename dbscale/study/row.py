"""What a finished cell reports: `row.json`.  Written last, so its existence means done."""

from __future__ import annotations

from pydantic import Field

from dbscale.strict import Strict
from dbscale.study.cell import Arm
from dbscale.study.recipe import Stage


class Upstream(Strict):
    """What a finetune started from, copied from its parent so that a table needs no second lookup."""

    dataset: str
    num_samples: int
    stage: Stage
    error_rate: float
    """Top-1 error on the upstream test split."""
    linear_probe_error: float | None = None
    transrate: float | None = None


class Timing(Strict):
    """Measured, hence left out when two rows are compared for equality."""

    train_time_s: float
    eval_time_s: float
    step_time_s: float
    images_per_s: float
    data_wait_share: float = Field(ge=0)
    device_time_s: float
    """Wall time of all attempts times the number of devices."""
    peak_memory_bytes: int
    mfu: float | None = None
    """Model FLOP utilisation, where the device's peak is known."""
    energy_j: float | None = None
    num_attempts: int = 1
    num_devices: int = 1
    device: str
    host: str


class Row(Strict):
    """One finished cell. Error rates are top-1 shares in [0, 1]; sizes are counts."""

    key: str
    id: str
    stage: Stage
    arm: Arm
    model: str
    dataset: str
    num_samples: int
    seed: int
    num_params: int
    num_classes: int
    num_steps: int
    samples_seen: int
    train_flops: float
    """Forward and backward of the student, forward of the teacher, over all steps."""
    error_rate: float
    top5_error_rate: float | None = None
    test_loss: float
    calibration_error: float | None = None
    num_test_samples: int
    train_loss: float
    """Mean over the last tenth of the run."""
    weights_sha256: str
    """Of model.safetensors: two rows with equal hashes come from bitwise equal runs."""
    replaced_samples: int = 0
    """Undecodable training images that another of their class stood in for."""
    upstream: Upstream | None = None
    teacher: str | None = None
    kd_backend: str | None = None
    resources: dict[str, str | int | float | bool | None] = {}
    """How it ran (precision plugin, ZeRO stage, world size …); informative, not part of its identity."""
    timing: Timing
