"""The process from which those of the visitors are forked: it has imported everything and opened the built-in pool.

    python fork_server.py FD    # started by visits.py

FD is a socket. Each message on it is the name of a visitor's folder, with a pipe for the visitor's requests.
"""

import os
import resource
import signal
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import opening
from transformers.utils import logging
from visitor import Visitor, serve


# Memory that a visitor's process may ask for: a base of 1 GiB, read and built, and the work with it.
MAX_BYTES = 3 * 2**30


def main() -> None:
    """Fork a process for each visitor, until the page closes the socket."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    digits = opening.open_digits()
    limit = _data_bytes() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(fileno=int(sys.argv[1])) as page:
        page.sendall(b"+")
        while True:
            folder, pipes, *_ = socket.recv_fds(page, 4096, 1)
            if not folder:
                return
            if os.fork() == 0:
                page.close()
                serve(Connection(pipes[0]), Visitor(digits, Path(os.fsdecode(folder))))
                os._exit(0)
            os.close(pipes[0])


def _data_bytes() -> int:
    """What this process has asked for already; the limit counts it too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmData:"))


if __name__ == "__main__":
    main()
