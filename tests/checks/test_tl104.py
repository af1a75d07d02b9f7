"""TL104 setting-not-in-effect: each setting both ways, and correct programs that look odd."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainlint.checks.config.setting_not_in_effect import setting_not_in_effect as check

from tests.checks.judging import findings, only
from tests.support.build import Run, at, cosine, linear
from trainlint.contract import NotApplicable, NotObserved
from trainlint.recording.schema import (
    AutocastEntered,
    ConfigFacts,
    ConfigKey,
    ConfigRead,
    Framework,
    LossCall,
    MissingKey,
    NameMention,
    NameRead,
    Program,
    RateAssignment,
    SeedSet,
    SourceFacts,
    SourceLine,
    Value,
)

FILE = "/home/user/config.yaml"
ITEM = (ConfigRead("item", at(8)),)
STARS = (ConfigRead("bulk", at(30, file="/home/user/model.py"), "**"),)
NEVER: tuple[ConfigRead, ...] = ()
ADAM = {"weight_decay": 0, "betas": (0.9, 0.999), "eps": 1e-8}
DEFAULTS: dict[str, Value] = {"lr": 1e-3, **ADAM}
TRAIN_SET = {"weight": (4, 4)}


def key(meaning: str, value: Any, reads: tuple[ConfigRead, ...] | None = STARS, **fields: Any) -> ConfigKey:
    fields.setdefault("path", f"training.{meaning}")
    return ConfigKey(value=value, type="", at=SourceLine(FILE, 4), reads=reads, meaning=meaning, **fields)


def program(
    *keys: ConfigKey,
    lr: float = 3e-4,
    hyper: dict[str, Any] | None = None,
    steps: int = 3,
    micro: int = 1,
    schedule: Any = None,
    horizon: int = 40,
    **optimizer: Any,
) -> Run:
    """A plain loop with Adam, one read key beside those under test, and what the source says."""
    run = Run()
    net = run.module("Net", TRAIN_SET)
    optimizer.setdefault("signature_defaults", DEFAULTS)
    adam = run.optimizer("Adam", net, lr=lr, hyper=hyper or ADAM, **optimizer)
    if schedule is not None:
        run.scheduler(adam, schedule, horizon)
    run.loader(20, batch_size=8)
    for _ in range(steps):
        for _ in range(micro):
            run.batch().forward().loss().backward()
        run.step(adam)
        if schedule is not None:
            run.sched()
    read = ConfigKey("training.other", 1, "int", reads=ITEM)
    run.fields["config"] = ConfigFacts((FILE,), "yaml", (read, *keys), tracked_by="yaml.load in train.py")
    run.fields["source"] = SourceFacts(files=("/home/user/train.py",))
    return run


def severities(run: Run) -> list[str]:
    return [severity for severity, _ in findings(check, run)]


# ------------------------------------------------------------------------------------------- how much is proven


@pytest.mark.parametrize(
    ("reads", "severity"), [(NEVER, "error"), (STARS, "error"), (ITEM, "info"), (None, None), ((*STARS, *ITEM), "info")]
)
def test_a_decay_that_is_off(reads: tuple[ConfigRead, ...] | None, severity: str | None) -> None:
    assert severities(program(key("weight_decay", 1e-3, reads))) == ([severity] if severity else [])


@pytest.mark.parametrize(("reads", "severity"), [(NEVER, "error"), (STARS, "warning"), (ITEM, None)])
def test_a_decay_that_is_another(reads: tuple[ConfigRead, ...] | None, severity: str | None) -> None:
    run = program(key("weight_decay", 1e-3, reads), hyper={**ADAM, "weight_decay": 0.05})
    assert severities(run) == ([severity] if severity else [])


def test_what_is_said_of_a_decay() -> None:
    severity, finding = only(check, program(key("weight_decay", 1e-3)))
    assert severity == "error"
    assert finding.message == (
        "training.weight_decay = 0.001 (config.yaml:4) is not in effect: Adam runs with weight_decay = 0 "
        "(train.py:5; its default). The key is only taken in bulk (** at model.py:30) and handed to nothing that uses "
        "it."
    )
    assert finding.fix == "Pass weight_decay=0.001 to the optimizer where it is built, or remove the key."
    assert finding.evidence["observed"] == [0.0]


def test_a_key_never_read_in_a_section_whose_reads_are_not_seen_is_a_warning() -> None:
    run = program(key("weight_decay", 1e-3, NEVER, path="pydantic.weight_decay"))
    assert severities(run) == ["warning"]


def test_a_command_line_setting_that_was_not_followed_is_a_warning() -> None:
    run = program(key("weight_decay", 1e-3, None, origin="override"))
    _, finding = only(check, run)
    assert severities(run) == ["warning"]
    assert "How the program reads the key was not seen." in finding.message


@pytest.mark.parametrize(("key_", "severity"), [("schedule", "warning"), ("weight_decay", "info")])
def test_a_config_that_a_librarys_own_parser_read(key_: str, severity: str) -> None:
    """Lightning's CLI builds no scheduler of ``lr_scheduler:`` when ``optimizer:`` is missing."""
    asked = key(key_, "cosine" if key_ == "schedule" else 1e-3, None)
    run = program(asked)
    run.fields["config"] = ConfigFacts((FILE,), "yaml", (asked,), tracked_by="yaml.load in jsonargparse")
    assert severities(run) == [severity]
    beside = key("batch_size", 8, ITEM)
    run.fields["config"] = ConfigFacts((FILE,), "yaml", (asked, beside), tracked_by="yaml.load in jsonargparse")
    assert not severities(run), "others were followed and it was not: it may be another program's"


