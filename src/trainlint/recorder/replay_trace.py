"""Where a repeated forward is: the path of the innermost module, and the program's own line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from .core import is_user_file, line_of

#: Sub-modules that get hooks for the time of one forward.
MODULES = 3000
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
#: The function of the recorder that a repeated forward is called from.
_CALLER = "call_again"


def replayed_line(frame: FrameType | None) -> dict[str, Any] | None:
    """The program's line within the repeated forward; ``None`` where the forward is all a library's."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == _CALLER and code.co_filename.startswith(_HERE):
            return None
        if is_user_file(code.co_filename):
            return line_of(frame)
        frame = frame.f_back
    return None


class Path:
    """The modules that are being called, outermost first."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, str]] = []

    @property
    def name(self) -> str:
        return self.stack[-1][0] if self.stack else ""

    @property
    def class_name(self) -> str:
        return self.stack[-1][1] if self.stack else ""


#: Called as ``done(name, module, args, kwargs, output)`` when a sub-module returns.
Done = Callable[[str, Any, Any, Any, Any], None]


@contextlib.contextmanager
def following(module: Any, path: Path, done: Done | None = None) -> Iterator[None]:
    """Hooks on all sub-modules, for one forward."""
    handles: list[Any] = []
    try:
        for index, (name, part) in enumerate(module.named_modules()):
            if index >= MODULES:
                break
            if type(part).__name__ == "RecursiveScriptModule" or not hasattr(part, "_forward_hooks"):
                continue
            entry = (name, type(part).__name__)

            def enter(part: Any, args: Any, entry: tuple[str, str] = entry) -> None:
                path.stack.append(entry)

            def leave(part: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                if path.stack:
                    path.stack.pop()
                if done is not None:
                    done(name, part, args, kwargs, output)

            handles.append(part.register_forward_pre_hook(enter))
            handles.append(part.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        path.stack.clear()


def here(level: int = 1) -> dict[str, Any] | None:
    """The program's line that the caller of this function works for."""
    return replayed_line(sys._getframe(level + 1))
