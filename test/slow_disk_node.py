"""Runs the pair logger with a disk that writes nothing while the file $XVIEW_LOC_TEST_DISK_BUSY exists."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from xview_loc.bags.writer import BagWriter
from xview_loc.nodes.pair_logger_node import main

write = BagWriter.write
busy = Path(os.environ["XVIEW_LOC_TEST_DISK_BUSY"])


def write_slowly(*arguments: Any, **more: Any) -> None:
    while busy.exists():
        time.sleep(0.01)
    write(*arguments, **more)


BagWriter.write = write_slowly  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
