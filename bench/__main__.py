"""``python -m bench``: see runner.py."""

import os
import signal
import sys

from bench.runner import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the table left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
