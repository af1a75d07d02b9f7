"""Pinned environments for the systems tests, made once under ``.venvs/`` and used again while their pins stand.

``TRAINLINT_SYSTEMS_ENVS`` names environments that exist already: ``arc-state=/path/to/env:frameworks=/path/to/env``.
A link ``.venvs/NAME`` to an environment does the same. ``python tests/systems/envs.py`` makes all of them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venvs"
TORCH = "torch==2.13.0"

#: What each environment holds besides torch. torch goes in first: it is the largest, and the rest must not move it.
PINS: dict[str, tuple[str, ...]] = {
    "arc-state": (
        "arc-state==0.11.1",
        "cell-load==0.10.4",
        "lightning==2.6.6",
        "transformers==5.23.0",
        "peft==0.21.2",
        "hydra-core==1.3.8",
        "omegaconf==2.3.1",
        "anndata==0.12.19",
        "numpy==2.4.6",
        "pandas==2.3.3",
        "geomloss==0.3.1",
    ),
    "frameworks": (
        "lightning==2.6.6",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "peft==0.21.2",
        "hydra-core==1.3.8",
        "tensorboard==2.21.0",
        "numpy==2.4.6",
    ),
}


def given() -> dict[str, Path]:
    """The environments that ``TRAINLINT_SYSTEMS_ENVS`` names."""
    text = os.environ.get("TRAINLINT_SYSTEMS_ENVS", "")
    return {name: Path(path) for name, _, path in (part.partition("=") for part in text.split(os.pathsep) if part)}


def environment(name: str) -> Path:
    """The folder of environment ``name``, made now if need be.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    if name in given():
        return given()[name]
    folder = VENVS / name
    if folder.is_symlink():
        return folder
    wanted = hashlib.sha256("\n".join((TORCH, *PINS[name], sys.version.split()[0])).encode()).hexdigest()
    stamp = folder / "trainlint-pins"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join((TORCH, *PINS[name])) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "-c", str(constraints), *PINS[name]], check=True)
    stamp.write_text(wanted)
    return folder


def python(name: str) -> Path:
    """The interpreter of environment ``name``."""
    return environment(name) / "bin" / "python"


if __name__ == "__main__":
    for each in sys.argv[1:] or PINS:
        print(each, environment(each))
