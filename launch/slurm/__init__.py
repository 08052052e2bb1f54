"""All that knows SLURM: its queue, the scripts handed to it, what happens inside its jobs, and the records of both."""
