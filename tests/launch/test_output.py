"""What the program prints is kept, bounded and made harmless."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch.programs import Run

from trainlint.launch.output import HEAD_BYTES, TAIL_LINES, plain


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b[?25l\x1b[2K50%\x1b[?25h", "50%"),
        ("\x1bPq#0;2;0\x1b\\after", "after"),
        ("\x9b31mred", "red"),
        ("abc\b\b\bxyz", "xyz"),
        ("bell\x07\x00", "bell"),
        ("a\tb", "a   b"),
        ("half an escape\x1b[", "half an escape"),
    ],
)
def test_escapes_are_taken_out(printed: str, shown: str) -> None:
    assert plain(printed) == shown


def test_invalid_utf8_and_progress_bars(run: Run) -> None:
    seen = run(r"""sys.stdout.buffer.write(b"caf\xc3\xa9 \xff\xfe\n10%\r20%\rlast"); sys.stdout.flush()""")
    assert seen.ending.last_output == ("café ��", "10%", "20%", "last")
    assert run.progress.lines[-1] == "last"


def test_megabytes_do_not_block_or_fill_the_disk(run: Run) -> None:
    log = run.run_folder.path / "output.log"
    size: list[int] = []
    close = run.run_folder.close
    run.run_folder.close = lambda: (size.append(log.stat().st_size), close())[1]  # type: ignore[method-assign]
    seen = run("for i in range(300000): print('line', i, 'x' * 40)\nprint('the end')")
    assert seen.ending.exit_code == 0
    assert seen.ending.last_output[-1] == "the end"
    assert size[0] < HEAD_BYTES + TAIL_LINES * 100 + 200_000


def test_one_line_of_megabytes(run: Run) -> None:
    seen = run("sys.stdout.write('y' * 5_000_000); sys.stdout.write('\\nend\\n')")
    assert seen.ending.last_output[-1] == "end"
    assert max(len(line) for line in seen.ending.last_output) <= 2000


def test_closed_stdout_is_no_end(run: Run) -> None:
    seen = run("print('before', flush=True); os.close(1); os.close(2); time.sleep(0.5); steps(3)")
    assert seen.ending.how == "steps"
    assert run.progress.lines == ["before"]


def test_secrets_of_config_and_environment_are_masked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    seen = run(
        """
        mark("armed")
        print("key", os.environ["WANDB_API_KEY"], "url https://me:hunter22@host/x")
        raise ValueError("bad token hf_abcdefghijklmnopqrstuvwx")
        """
    )
    text = repr(seen) + "\n".join(run.progress.lines)
    for secret in ("0123456789abcdef0123", "hunter22", "hf_abcdefghijklmnop"):
        assert secret not in text
    assert "***" in text
