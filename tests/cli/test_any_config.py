"""Any file as config: exit 0, 1 or 2, never a traceback, and the same answer twice."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainlint import cli

KEYS = st.sampled_from(
    ["lr", "optimizer", "training", "weight_decay", "betas", "a.b", "", "_target_", "x[0]"]
) | st.text(max_size=8)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from(["${a.b}", "1e-4", "???", "[bold]", "\x1b[31m", "no", "12:30:45", "!!python/object:os.system"])
)
CONFIGS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers() | st.booleans(), inner, max_size=4)
    ),
    max_leaves=12,
)


def judged(name: str, content: bytes, *arguments: str) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.execute(["check", "--static", "--format", "json", str(path), *arguments])
        return code, out.getvalue().replace(folder, "FOLDER"), err.getvalue()


def assert_answered(code: int, out: str, err: str) -> None:
    assert code in (0, 1, 2)
    assert "internal error" not in err
    assert "Traceback" not in out + err
    if out:
        assert json.loads(out)["exit_code"] == code


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS)
def test_any_tree(tree: object) -> None:
    content = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    first = judged("config.yaml", content)
    assert_answered(*first)
    assert judged("config.yaml", content) == first


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["c.yaml", "c.json", "c.toml", "c"]))
def test_any_bytes(content: bytes, name: str) -> None:
    assert_answered(*judged(name, content))


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_any_setting(text: str) -> None:
    assert_answered(*judged("config.yaml", b"a:\n  b: 1\nc: [1, 2]\n", text))
    assert_answered(*judged("config.yaml", b"a:\n  b: 1\nc: [1, 2]\n", f"a.b={text}"))
    assert_answered(*judged("config.yaml", b"a:\n  b: 1\nc: [1, 2]\n", f"{text}=1"))
