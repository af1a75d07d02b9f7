"""Stands in for a command on the ``PATH`` of a watched program: ``python -I -S shim.py RUN_DIR COMMAND ARGUMENTS``.

Writes what the command will do to the journal, then becomes the real command. Uploads end here, with status 0.
"""

import importlib.util
import os
import sys


def main(run_dir: str, words: "list[str]") -> int:
    here = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(
        "_trainlint_recorder", os.path.join(here, "__init__.py"), submodule_search_locations=[here]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["_trainlint_recorder"] = package
    spec.loader.exec_module(package)
    core = importlib.import_module("_trainlint_recorder.core")
    settings = importlib.import_module("_trainlint_recorder.settings")
    files = importlib.import_module("_trainlint_recorder.files")
    commands = importlib.import_module("_trainlint_recorder.files_commands")
    guarding = importlib.import_module("_trainlint_recorder.files_guard")
    keeping = importlib.import_module("_trainlint_recorder.files_keep")
    undo = importlib.import_module("_trainlint_recorder.undo")

    known = settings.Settings.from_environment() or settings.Settings(run_dir=run_dir, run_id="")
    recorder = core.Recorder(known)

    def emit(action: str, target: str, detail: str) -> None:
        recorder.emit("prevented", {"action": action, "target": target, "detail": detail or f"by {words[0]}"})

    guard = guarding.Guard(run_dir, known.run_id, lambda: files.cache_folders(os.getcwd()), emit)
    try:
        why = commands.prevents(guard, words, os.getcwd())
        if why:
            guard.report_upload(words)
            sys.stderr.write(f"trainlint: did not run {words[0]} while watching: {why}\n")
            return 0
        commands.protect(guard, words, os.getcwd())
    except (keeping.Refused, undo.Closed, OSError) as error:
        sys.stderr.write(f"trainlint: refused {words[0]} while watching: {error}\n")
        return 1
    shims = os.path.realpath(os.path.join(run_dir, "shims"))
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        program = os.path.join(folder or ".", words[0])
        if os.path.realpath(folder or ".") != shims and os.path.isfile(program) and os.access(program, os.X_OK):
            os.execv(program, words)
    sys.stderr.write(f"{words[0]}: command not found\n")
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
