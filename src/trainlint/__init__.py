"""trainlint: finds silent training bugs before launch."""

__version__ = "0.1.0"
