"""`dbscale`: parses the command line and calls `dbscale.launch.commands`.

Exit codes: 0 done, 1 what the user gave cannot be used (one line on stderr), 2 usage, 3 some cells failed, 130 stopped
by a signal with everything saved.  Start-up stays below a second: no torch, scipy or altair before a command needs it.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

import shtab

from dbscale import __version__, plugins
from dbscale.errors import log_to_stderr
from dbscale.launch import status
from dbscale.launch.commands import cells, hunt, laws, plan, results, shards, submit, work

OUR_PACKAGES = ("dbscale", "shards", "launch")
EXTRAS = {
    "train": {"accelerate", "deepspeed", "PIL", "safetensors", "simplejpeg", "sklearn", "submitit", "timm", "torch"},
    "tables": {"altair", "jinja2", "pyarrow", "vl_convert"},
}
"""Packages that not everybody needs, by the extra of the distribution that brings them."""
DESCRIPTION = "Run a grid of training cells, fit its scaling laws and find the distillation boundary."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    log_to_stderr(arguments.verbose)
    try:
        plugins.load(arguments.plugin)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("dbscale: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `dbscale status | head`
        sys.stderr.close()
        return 0
    except ModuleNotFoundError as error:
        extra = next((extra for extra, names in EXTRAS.items() if str(error.name).partition(".")[0] in names), None)
        if extra is None:
            raise
        print(f"dbscale: this command needs {error.name}: pip install 'dbscale[{extra}]'", file=sys.stderr)
        return 1
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
    parser.add_argument("--version", action="version", version=f"dbscale {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log what is done; -vv logs everything")
    shtab.add_argument_to(parser, "--completion", 'print a shell\'s completion: eval "$(dbscale --completion bash)"')
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE|FILE.py",
                        help="import parts of your own first, as `plugins:` of a grid does; repeatable")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of user errors")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    for family in (shards, plan, submit, hunt, work, status, cells, results, laws):
        family.add_commands(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
