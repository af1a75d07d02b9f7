"""Makes the helpers beside the tests importable by their folder (``recorder.watching``, ``support.build``)."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Hundreds of tests start trainlint in a process of its own: without bytecode each would compile it anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def no_dangling_links() -> Iterator[None]:
    """Tests that kill trainlint never start it again, so nothing clears the short name of their temporary folder."""
    yield
    for link in Path(tempfile.gettempdir()).glob("tl-*"):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


# A shell that starts the tests in the background has them ignore Ctrl-C, nohup a hang-up; some tests send these.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
