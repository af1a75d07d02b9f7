"""trainlint: finds silent training bugs before launch."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``TrainingRun``, on demand: ``import trainlint`` alone stays cheap."""
    if name == "TrainingRun":
        # By name, so that the import directions stay what they are on paper.
        import importlib

        return importlib.import_module("trainlint.integrations.training_run").TrainingRun
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
