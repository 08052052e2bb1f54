"""Where things run: the command line, the executors, the worker inside a job, signals, status.  Nothing imports it."""