def test_defaults_of_the_program_and_secrets_are_not_declared_by_anyone() -> None:
    with pytest.raises(NotApplicable):
        findings(check, program(key("weight_decay", 1e-3, origin="default")))


def test_the_key_that_is_read_instead_is_named() -> None:
    other = key("accumulation", 1, ITEM, path="training.gradient_accumulation_steps")
    severity, finding = only(check, program(other, key("accumulation", 8, path="training.accumulate_grad_batches")))
    assert severity == "error"
    assert "What is read is training.gradient_accumulation_steps = 1 (config.yaml:4)." in finding.message


# ------------------------------------------------------------------------------------------- not its turn


def with_reads(run: Run, *reads: NameRead, name: str = "weight_decay") -> Run:
    """The program's own source could read a key of this name at these places."""
    mention = NameMention(name, ("/home/user/train.py",), reads=reads)
    run.fields["config"] = dataclasses.replace(run.fields["config"], mentions=(mention,))
    return run


@pytest.mark.parametrize("reads", [NEVER, STARS])
def test_a_line_that_was_not_run_and_could_read_the_key(reads: tuple[ConfigRead, ...]) -> None:
    severity, finding = only(check, with_reads(program(key("weight_decay", 1e-3, reads)), NameRead(at(90))))
    assert severity == "info"
    assert "in the watched steps. train.py:90 may read the key and was not run so far." in finding.message
    for section, severity in (("training", "info"), ("train_cfg", "info"), ("optimizer", "error")):
        run = program(key("weight_decay", 1e-3, reads))
        assert severities(with_reads(run, NameRead(at(90), section))) == [severity]


def test_a_line_that_was_run_without_reading_the_key_reads_it_never() -> None:
    assert severities(with_reads(program(key("weight_decay", 1e-3, NEVER)), NameRead(at(8)))) == ["error"]


def test_a_setting_that_another_key_switches_off() -> None:
    gated = NameRead(at(90), conditions=(8,))
    assert not severities(with_reads(program(key("schedule", "cosine", NEVER)), gated, name="schedule"))
    assert severities(with_reads(program(key("schedule", "cosine", NEVER)), gated, NameRead(at(91)), name="schedule"))
    unseen = NameRead(at(90), conditions=(7,))
    assert severities(with_reads(program(key("schedule", "cosine", NEVER)), unseen, name="schedule")) == ["info"]


