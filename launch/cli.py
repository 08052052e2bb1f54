"""`dbscale`: parses the command line and calls `dbscale.launch.commands`.

Exit codes: 0 done, 1 what the user gave cannot be used (one line on stderr), 2 usage, 3 some cells failed, 130 stopped
by a signal with everything saved.  Start-up stays below a second: no torch, scipy or altair before a command needs it.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from dbscale.launch import status
from dbscale.launch.commands import cells, hunt, laws, plan, results, shards, submit

OUR_PACKAGES = ("dbscale", "shards", "launch")
DESCRIPTION = "Run a grid of training cells, fit its scaling laws and find the distillation boundary."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("dbscale: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dbscale status | head`
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"dbscale: {error}", file=sys.stderr)
        return 1


def is_users(error: Exception) -> bool:
    """Whether the message is for the user: an error type of ours, or the operating system's; the rest are bugs."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in OUR_PACKAGES


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; each family adds its own commands."""
    parser = argparse.ArgumentParser(
        prog="dbscale", description=DESCRIPTION, epilog="`dbscale COMMAND --help` says more."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of user errors")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    for family in (shards, plan, submit, hunt, status, cells, results, laws):
        family.add_commands(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
