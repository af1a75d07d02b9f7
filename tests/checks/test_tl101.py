"""TL101 unused-config-key."""

from __future__ import annotations

from typing import Any

import pytest
from trainlint.checks.config.unused_config_key import unused_config_key as check

from tests.checks.judging import findings, only
from tests.support.build import Run, at
from trainlint.contract import Finding, NotApplicable, NotObserved
from trainlint.recording.schema import (
    ConfigFacts,
    ConfigKey,
    ConfigRead,
    MissingKey,
    NameMention,
    Program,
    SourceLine,
)

FILE = "/home/user/config.yaml"
ITEM = (ConfigRead("item", at(8)),)
STARS = (ConfigRead("bulk", at(30, file="/home/user/model.py"), "**"),)
DUMP = (ConfigRead("bulk", at(12), "OmegaConf.to_yaml"),)


def key(
    path: str, reads: tuple[ConfigRead, ...] | None = (), value: Any = 3, line: int = 4, **fields: Any
) -> ConfigKey:
    return ConfigKey(path, value, type(value).__name__, SourceLine(FILE, line), reads=reads, **fields)


def nowhere(*names: str) -> tuple[NameMention, ...]:
    return tuple(NameMention(n, (), access=False, own=False) for n in names)


def run_with(
    *keys: ConfigKey, mentions: tuple[NameMention, ...] | None = (), stepped: bool = True, **facts: Any
) -> Run:
    run = Run()
    adam = run.optimizer("AdamW", run.module("Net", {"weight": (2, 2)}))
    if stepped:
        run.backward().step(adam)
    facts.setdefault("tracked_by", "yaml.load in train.py")
    run.fields["config"] = ConfigFacts((FILE,), "yaml", keys, mentions=mentions, **facts)
    run.fields["program"] = Program(sources=("/home/user/train.py", "/home/user/model.py"))
    return run


def test_a_key_that_nothing_ever_reads() -> None:
    run = run_with(
        key("training.steps", ITEM), key("training.loss_fn", value="mse", line=7), mentions=nowhere("loss_fn")
    )
    severity, finding = only(check, run)
    assert severity == "warning"
    assert finding.message == (
        "Nothing reads training.loss_fn = mse (config.yaml:7). It was never read in the watched steps, and its name "
        "stands nowhere in code that could run later."
    )
    assert finding.evidence["keys"][0]["line"] == 7


def test_keys_only_passed_along() -> None:
    run = run_with(
        key("training.steps", ITEM),
        key("training.warmup", (*STARS, *DUMP)),
        key("training.foo", STARS),
        mentions=nowhere("warmup", "foo"),
    )
    severity, finding = only(check, run)
    assert severity == "warning"
    assert "training.warmup = 3 (config.yaml:4), training.foo = 3" in finding.message
    assert "only taken in bulk (** at model.py:30, OmegaConf.to_yaml at train.py:12)" in finding.message
    assert "none of the 2 loaded source files mentions their names" in finding.message


def test_a_near_miss_is_named() -> None:
    run = run_with(
        key("training.warmup_stpes"),
        key("training.steps", ITEM),
        mentions=nowhere("warmup_stpes"),
        missing=(MissingKey("training.warmup_steps", 0, at(21)), MissingKey("other.warmup_stpes", 1, at(22))),
    )
    _, finding = only(check, run)
    assert (
        "The program looked for training.warmup_steps (train.py:21), did not find it and went on with 0."
        in finding.message
    )


def test_sections_stay_apart_and_long_ones_are_split() -> None:
    keys = [key(f"a.k{i}") for i in range(10)] + [key("b.k0"), key("top")]
    run = run_with(*keys, key("a.x", ITEM), mentions=nowhere("top", *(f"k{i}" for i in range(10))))
    found = [f for _, f in findings(check, run)]
    assert [len(f.evidence["keys"]) for f in found] == [8, 2, 1, 1]
    assert len({f.about for f in found}) == 4


def test_keys_of_an_installed_packages_own_files_are_info() -> None:
    shipped = ConfigKey("a.b", 1, "int", SourceLine("/v/lib/python3.11/site-packages/app/c.yaml", 3), reads=DUMP)
    severity, finding = only(check, run_with(key("a.c", ITEM), shipped, mentions=nowhere("b")))
    assert severity == "info"
    assert "come with the installed package" in finding.message


def silent(*keys: ConfigKey, mentions: tuple[NameMention, ...]) -> list[Finding]:
    return [f for _, f in findings(check, run_with(*keys, mentions=mentions))]