def test_precision_behind_a_test_of_the_device() -> None:
    behind = NameRead(at(90), conditions=(90,))
    run = with_reads(program(key("precision", "bf16", NEVER)), behind, name="precision")
    assert not severities(run)
    run.fields["program"] = Program(device="cuda:0")
    assert severities(run) == ["info"]
    entered = program(key("precision", "bf16", NEVER))
    entered._emit(AutocastEntered, device="cpu", dtype="bfloat16", enabled=False)
    assert not severities(entered)
    assert severities(program(key("precision", "bf16", NEVER))) == ["error"]


def test_the_settings_of_the_other_optimizer() -> None:
    chosen = key("weight_decay", 0, STARS, path="optimizers.adamw.weight_decay")
    other = key("weight_decay", 1e-4, NEVER, path="optimizers.sgd.weight_decay")
    assert not severities(program(chosen, other))
    dump = (ConfigRead("bulk", at(12), "yaml.dump"),)
    dumped = [dataclasses.replace(k, reads=(*(k.reads or ()), *dump)) for k in (chosen, other)]
    assert not severities(program(*dumped)), "a dump of everything enters no section"
    built = dataclasses.replace(other, reads=(ConfigRead("bulk", at(31), "**"),))
    assert severities(program(chosen, built)) == ["error"], "its section was taken by itself"
    beside = ConfigKey("optimizers.sgd.nesterov", True, "bool", reads=ITEM)
    assert severities(program(chosen, other, beside)) == ["error"], "its section was entered"
    assert severities(program(other)) == ["warning"]


def test_the_settings_of_a_later_phase() -> None:
    later = key("weight_decay", 0.3, NEVER, path="finetune.weight_decay")
    run = program(later, ConfigKey("pretrain.lr", 0.01, "float", reads=ITEM))
    looked = MissingKey("pretrain.weight_decay", 0.0, at(8))
    run.fields["config"] = dataclasses.replace(run.fields["config"], missing=(looked,))
    assert not severities(run)


# ------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize(
    ("declared", "in_effect"),
    [
        (key("betas", (0.9, 0.95)), {"betas": (0.9, 0.95)}),
        (key("beta2", 0.95), {"betas": (0.9, 0.95)}),
        (key("eps", "1e-6"), {"eps": 1e-6}),
        (key("weight_decay", 0.1), {"weight_decay": 0.1}),
    ],
)
def test_hyperparameters(declared: ConfigKey, in_effect: dict[str, Any]) -> None:
    assert severities(program(declared)) == ["error"]
    assert not severities(program(declared, hyper={**ADAM, **in_effect}))


def test_settings_of_another_kind_of_optimizer_do_not_arise() -> None:
    sgd = program(key("betas", (0.9, 0.95), NEVER), key("eps", 1e-6, NEVER), hyper={"momentum": 0.9, "weight_decay": 0})
    assert not severities(sgd)
    assert not severities(program(key("momentum", 0.9, NEVER)))


def test_one_group_with_the_decay_is_enough() -> None:
    run = program(key("weight_decay", 0.1))
    group = run.optimizers[0].groups[0]
    split = (group, dataclasses.replace(group, index=1, hyperparameters={**group.hyperparameters, "weight_decay": 0.1}))
    run.optimizers[0] = dataclasses.replace(run.optimizers[0], groups=split)
    assert not severities(run)


def test_what_a_checkpoint_restored_is_compared_and_named() -> None:
    resumed = {"state_loaded": True, "state_loaded_from": "/home/user/runs/last.ckpt"}
    severity, finding = only(check, program(key("weight_decay", 1e-3), **resumed))
    assert severity == "error"
    assert "Adam runs with weight_decay = 0 (train.py:5; restored from last.ckpt)" in finding.message
    assert "the state that was loaded rules" in finding.message
    assert "after the state is loaded" in finding.fix
    assert not severities(program(key("weight_decay", 0.1), hyper={**ADAM, "weight_decay": 0.1}, **resumed))
    other = {**ADAM, "weight_decay": 0.05}
    assert severities(program(key("weight_decay", 0.1), hyper=other, **resumed)) == ["warning"]
    assert not severities(program(key("weight_decay", 0.1, ITEM), hyper=other, **resumed))
    assert "restored from a checkpoint" in only(check, program(key("weight_decay", 0.1), state_loaded=True))[1].message


