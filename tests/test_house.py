"""The house itself: what is packaged, what may import what, and that every check has its page and its proof."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CHECKS = sorted(p for p in (ROOT / "checks").rglob("*.py") if p.name != "__init__.py")
CODE = re.compile(r'@check\(\s*"(TL\d{3})"')
SECTIONS = ["What goes wrong", "How it is detected", "What to do", "When it may be wrong", "References"]


def code_of(file: Path) -> str:
    found = CODE.search(file.read_text(encoding="utf-8"))
    assert found, f"{file} declares no check"
    return found.group(1)


def names() -> list[str]:
    return [str(p.relative_to(ROOT / "checks")) for p in CHECKS]


def functions_of(file: Path) -> Iterator[ast.FunctionDef]:
    """The detectors of a check's file."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "check"
            for d in node.decorator_list
        ):
            yield node


# ------------------------------------------------------------------------------------------------ packaging


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    on_disk = set()
    for top, name in ((ROOT / "src" / "trainlint", "trainlint"), (ROOT / "checks", "trainlint.checks")):
        for init in top.rglob("__init__.py"):
            inside = init.parent.relative_to(top).parts
            on_disk.add(".".join((name, *inside)))
    assert sorted(listed) == sorted(on_disk)


def test_every_folder_with_code_is_a_package() -> None:
    for top in (ROOT / "src" / "trainlint", ROOT / "checks"):
        for file in top.rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} has no __init__.py"


def test_one_version() -> None:
    from trainlint import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_torch_of_the_constraints_is_plain() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.13.0"]


# ------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize("file", CHECKS, ids=names())
def test_a_check_has_a_whole_page(file: Path) -> None:
    docs = [ast.get_docstring(f) or "" for f in functions_of(file)] + [
        ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    ]
    whole = [d for d in docs if all(re.search(rf"^## {s}$", d, re.MULTILINE) for s in SECTIONS)]
    assert whole, f"{file.name}: no docstring has all of: {', '.join(SECTIONS)}"
    for page in whole:
        order = [page.index(f"## {section}") for section in SECTIONS]
        assert order == sorted(order)
        for section, following in zip(SECTIONS, [*SECTIONS[1:], ""]):
            body = page.split(f"## {section}", 1)[1]
            body = body.split(f"## {following}", 1)[0] if following else body
            assert body.strip(), f"{file.name}: the section {section!r} is empty"


@pytest.mark.parametrize("file", CHECKS, ids=names())
def test_a_check_has_bad_and_good_fixtures(file: Path) -> None:
    folder = ROOT / "fixtures" / f"{code_of(file)}-{file.stem.replace('_', '-')}"
    assert folder.is_dir(), f"{folder.relative_to(ROOT)} is missing"
    kinds = {re.split(r"[^a-z]", p.name)[0] for p in folder.iterdir()}
    assert "bad" in kinds, f"{folder.name} has nothing bad"
    assert "good" in kinds, f"{folder.name} has nothing good"


def test_codes_and_names_are_unique() -> None:
    codes = [code_of(f) for f in CHECKS]
    assert len(set(codes)) == len(codes)
    assert len({f.stem for f in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("file", CHECKS, ids=names())
def test_a_check_imports_the_contract_and_the_recording_only(file: Path) -> None:
    allowed = {"__future__", "collections", "dataclasses", "enum", "fractions", "functools", "itertools", "math"}
    allowed |= {"operator", "re", "statistics", "string", "typing", "difflib", "bisect", "struct"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            modules = [node.module or ""]
        else:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("open", "exec", "eval", "print", "input", "__import__")
            continue
        for module in modules:
            fine = module == "trainlint.contract" or module.startswith("trainlint.recording")
            assert fine or module.split(".")[0] in allowed, f"{file.name} imports {module}"


# ------------------------------------------------------------------------------------------------ directions


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside ``if TYPE_CHECKING:``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            nodes: list[ast.AST] = list(node.orelse)
        else:
            nodes = [node]
        for kept in nodes:
            yield kept
            yield from runtime_nodes(kept)


def test_the_recorder_imports_relatively_and_nothing_else() -> None:
    """It runs in the user's interpreter, where trainlint is not installed: an absolute import would fail there."""
    for file in (ROOT / "src" / "trainlint" / "recorder").rglob("*.py"):
        for node in runtime_nodes(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != "trainlint", f"{file.name} imports {node.module}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name.split(".")[0] != "trainlint", f"{file.name} imports {alias.name}"


@pytest.mark.skipif(importlib.util.find_spec("importlinter") is None, reason="import-linter is not installed")
def test_import_directions() -> None:
    linter = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert linter.returncode == 0, linter.stdout


def test_sizes() -> None:
    for top in ("src", "checks"):
        for file in (ROOT / top).rglob("*.py"):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            assert lines <= 500, f"{file.relative_to(ROOT)} has {lines} lines: split it along a real seam"


# ------------------------------------------------------------------------------------------------ installed


def installed(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """trainlint as installed there, started away from the checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRAINLINT"))}
    return subprocess.run(
        [python, "-m", "trainlint", *arguments], cwd=python.parent, env=env, capture_output=True, text=True
    )


def pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with pip and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def test_a_wheel_an_install_and_an_editable_install_hold_every_check(clean_python: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    tracked = ["pyproject.toml", "LICENSE", "README.md"]
    for name in tracked:
        if (ROOT / name).exists():
            (copy / name).write_bytes((ROOT / name).read_bytes())
    for top in ("src", "checks"):
        for file in (ROOT / top).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not any(".egg-info" in p for p in file.parts):
                target = copy / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    wheel = subprocess.run(
        [clean_python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, copy],
        capture_output=True,
        text=True,
    )
    assert wheel.returncode == 0, wheel.stderr
    (built,) = tmp_path.glob("trainlint-*.whl")
    inside = set(zipfile.ZipFile(built).namelist())
    for file in (*CHECKS, *(ROOT / "src" / "trainlint").rglob("*.py")):
        if file.is_relative_to(ROOT / "checks"):
            expected = f"trainlint/checks/{file.relative_to(ROOT / 'checks')}"
        else:
            expected = str(file.relative_to(ROOT / "src"))
        assert expected in inside, f"the wheel lacks {expected}"
    assert "trainlint/py.typed" in inside

    tables = []
    for what in ([built], ["--editable", copy]):
        pip(clean_python, *map(str, what))
        assert installed(clean_python, "--version").stdout == f"trainlint {built.name.split('-')[1]}\n"
        table = installed(clean_python, "rules", "--format", "json")
        assert table.returncode == 0, table.stderr
        tables.append(table.stdout)
        for code in map(code_of, CHECKS):
            assert f'"code": "{code}"' in table.stdout
    assert tables[0] == tables[1]
    torch = subprocess.run([clean_python, "-c", "import torch"], capture_output=True)
    assert torch.returncode != 0, "trainlint must not bring torch"
