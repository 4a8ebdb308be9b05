"""The peak of a process' memory."""

from __future__ import annotations

import subprocess
import sys

# Runs code, then prints the peak of its own memory, MB. (ru_maxrss would count the parent's, too.)
MEASURED = """{}
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""


def peak_mb(code: str, *arguments: object, timeout_s: float = 120.0) -> tuple[int, str]:
    """Run Python code in a process of its own; return the peak of its memory, MB, and what it printed."""
    command = [sys.executable, "-c", MEASURED.format(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    *printed, peak = done.stdout.splitlines()
    return int(peak), "\n".join(printed)
