"""Ways to run bundles: `local` (submitit processes), `slurm` (submitit arrays), `inline` (this process)."""
