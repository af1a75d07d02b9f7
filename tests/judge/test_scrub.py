"""Nothing that looks like a credential, and no terminal control, leaves in a report."""

from __future__ import annotations

import dataclasses

import pytest
from catalogs import one, yields
from hypothesis import given
from hypothesis import strategies as st
from timelines import loop

from trainlint.contract import Finding
from trainlint.judge import JudgeOptions, judge
from trainlint.judge.scrub import clean, clean_command, clean_text
from trainlint.recording.schema import Ending, Prevented, Program

SECRET = "sk-proj-abcdefghijklmnop123456"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgres://user:hunter22@db/x", "hunter22"),
        ("https://ghp_abcdefghijklmnopqrst@github.com/a", "ghp_abc"),
        (f"key {SECRET}.", SECRET),
        ("hf_abcdefghijklmnopqrstu", "hf_abcdef"),
        ("AKIAABCDEFGHIJKLMNOP", "AKIAABCD"),
        ("train.py --api-key hunter22 --lr 1", "hunter22"),
        ("train.py --api-key=hunter22", "hunter22"),
        ("train.py --token hunter22", "hunter22"),
        ("WANDB_API_KEY=hunter22 python", "hunter22"),
        ('{"password": "hunter22"}', "hunter22"),
        ("hf_token: hunter22", "hunter22"),
        ("wandb.api_key=hunter22", "hunter22"),
        ("Authorization: Bearer abcdefghijkl123", "abcdefghijkl123"),
        ("https://host/x?access_token=hunter22&b=1", "hunter22"),
        ("-----BEGIN PRIVATE KEY-----\nMIIhunter22\n-----END PRIVATE KEY-----", "hunter22"),
    ],
)
def test_credentials_are_masked(text: str, hidden: str) -> None:
    cleaned = clean_text(text)
    assert hidden not in cleaned
    assert "***" in cleaned
    assert clean_text(cleaned) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=512 and pad_token_id: 0, eos_token='</s>'",
        "token embeddings: 14 tensors",
        "the token count: 3",
        "password authentication failed",
        "api_key: null",
        "secret=None",
        "see https://pytorch.org/docs/stable/optim.html",
        "model.token_embedding.weight",
        "user@host: train.py:31",
        "the loss is 1.3 (mean)\n\tat step 2",
        "hf_dataset and sk-learn",
        "num_tokens 4096, tokenizer: gpt2",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert clean_text(text) == text


def test_the_value_after_a_flag_is_masked_in_a_command() -> None:
    command = ("python", "t.py", "--api-key", "hunter22", "--max-tokens", "512", "--token", "--lr", "1")
    assert clean_command(command) == (
        *("python", "t.py", "--api-key", "***", "--max-tokens", "512", "--token", "--lr", "1"),
    )


def test_terminal_control_is_stripped() -> None:
    assert clean_text("\x1b[31mred\x1b[0m \x1b]0;title\x07x\x1b]8;;http://a\x1b\\y\x9b1mz\r\x00\u202e!") == "red xyz!"
    assert clean_text("a\tb\nc é 漢") == "a\tb\nc é 漢"


@given(st.text())
def test_cleaning_is_done_after_once(text: str) -> None:
    cleaned = clean_text(text)
    assert "\x1b" not in cleaned
    assert clean_text(cleaned) == cleaned


def test_every_string_of_a_report_is_cleaned() -> None:
    finding = Finding(
        f"uses {SECRET}", evidence={"nested": [{"a": (SECRET, 1)}], SECRET: 1}, fix=f"do not pass {SECRET}", about="x"
    )
    run = dataclasses.replace(
        loop(lambda n: 1e-3),
        ending=Ending("exit", exit_code=1, error=f"E: {SECRET}", last_output=(f"\x1b[1mlogin {SECRET}",)),
        program=Program(command=("python", "--api-key", "hunter22", SECRET), steps_wanted=9),
        prevented=(Prevented("upload", f"https://u:{SECRET}@host/", SECRET),),
    )
    report = judge(run, None, None, JudgeOptions(catalog=one(yields(finding)), route=f"with {SECRET}"))
    assert SECRET not in repr(report)
    assert "hunter22" not in repr(report)
    assert "\\x1b" not in repr(report)
    assert clean(report) == report
