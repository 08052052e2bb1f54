"""How and where cells run: `configs/clusters/*.yaml`, a plan's bundles cut by it into tasks, what this machine can hold.

Nothing here reaches a cell's identity. Reads and checks the file, asks the kernel and the GPU driver, without torch;
starting tasks is the business of `dbscale.launch.local` and `dbscale.launch.slurm`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import Field, field_validator, model_validator

from dbscale.errors import ConfigError, nearest
from dbscale.launch import sbatch_options
from dbscale.strict import Strict, load_yaml, override, validate
from dbscale.study.cell import Cell
from dbscale.study.cost import DEVICES, STAGES, CostModel
from dbscale.study.plan import Plan
from dbscale.study.recipe import Stage
from dbscale.study.resources import Resources, visible_gpus

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MEMORY_PER_WORKER_BYTES = 1.5e9
"""A process with torch, a small model and its data, on CPU."""
WEIGHT: Mapping[Stage, int] = {"finetune": 0, "pretrain": 1, "distill": 2}
"""The heaviest stage in a bundle gives the job its resources."""
REDUCER: Mapping[str, Any] = {"nodes": 1, "gpus_per_node": 0, "gres": None, "cpus_per_task": 2, "time_limit_min": 60}
REDUCER_MEMORY_GB = 8.0

SlurmWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:&|*@%+\[\]()=-]*$", max_length=256)]
"""A name as SLURM writes them; no spaces, quotes, `$`, `;`, newlines."""
GPU_TYPES = re.compile(r"[A-Za-z0-9_.-]+:[1-9][0-9]*(,[A-Za-z0-9_.-]+:[1-9][0-9]*)*")
ShellLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
"""One line of shell, run as it stands in the job's own shell: the one place where a config is code."""


class Slurm(Strict):
    """What one job asks of SLURM. One task per rank, so tasks per node follow from `resources.num_processes`."""

    partition: SlurmWord | None = None
    account: SlurmWord | None = None
    qos: SlurmWord | None = None
    constraint: SlurmWord | None = None
    reservation: SlurmWord | None = None
    exclude: SlurmWord | None = None
    """Nodes never to use."""
    licenses: SlurmWord | None = None
    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int | str = 0
    """A number, or types with numbers: `a100:2`."""
    gres: SlurmWord | None = None
    """Generic resources of a node. GPUs among them (`gpu:a100:2`) are asked for in this way alone."""
    cpus_per_task: int = Field(default=1, gt=0)
    memory_gb: float | None = Field(default=None, gt=0)
    """Per node; None, here and below, leaves the partition's default."""
    memory_per_cpu_gb: float | None = Field(default=None, gt=0)
    """For clusters that only take memory by the CPU."""
    time_limit_min: int = Field(default=240, gt=0)
    signal_delay_s: int = Field(default=120, gt=0)
    """SIGUSR2 comes this long before the time limit: enough to write a checkpoint."""
    array_parallelism: int = Field(default=64, gt=0)
    """Elements of one array that run at once."""
    array: bool | int = True
    """False where job arrays are forbidden: each bundle is a job of its own. A number: the most elements of one array."""
    sbatch: dict[str, Any] = {}
    """Further options of sbatch by their long names, e.g. `mail-type: END`; true passes one without a value."""
    setup: tuple[ShellLine, ...] = ()
    """Shell lines before the job's command, e.g. `module load cuda`."""
    staging: str | None = None
    """Folder on the node's own disk that shards are copied to before training; None reads them where they are."""

    @field_validator("gpus_per_node", mode="before")
    @classmethod
    def _gpus(cls, value: object) -> object:
        if (isinstance(value, str) and GPU_TYPES.fullmatch(value)) or (type(value) is int and value >= 0):
            return value
        raise ValueError(f"takes a number of GPUs, or types with numbers such as 'a100:2', found {value!r}")

    @field_validator("array", mode="before")
    @classmethod
    def _array(cls, value: object) -> object:
        if isinstance(value, bool) or (type(value) is int and value > 0):
            return value
        raise ValueError(f"takes true, false (no job arrays) or the most elements of one array, found {value!r}")

    @field_validator("sbatch")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, each in value.items():
            sbatch_options.check_value(name, each)
        return value

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Slurm:
        memory = [name for name in ("memory_gb", "memory_per_cpu_gb") if getattr(self, name) is not None]
        memory += ["sbatch.mem-per-gpu"] if "mem-per-gpu" in self.sbatch else []
        if len(memory) > 1:
            raise ValueError(f"{' and '.join(memory)} exclude each other in SLURM; set all but one of them to null")
        if self.gres_gpus and count_gpus(self.gpus_per_node) not in (0, self.gres_gpus):
            raise ValueError(f"gres {self.gres!r} asks for {self.gres_gpus} GPUs a node and gpus_per_node for "
                             f"{self.gpus_per_node}; set gpus_per_node to {self.gres_gpus} or 0")  # fmt: skip
        return self

    @property
    def gres_gpus(self) -> int:
        """GPUs of a node that `gres` asks for."""
        parts = [part.split(":") for part in (self.gres or "").split(",")]
        return sum(int(part[-1]) if part[-1].isdigit() else 1 for part in parts if part[0] == "gpu")

    @property
    def array_limit(self) -> int | None:
        """The most elements of one array; None leaves it to SLURM's configuration."""
        return None if self.array is True else int(self.array) or 1