def test_a_restored_rate() -> None:
    assert severities(program(key("learning_rate", 3.7e-5), lr=3e-4, state_loaded=True)) == ["warning"]
    assert not severities(program(key("learning_rate", 3e-4), lr=3e-4, state_loaded=True))
    later = program(key("learning_rate", 3.7e-5), lr=3e-4, state_loaded=True, schedule=cosine(40))
    assert not severities(later), "a schedule: the checkpoint holds some later point of it"


# ------------------------------------------------------------------------------------------- rate and schedule


def test_a_rate_left_at_its_default() -> None:
    severity, finding = only(check, program(key("learning_rate", "3e-5"), lr=1e-3))
    assert severity == "error"
    assert "Adam runs at 0.001 (train.py:5; its default)" in finding.message
    assert not severities(program(key("learning_rate", 1e-3, ITEM), lr=1e-3))
    assert severities(program(key("learning_rate", 3e-5, ITEM), lr=1e-3)) == ["warning"]


@pytest.mark.parametrize("factor", [8.0, 1 / 8, 8 / 256, 8**0.5])
def test_a_rate_scaled_by_a_size_of_the_run(factor: float) -> None:
    assert not severities(program(key("learning_rate", 1e-3 / 1.7), lr=factor * 1e-3 / 1.7))
    assert severities(program(key("learning_rate", 1e-3), lr=3.3e-3)) == ["warning"]
    assert not severities(program(key("learning_rate", 1e-3, ITEM), lr=3.3e-3)), "layer-wise, muP: the code's business"


def test_a_warm_up_is_compared_at_its_peak() -> None:
    run = program(key("learning_rate", 3e-4), key("warmup_steps", 5), key("schedule", "linear"), schedule=linear(5, 40))
    assert not severities(run)


def test_a_schedule_that_is_not_there() -> None:
    run = program(
        key("schedule", "cosine"), key("warmup_ratio", 0.1), key("min_lr_ratio", 0.5), key("min_lr", 1e-5), lr=3e-5
    )
    found = findings(check, run)
    assert [s for s, _ in found] == ["error"] * 4
    said = [f.message for _, f in found]
    assert (
        "the rate is constant at 3e-5 (3 steps seen; no scheduler was built and no source line assigns a rate)"
        in said[0]
    )
    assert "there is no warm-up, the rate is constant at 3e-5" in said[1]
    assert "the rate never falls, it is constant at 3e-5" in said[2]


@pytest.mark.parametrize("name", ["none", "constant", "constant_with_warmup", "", "ddpm", "euler"])
def test_schedules_that_ask_for_nothing_or_are_none(name: str) -> None:
    assert not severities(program(key("schedule", name)))


def test_a_schedule_by_hand_is_not_judged() -> None:
    run = program(key("schedule", "cosine"), key("warmup_steps", 9), key("learning_rate", 7e-4), key("min_lr", 1e-5))
    run.fields["source"] = SourceFacts(rate_assignments=(RateAssignment(at(9)),))
    assert not severities(run)
    moving = program(key("schedule", "cosine"), key("warmup_steps", 9), key("learning_rate", 7e-4))
    moving.events = [dataclasses.replace(e, rates=(1e-4 * (i + 1),)) if hasattr(e, "rates") else e
                     for i, e in enumerate(moving.events)]  # fmt: skip
    assert not severities(moving), "the rates move without any scheduler: something else sets them"


def test_a_plateau_or_an_unknown_schedule_is_not_called_constant() -> None:
    run = program(key("schedule", "plateau"), schedule=lambda n: 1.0)
    run.schedulers[0] = dataclasses.replace(run.schedulers[0], metric=True)
    assert not severities(run)
    unknown = program(key("schedule", "cosine"), key("warmup_steps", 4), schedule=lambda n: 1.0)
    unknown.schedulers[0] = dataclasses.replace(unknown.schedulers[0], curve=(), curve_missing="could not be copied")
    assert not severities(unknown)


