"""`python -m cl_prompts` is the command `cl-prompts`."""

import sys

from cl_prompts.cli import main


if __name__ == "__main__":
    sys.exit(main())
