"""The command `cl-prompts`. An error is printed as one line on stderr, with exit code 1."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from cl_prompts.cli.parser import new_parser
from cl_prompts.cli.stderr import print_to_stderr, warnings_on_stderr


# Errors of input, files, network, devices and memory, and of training that diverged. Any other error is a bug and is shown
# with its traceback.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: arguments of the command line; None: those of this process.

    Returns:
        The exit code: 0, or 1 after an error. Wrong arguments exit with 2, in `train` and `compare` with 1.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["train"], ["compare"]):  # which read their own settings
        args = Namespace(command=words[0], words=words[1:])
    else:
        args = new_parser().parse_args(words)
    try:
        code = _inspect(args) if args.command == "inspect" else _call(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as in `cl-prompts ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        print_to_stderr(error)
        return 1
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print_to_stderr(error.code)
        return 1
    except KeyboardInterrupt:
        return 130


def _inspect(args: Namespace) -> int:
    from cl_prompts.cli.inspect import inspect

    with warnings_on_stderr():
        return inspect(args)


def _call(args: Namespace) -> int:
    from cl_prompts.cli import commands  # imports torch and more, which --help and `inspect` do not need
    from cl_prompts.runs.screen import quiet_libraries

    with quiet_libraries(), warnings_on_stderr():
        code: int = getattr(commands, args.command)(args)
    return code