def test_a_flat_schedule_is_constant() -> None:
    severity, finding = only(check, program(key("schedule", "cosine"), schedule=lambda n: 1.0))
    assert severity == "error"
    assert "the schedule of CosineAnnealingLR (train.py:6) is flat" in finding.message


def test_a_schedule_without_the_warm_up() -> None:
    severity, finding = only(check, program(key("warmup_ratio", 0.1), schedule=cosine(40)))
    assert severity == "error"
    assert "CosineAnnealingLR (train.py:6) starts at its highest rate, 0.0003" in finding.message
    assert not severities(program(key("warmup_steps", 1), schedule=cosine(40))), "one step cannot be told from none"


def test_the_minimum() -> None:
    falls = program(key("min_lr", 3e-5), schedule=cosine(40))
    severity, finding = only(check, falls)
    assert severity == "error"
    assert "CosineAnnealingLR (train.py:6) ends at 0" in finding.message
    kept = program(key("min_lr_ratio", 0.1), schedule=lambda n: 0.1 + 0.9 * cosine(40)(min(n, 40)))
    assert not severities(kept)
    cut = program(key("min_lr", 3e-5), schedule=cosine(40))
    cut.plan(optimizer_steps=20, source="x")
    assert not severities(cut), "the run ends before the schedule does"


# ------------------------------------------------------------------------------------------- the loop


def test_precision() -> None:
    severity, finding = only(check, program(key("precision", "bf16-mixed")))
    assert severity == "error"
    assert "runs in 32-bit (no autocast was entered, weights are float32)" in finding.message
    assert severities(program(key("bf16", True))) == ["error"]
    assert not severities(program(key("precision", "bf16-mixed", ITEM))), "a CPU may rightly switch it off"
    on_gpu = program(key("precision", "bf16-mixed", ITEM))
    on_gpu.fields["program"] = Program(device="cuda:0")
    assert severities(on_gpu) == ["warning"]


def test_precision_in_other_ways() -> None:
    with_autocast = program(key("precision", "bf16"))
    with_autocast._emit(AutocastEntered, device="cpu", dtype="bfloat16", enabled=True)
    in_the_loss = program(key("precision", "bf16"))
    in_the_loss._emit(LossCall, function="mse_loss", input_dtype="torch.bfloat16")
    pure = program(key("precision", "bf16-true"))
    pure.change([0], dtype="bfloat16")
    off = program(key("precision", "32-true"), key("fp16", False))
    for run in (with_autocast, in_the_loss, pure, off):
        assert not severities(run)


def test_lightning_says_what_its_trainer_has() -> None:
    run = program(key("precision", "bf16-mixed"), key("accumulation", 8))
    run.framework("lightning", precision="32-true", accumulate_grad_batches=1)
    found = [f for _, f in findings(check, run)]
    assert "the Trainer has precision = 32-true" in found[0].message
    assert found[0].fix == 'Pass precision="bf16-mixed" to the Trainer, or remove the key.'
    assert "follows 1 micro-batch; the Trainer has accumulate_grad_batches = 1" in found[1].message


def test_accumulation() -> None:
    severity, finding = only(check, program(key("accumulation", 8)))
    assert severity == "error"
    assert "every optimizer step follows 1 micro-batch" in finding.message
    assert not severities(program(key("accumulation", 4), micro=4))
    assert not severities(program(key("accumulation", 2), micro=4)), "two losses per micro-batch"
    assert not severities(program(key("accumulation", 1), micro=4))
    ranks = program(key("accumulation", 8), micro=2)
    ranks.fields["program"] = Program(world_size=4)
    assert not severities(ranks)


