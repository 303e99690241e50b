"""``python -m quantcache``, and the ``quantcache`` command."""

from __future__ import annotations

import signal
import threading
from typing import NoReturn

from quantcache.common.interrupts import leave_at_once


def main() -> NoReturn:
    """Run the command line; Ctrl-C ends in one line, also while modules are imported and while Python shuts down.

    Raises:
        SystemExit: Always.
    """
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    from quantcache.cli import main as run

    run()


if __name__ == "__main__":
    main()
