"""Whether a program that was killed ran out of memory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_OOM = re.compile(r"^oom_kill (\d+)", re.MULTILINE)


def _oom_kills() -> dict[str, int]:
    """Kills by the kernel for lack of memory, as each counter that can be read says."""
    files = [
        Path("/proc/vmstat"),
        Path("/sys/fs/cgroup/memory.events"),
        Path("/sys/fs/cgroup/memory/memory.oom_control"),
    ]
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                files.append(Path("/sys/fs/cgroup") / path.lstrip("/") / "memory.events")
    except (OSError, ValueError):
        pass
    counts: dict[str, int] = {}
    for file in files:
        try:
            match = _OOM.search(file.read_text())
        except OSError:
            continue
        if match:
            counts[str(file)] = int(match[1])
    return counts


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory that processes hold in RAM; pages they share are counted once per process."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/statm").read_text().split()
            total += int(fields[1]) * 4096
        except (OSError, ValueError, IndexError):
            continue
    return total


class MemoryWatch:
    """Counts from its construction on."""

    def __init__(self) -> None:
        self._before = _oom_kills()
        self.peak_bytes = 0

    def sample(self, pids: Iterable[int]) -> None:
        self.peak_bytes = max(self.peak_bytes, resident_bytes(pids))

    def oom_killed(self) -> bool:
        """Whether the kernel has killed for lack of memory since the beginning."""
        after = _oom_kills()
        return any(count > self._before.get(name, count) for name, count in after.items())

    def held(self) -> str:
        """``its processes held 12.3 GB``, or empty when it was not measured."""
        return f"its processes held {self.peak_bytes / 1e9:.1f} GB" if self.peak_bytes > 1e8 else ""