def test_clipping() -> None:
    severity, finding = only(check, program(key("clip_norm", 1.0)))
    assert severity == "error"
    assert "no gradient is clipped" in finding.message
    assert severities(program(key("clip_norm", 1.0, ITEM))) == ["info"], "code of one's own may clip"
    assert not severities(program(key("clip_norm", 0)))
    clipped = program(key("clip_norm", 1.0))
    clipped.clip(1.0)
    assert not severities(clipped)
    other = program(key("clip_norm", 1.0))
    other.clip(5.0)
    other.clip(float("inf"))
    assert severities(other) == ["warning"]
    by_value = program(key("clip_norm", 0.5))
    by_value.clip(0.5, method="value")
    assert not severities(by_value), "gradient_clip_algorithm: value"
    sharded = program(key("clip_norm", 1.0))
    sharded.roots[0] = dataclasses.replace(sharded.roots[0], wrappers=("FullyShardedDataParallel",))
    assert not severities(sharded), "it clips by a method of its own"


def test_batch_size() -> None:
    assert not severities(program(key("batch_size", 8)))
    assert not severities(program(key("batch_size", 16))), "twice what the loader has: may be per two ranks"
    assert severities(program(key("batch_size", 16, NEVER))) == ["error"]
    assert severities(program(key("batch_size", 7))) == ["warning"]
    assert not severities(program(key("batch_size", 7, ITEM)))
    assert not severities(program(key("batch_size", 32, NEVER), micro=4)), "8 in 4 micro-batches"


def test_length() -> None:
    run = program(key("max_steps", 100))
    run.framework("lightning", max_steps=-1, max_epochs=3)
    assert severities(run) == ["error"]
    run = program(key("epochs", 5))
    run.framework("lightning", max_steps=-1, max_epochs=3)
    assert severities(run) == ["warning"]
    run = program(key("epochs", 5), key("max_steps", 100))
    run.framework("lightning", max_steps=100, max_epochs=-1)
    assert not severities(run)
    assert not severities(program(key("max_steps", 100, NEVER))), "a plain loop's length cannot be seen"


def test_seed() -> None:
    assert severities(program(key("seed", 7, NEVER))) == ["error"]
    assert not severities(program(key("seed", 7, ITEM))), "may be used by a generator later"
    for seed in (7, 7 + 3):
        run = program(key("seed", 7, NEVER))
        run._emit(SeedSet, function="manual_seed", seed=seed)
        assert not severities(run), "ranks add their number"


# ------------------------------------------------------------------------------------------- nothing to say


def test_when_nothing_can_be_said() -> None:
    with pytest.raises(NotApplicable):
        findings(check, program())
    with pytest.raises(NotObserved):
        findings(check, program(key("weight_decay", 0.1), steps=0))


MEANINGS = (
    "learning_rate weight_decay betas beta1 beta2 eps momentum schedule warmup_steps warmup_epochs warmup_ratio min_lr "
    "min_lr_ratio precision bf16 fp16 accumulation clip_norm clip_value batch_size max_steps epochs seed"
).split()
values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=6),
    st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    st.sampled_from(["1e-4", "cosine", "bf16", "16-mixed"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_of_any_setting_is_judged_or_left(data: st.DataObject) -> None:
    keys = [
        key(m, data.draw(values), data.draw(st.sampled_from([None, NEVER, STARS, ITEM])))
        for m in data.draw(st.lists(st.sampled_from(MEANINGS), min_size=1, max_size=4, unique=True))
    ]
    run = program(*keys, schedule=data.draw(st.sampled_from([None, cosine(40), linear(5, 40)])))
    recording = run.recording()
    empty = data.draw(
        st.sets(st.sampled_from(["roots", "parameters", "schedulers", "loaders", "optimizers", "events"]))
    )
    recording = dataclasses.replace(recording, **dict.fromkeys(empty, ()), source=None)
    try:
        found = list(check(recording))
    except (NotApplicable, NotObserved):
        return
    assert all(f.message and f.fix and f.at is not None for f in found)
    assert found == list(check(recording))


def test_frameworks_are_spoken_to_in_their_own_words() -> None:
    for name, word in (("transformers", "TrainingArguments"), ("accelerate", "Accelerator"), ("lightning", "Trainer")):
        run = program(key("accumulation", 8), key("precision", "bf16"))
        run.fields["frameworks"] = (Framework(name),)
        assert all(word in f.fix for _, f in findings(check, run)), name
