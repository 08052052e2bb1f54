"""What each `dbscale` command does, one family a file.  `launch.cli` parses; heavy imports happen inside functions."""
