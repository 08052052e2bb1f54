"""What each `dbscale` command does, one family a file.  `cli` parses; heavy imports happen inside functions."""
