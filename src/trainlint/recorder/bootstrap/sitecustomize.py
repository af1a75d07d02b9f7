"""Start-up hook of a watched interpreter: arms the recorder, then runs the sitecustomize that it shadows."""

import os
import sys


def _arm() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    package = os.path.dirname(here)
    import importlib
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "_trainlint_recorder",
        os.path.join(package, "__init__.py"),
        submodule_search_locations=[package],
    )
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["_trainlint_recorder"] = module
    spec.loader.exec_module(module)
    importlib.import_module("_trainlint_recorder.arm").arm()


def _chain() -> None:
    """Run the sitecustomize that would have been found without this folder."""
    here = os.path.dirname(os.path.abspath(__file__))
    import importlib.machinery

    others = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        import importlib.util

        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("TRAINLINT_RUN_DIR"):
    try:
        _arm()
    except Exception as error:  # never keep the user's program from starting
        try:
            path = os.path.join(os.environ["TRAINLINT_RUN_DIR"], "stream", "bootstrap-%d.err" % os.getpid())
            with open(path, "w") as f:
                f.write("%s: %s" % (type(error).__name__, error))
        except Exception:
            pass
_chain()
