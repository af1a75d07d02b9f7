"""The schema of what was seen, and its JSON form."""

from trainlint.recording.codec import RecordingError, dumps, load, loads, save
from trainlint.recording.schema import SCHEMA, Recording

__all__ = ["SCHEMA", "Recording", "RecordingError", "dumps", "load", "loads", "save"]
