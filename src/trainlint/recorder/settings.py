"""What the supervisor tells the recorder, through environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

PREFIX = "TRAINLINT_"


@dataclass(frozen=True)
class Settings:
    """One watched run.

    ``run_dir`` holds the streams of all processes, the journal and the scratch folder; it is private to the run.
    """

    run_dir: str
    run_id: str
    #: Process id of the supervisor: when it is gone the program must not train on unwatched.
    supervisor: int = 0
    steps: int = 3
    #: Backwards without any optimizer step after which the program is parked.
    backward_cap: int = 200
    #: Config files whose reading is tracked, absolute, joined by os.pathsep.
    configs: tuple[str, ...] = ()
    #: Unix time when the child was started.
    started: float = 0.0
    #: Unix time in ns before which a file counts as having existed.
    started_ns: int = 0
    #: Cross the end of the epoch after the wanted steps.
    boundary: bool = True
    #: What to do instead of watching, as JSON (``recorder/experiment.py``); empty for an ordinary watch.
    experiment: str = ""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Settings | None:
        """The settings, or ``None`` when this process is not watched."""
        env = os.environ if env is None else env
        run_dir = env.get(PREFIX + "RUN_DIR")
        if not run_dir:
            return None
        return cls(
            run_dir=run_dir,
            run_id=env.get(PREFIX + "RUN_ID", ""),
            supervisor=int(env.get(PREFIX + "SUPERVISOR", "0")),
            steps=int(env.get(PREFIX + "STEPS", "3")),
            backward_cap=int(env.get(PREFIX + "BACKWARD_CAP", "200")),
            configs=tuple(p for p in env.get(PREFIX + "CONFIGS", "").split(os.pathsep) if p),
            started=float(env.get(PREFIX + "STARTED", "0")),
            started_ns=int(env.get(PREFIX + "STARTED_NS", "0")),
            boundary=env.get(PREFIX + "BOUNDARY", "1") != "0",
            experiment=env.get(PREFIX + "EXPERIMENT", ""),
        )

    def to_environment(self) -> dict[str, str]:
        """The variables that :meth:`from_environment` reads."""
        return {
            PREFIX + "RUN_DIR": self.run_dir,
            PREFIX + "RUN_ID": self.run_id,
            PREFIX + "SUPERVISOR": str(self.supervisor),
            PREFIX + "STEPS": str(self.steps),
            PREFIX + "BACKWARD_CAP": str(self.backward_cap),
            PREFIX + "CONFIGS": os.pathsep.join(self.configs),
            PREFIX + "STARTED": repr(self.started),
            PREFIX + "STARTED_NS": str(self.started_ns),
            PREFIX + "BOUNDARY": "1" if self.boundary else "0",
            PREFIX + "EXPERIMENT": self.experiment,
        }