@pytest.mark.parametrize(
    ("unread", "mentions"),
    [
        # Read one by one, or in a form that code which has not run yet could use.
        (key("a.b", ITEM), ()),
        (key("a.b"), (NameMention("b", ("/home/user/eval.py",)),)),
        # Passed along, and some library knows the word.
        (key("a.b", STARS), (NameMention("b", ("/v/site-packages/torch/a.py",), access=False, own=False),)),
        # Speaks of what comes after the watch, whose code may be imported later.
        (key("eval.metric_kind"), nowhere("metric_kind")),
        (key("training.save_every_n"), nowhere("save_every_n")),
        (key("a.early_stopping.delta"), nowhere("delta")),
        # Nothing is set, or nobody set it.
        (key("a.b", value=None), nowhere("b")),
        (key("a.b", value=()), nowhere("b")),
        (key("a.b", origin="default"), nowhere("b")),
        # The framework's own words, and settings that are held against the run instead.
        (key("opt._target_", value="x.Y"), nowhere("_target_")),
        (key("hydra.run.dir", value="."), nowhere("dir")),
        (key("training.weight_decay", meaning="weight_decay"), nowhere("weight_decay")),
        # Not followed.
        (key("a.b", None), nowhere("b")),
    ],
)
def test_silent_about(unread: ConfigKey, mentions: tuple[NameMention, ...]) -> None:
    assert not silent(key("a.read", ITEM), key("opt.read", ITEM), unread, mentions=mentions)


def test_a_librarys_word_is_no_use_where_the_key_stayed_in_the_program() -> None:
    library = (NameMention("b", ("/v/site-packages/torch/a.py",), own=False),)
    kept = (ConfigRead("bulk", at(30), "**", kept=True), *DUMP)
    found = silent(key("a.b", kept), key("a.c", ITEM), mentions=library)
    assert [f.about for f in found] == ["a.b"]
    assert "nothing in the program's own source reads its name from it" in found[0].message
    assert not silent(key("a.b", (*kept, *STARS)), key("a.c", ITEM), mentions=library), "another ** may go to a library"
    assert not silent(key("a.b", DUMP), key("a.c", ITEM), mentions=library)
    assert not silent(key("a.b", kept), key("a.c", ITEM), mentions=(NameMention("b", ("/home/user/model.py",)),))


def test_a_section_that_nobody_read_key_by_key_may_have_gone_to_compiled_code() -> None:
    keyword = (NameMention("b", ("/home/user/settings.py",), access=False),)
    assert not silent(key("a.b"), key("a.c"), key("z.q", ITEM), mentions=(*keyword, *nowhere("c")))[1:]
    only_named = silent(key("a.b"), key("a.c", ITEM), mentions=keyword)
    assert [f.about for f in only_named] == ["a.b"], "its sibling was read one by one, so its own read would be seen"


def test_names_that_are_data() -> None:
    loop = (ConfigRead("bulk", at(50), "items()"),)
    everywhere = (ConfigRead("bulk", at(60), "items()"),)
    names = nowhere("cat", "dog", "x")
    weights = key("a.weights.cat", loop), key("a.weights.dog", loop), key("a.steps", ITEM)
    assert not silent(*weights, mentions=names), "the program goes through this section"
    copied = key("a.weights.cat", STARS), key("a.weights.dog", STARS), key("a.steps", ITEM)
    assert not silent(*copied, mentions=names), "no name in it is known"
    converted = key("a.x", everywhere), key("a.steps", ITEM), key("b.y", everywhere)
    assert [f.about for f in silent(*converted, mentions=(*names, NameMention("y", ("m.py",))))] == ["a.x"]


def test_when_nothing_can_be_said() -> None:
    with pytest.raises(NotApplicable):
        findings(check, run_with())
    with pytest.raises(NotObserved, match="not recognised"):
        findings(check, run_with(key("a", None), tracked_by=""))
    with pytest.raises(NotObserved, match="own parser"):
        findings(check, run_with(key("a", None), tracked_by="yaml.load in jsonargparse"))
    with pytest.raises(NotObserved, match="before its first optimizer step"):
        findings(check, run_with(key("a"), mentions=nowhere("a"), stepped=False))
    with pytest.raises(NotObserved, match="source files"):
        findings(check, run_with(key("a"), mentions=None))
    assert findings(check, run_with(key("a", ITEM), mentions=None)) == []
