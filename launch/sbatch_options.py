"""Which options of sbatch a cluster file may add, and which are dbscale's own: `slurm.sbatch: {mail-type: END}`.

Knows names and the shape of values. What a cluster's own `sbatch --help` lists is asked in `dbscale.launch.slurm.submit`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dbscale.errors import ConfigError, nearest

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
TEXT = re.compile(r"[A-Za-z0-9 _./:,@+=%&|*#()\[\]{}~!^-]{1,1024}")
"""Neither quotes nor `$`, backslash, `;`, `<`, `>` or line ends: nothing that ends an `#SBATCH` line or reaches a shell."""
KEYS: Mapping[str, str] = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "reservation", "exclude", "nodes", "gres",
                               "licenses", "array")},
    "gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus_per_task", "mem": "memory_gb",
    "mem-per-cpu": "memory_per_cpu_gb", "time": "time_limit_min", "signal": "signal_delay_s",
}  # fmt: skip
"""Options that have a key of their own under `slurm:`."""
RANKS = frozenset({"ntasks", "ntasks-per-node", "ntasks-per-socket", "ntasks-per-core", "ntasks-per-gpu"})
_OWNED = """
chdir cluster clusters dependency error export export-file get-user-env gid help hold ignore-pbs input job-name
kill-on-invalid-dep no-kill no-requeue open-mode output parsable quiet requeue test-only uid usage verbose version wait wrap
"""
OWNED = frozenset(_OWNED.split())
"""Another value would lose jobs, their logs or the way to find and cancel them."""
OWNED_VARIABLES = {f"SBATCH_{name.upper().replace('-', '_')}" for name in OWNED | RANKS | {"array-inx", "signal"}}
"""sbatch lets these have the last word over a script."""
_KNOWN = """
acctg-freq batch bb bbf begin cluster-constraint comment container contiguous core-spec cores-per-socket cpu-freq
cpus-per-gpu deadline delay-boot distribution exclusive extra-node-info gpu-bind gpu-freq gpus gpus-per-socket gpus-per-task
gres-flags hint mail-type mail-user mcs-label mem-bind mem-per-gpu mincpus network nice nodefile nodelist overcommit
oversubscribe power prefer priority profile propagate reboot sockets-per-node spread-job switches thread-spec
threads-per-core time-min tmp tres-bind tres-per-task use-min-nodes wckey x11
"""
KNOWN = frozenset(_KNOWN.split())
"""SLURM's free options, for machines that have no `sbatch` to ask; plugins of a cluster add more."""


def check_value(name: str, value: object) -> None:
    """Raises ValueError, in one sentence, for an option that a cluster file may not set, or not to this value."""
    if name in KEYS:
        raise ValueError(f"{name!r} has a key of its own: write slurm.{KEYS[name]}")
    if name in RANKS:
        raise ValueError(f"{name!r} follows from the ranks: write resources.num_processes and slurm.nodes")
    if name in OWNED:
        raise ValueError(f"{name!r} is dbscale's own, which finds, fences and requeues jobs by it; remove it")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no long option of sbatch; {nearest(name.lower().lstrip('-'), KNOWN)}")
    if value is False or not isinstance(value, bool | int | float | str):
        raise ValueError(
            f"{name!r} is {value!r}; write text or a number, true to pass --{name} without a value, or remove it"
        )
    if isinstance(value, str) and not TEXT.fullmatch(value):
        raise ValueError(f"{name!r} is {value!r}, which SLURM or a shell could misread; write plain words without quotes, "
                         "backslashes, `$`, `;`, `<` or `>`")  # fmt: skip


def check_names(names: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raises ConfigError naming the first of `names` that is not among `known`."""
    free = frozenset(known) - KEYS.keys() - RANKS - OWNED
    for name in names:
        if name not in free:
            raise ConfigError(f"slurm.sbatch.{name}: {where} has no option --{name}; {nearest(name, free)}")


def names_in(help_text: str) -> frozenset[str]:
    """The long options that `sbatch --help` names."""
    return frozenset(re.findall(r"--([a-z][a-z0-9-]+)", help_text))