def count_gpus(wanted: int | str) -> int:
    """The number in `2`, `a100:2` or `a100:1,v100:1`."""
    return wanted if isinstance(wanted, int) else sum(int(part.rpartition(":")[2]) for part in wanted.split(","))


class StageOverride(Strict):
    """What one stage does otherwise: partial `resources` and `slurm`."""

    resources: dict[str, Any] = {}
    slurm: dict[str, Any] = {}


class Cluster(Strict):
    """`configs/clusters/*.yaml`."""

    executor: Literal["local", "slurm", "inline"]
    workers: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Bundles that run at once on this machine (local executor); auto: one per physical core, or `cells_per_device` per GPU
    set."""
    cells_per_device: int = Field(default=1, gt=0)
    """Cells that share a GPU, or a set of them, each in a process of its own (local executor): small models leave most of
    one idle."""
    target_min: float = Field(default=5.0, gt=0)
    """Predicted minutes of one bundle; start-up is paid once per bundle."""
    requeue_limit: int = Field(default=3, ge=0)
    """How often a job that died or was preempted is started again."""
    device: Literal["cpu", "a100", "h100", "h200"] = "cpu"
    """What the cost model predicts for, before rows calibrate it."""
    resources: Resources = Resources()
    slurm: Slurm | None = None
    stages: dict[Stage, StageOverride] = {}
    reducer: dict[str, Any] = {}
    """What the job at the end, which fits and reports, asks otherwise than `slurm:`."""

    @model_validator(mode="after")
    def _slurm_section(self) -> Cluster:
        if self.executor == "slurm" and self.slurm is None:
            raise ValueError("executor slurm needs a `slurm:` section")
        for stage in STAGES:
            self.shape(stage)
        self.reducer_shape()
        return self

    def shape(self, stage: Stage) -> Shape:
        """Resources and SLURM request of one stage, its overrides applied."""
        change = self.stages.get(stage, StageOverride())
        where = f"stages.{stage}"
        resources = _updated(self.resources, change.resources, f"{where}.resources")
        slurm = _updated(self.slurm or Slurm(), change.slurm, f"{where}.slurm")
        if resources.num_processes % slurm.nodes:
            raise ValueError(
                f"resources.num_processes {resources.num_processes} does not divide over slurm.nodes {slurm.nodes}"
            )
        return Shape(resources=resources, slurm=slurm)

    def reducer_shape(self) -> Shape:
        """One task, no GPU unless the config says so; memory in the words that the cluster takes."""
        base, memory = self.slurm or Slurm(), {"memory_gb": REDUCER_MEMORY_GB, "memory_per_cpu_gb": None}
        if "memory_per_cpu_gb" in self.reducer or (base.memory_per_cpu_gb and "memory_gb" not in self.reducer):
            memory = {"memory_gb": None, "memory_per_cpu_gb": REDUCER_MEMORY_GB / REDUCER["cpus_per_task"]}
        free = {name: value for name, value in base.sbatch.items() if "gpu" not in name}
        slurm = _updated(base, {**REDUCER, **memory, "sbatch": free, **self.reducer}, "reducer")
        return Shape(resources=Resources(), slurm=slurm)

    def shape_key(self, stage: Stage) -> str:
        """Equal for stages that can share a job."""
        return self.shape(stage).model_dump_json()

    def cost_model(self) -> CostModel:
        return CostModel(device=DEVICES[self.device])

    def num_workers(self) -> int:
        """Bundles at once on this machine; 1 where a scheduler decides."""
        if self.executor != "local":
            return 1
        return (
            self.workers if isinstance(self.workers, int) else available_workers(self.resources, self.cells_per_device)
        )


class Shape(Strict):
    """A resource shape: what all elements of one array share."""

    resources: Resources
    slurm: Slurm

    @property
    def tasks_per_node(self) -> int:
        return self.resources.num_processes // self.slurm.nodes


def load_cluster(name_or_path: str, overrides: Sequence[str] = ()) -> Cluster:
    """A cluster by name (`local`, `slurm`) or path; raises ConfigError naming file, key and what is allowed."""
    path = cluster_path(name_or_path)
    return validate(Cluster, override(load_yaml(path), overrides), where=str(path))


def cluster_path(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = sorted(each.stem for each in (CONFIGS / "clusters").glob("*.yaml"))
    if name_or_path not in known:
        raise ConfigError(f"unknown cluster {name_or_path!r}; {nearest(name_or_path, known)}, or a .yaml path")
    return CONFIGS / "clusters" / f"{name_or_path}.yaml"


def _updated(base: Strict, change: dict[str, Any], where: str) -> Any:
    return validate(type(base), {**base.model_dump(mode="json"), **change}, where=where) if change else base


@dataclass(frozen=True)
class Task:
    """A bundle as an executor sees it: keys in order, what they wait for, how often it was started again in vain."""

    keys: tuple[str, ...]
    parents: frozenset[str]
    """Cells outside the bundle that its own build on."""
    stage: Stage
    """Whose resources it runs with: the heaviest stage in it."""
    wave: int
    predicted_s: float
    restarts: int = 0


def tasks_of(plan: Plan, cost: CostModel, cluster: Cluster) -> tuple[Task, ...]:
    """All bundles of a plan, parents' before children's, longest first; one whose stages run in different shapes is
    cut into one task a shape."""
    tasks, shapes = [], {stage: cluster.shape_key(stage) for stage in STAGES}
    for number, wave in enumerate(plan.waves, start=1):
        for bundle in wave.bundles:
            groups: dict[str, list[Cell]] = {}
            for cell in bundle.cells:
                groups.setdefault(shapes[cell.recipe.stage], []).append(cell)
            tasks += (_task(cells, number, cost) for cells in groups.values())
    return tuple(sorted(tasks, key=lambda task: (task.wave, task.stage == "finetune", -task.predicted_s)))


def _task(cells: Sequence[Cell], wave: int, cost: CostModel) -> Task:
    keys = tuple(cell.key for cell in cells)
    return Task(
        keys=keys,
        parents=frozenset(parent.key for cell in cells for parent in cell.parents).difference(keys),
        stage=max((cell.recipe.stage for cell in cells), key=WEIGHT.__getitem__),
        wave=wave,
        predicted_s=sum(map(cost.seconds, cells)),
    )


def available_workers(resources: Resources, cells_per_device: int = 1) -> int:
    """So many bundles per GPU set when there are GPUs, otherwise one per physical core and 1.5 GB of free memory."""
    gpus = visible_gpus() if resources.device != "cpu" else ()
    if gpus:
        return max(1, len(gpus) // resources.num_processes) * cells_per_device
    cores_per_bundle = resources.num_processes * (resources.threads or 1)
    by_memory = int(psutil.virtual_memory().available / (MEMORY_PER_WORKER_BYTES * resources.num_processes))
    return max(1, min(physical_cores() // cores_per_bundle, by_memory))


def physical_cores() -> int:
    """Physical cores among the CPUs this process may run on, capped by a container's CPU quota."""
    cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
    return max(1, int(min(cores, _cpu_quota() or cores)))


def _cpu_quota() -> float | None:
    """CPUs' worth of time that control groups grant, None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(1.0, int(limit) / int(period))
