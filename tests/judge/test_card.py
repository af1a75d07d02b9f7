"""The run card shows what was observed beside what is configured, and claims no difference it did not see."""

from __future__ import annotations

import dataclasses
import math

import pytest
from catalogs import one, yields
from timelines import cosine, loop, scheduler, warm_cosine

from trainlint.judge import JudgeOptions, judge
from trainlint.recording.schema import (
    AutocastEntered,
    Clip,
    ConfigFacts,
    ConfigKey,
    Ending,
    Event,
    Framework,
    Loader,
    Logged,
    LossCall,
    Optimizer,
    Parameter,
    ParamGroup,
    Plan,
    Program,
    Recording,
    RootModule,
    SeedSet,
    SourceFacts,
    SourceLine,
    StateLoaded,
    Value,
)
from trainlint.report.model import CardLine, RunCard

RATE = 3e-4


def run(*events: Event, hyper: dict[str, Value] | None = None, **fields) -> Recording:
    """A loop of three steps at a constant rate, and these events before it."""
    made = loop(lambda n: RATE, **{k: fields.pop(k) for k in ("plan", "loaders", "accumulation") if k in fields})
    group = {"lr": RATE, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, **(hyper or {})}
    defaults = {
        "ending": Ending("steps"),
        "program": Program(command=("python", "train.py"), device="cpu", torch="2.13.0"),
        "roots": (RootModule(0, "Net", n_parameters=12, n_trainable=8, wrappers=("DistributedDataParallel",)),),
        "parameters": (
            Parameter(1, "body.weight", (2, 2), "torch.float32", "cpu", False, root=0),
            Parameter(2, "head.weight", (2, 4), "torch.float32", "cpu", True, root=0),
        ),
        "optimizers": (
            Optimizer(0, "AdamW", at=SourceLine("train.py", 9), groups=(ParamGroup(0, (1, 2), group),), steps=3),
        ),
        "source": SourceFacts(),
        "events": (*events, *made.events),
    }
    return dataclasses.replace(made, **{**defaults, **fields})


def config(**values: Value) -> ConfigFacts:
    return ConfigFacts(
        keys=tuple(ConfigKey(f"training.{name}", v, type(v).__name__, meaning=name) for name, v in values.items())
    )


def card(recording: Recording | None, facts: ConfigFacts | None = None, **options) -> RunCard:
    return judge(recording, facts, None, JudgeOptions(catalog=one(yields()), **options)).card


def line(recording: Recording, section: str, label: str | None = None, **asked: Value) -> CardLine:
    lines = card(recording, config(**asked)).sections[section]
    return next(x for x in lines if label is None or x.label == label)


def test_every_section_has_a_word() -> None:
    got = card(run(plan=Plan(100, source="x")), route="the command after --")
    assert set(got.sections) == {
        *("launch", "device", "model", "optimizers", "schedule", "length", "accumulation", "clipping"),
        *("precision", "loss", "resume", "logging"),
    }
    assert set(got.data) >= {*got.sections, "command", "batches"}
    assert got.sections["launch"][0].observed == "the command after --"
    assert got.data["command"] == ["python", "train.py"]


def test_without_a_run_only_the_launch_is_told() -> None:
    assert card(None, route="--static").sections["launch"][0].observed == "--static"
    assert set(card(Recording()).sections) == set()


def test_the_model() -> None:
    text = line(run(), "model").observed
    assert text == "Net in DistributedDataParallel: 12 parameters, 67% trainable (8), torch.float32"


@pytest.mark.parametrize(
    ("label", "asked", "agrees"),
    [
        ("learning rate", {"learning_rate": RATE}, True),
        ("learning rate", {"learning_rate": "3e-4"}, True),
        ("learning rate", {"learning_rate": 1e-3}, False),
        ("weight decay", {"weight_decay": 0.01}, True),
        ("weight decay", {"weight_decay": 0.1}, False),
        ("betas", {"betas": (0.9, 0.95)}, True),
        ("betas", {"beta2": 0.95}, True),
        ("betas", {"beta2": 0.999}, False),
        ("eps", {"eps": 1e-8}, True),
        ("optimizer", {"optimizer": "adamw_torch_fused"}, True),
        ("optimizer", {"optimizer": "torch.optim.AdamW"}, True),
        ("optimizer", {"optimizer": "sgd"}, False),
        ("optimizer", {"optimizer": "my_own"}, None),
        ("learning rate", {}, None),
    ],
)
def test_hyperparameters(label: str, asked: dict[str, Value], agrees: bool | None) -> None:
    got = line(run(), "optimizers", label, **asked)
    assert got.agrees is agrees
    assert bool(got.configured) is bool(asked)


def test_keys_that_contradict_each_other_are_compared_with_nothing() -> None:
    facts = ConfigFacts(
        keys=(
            ConfigKey("a.lr", 1.0, "float", meaning="learning_rate"),
            ConfigKey("b.lr", 2.0, "float", meaning="learning_rate"),
        )
    )
    lines = card(run(), facts).sections["optimizers"]
    assert all(x.agrees is None for x in lines)


def test_several_optimizers_are_not_held_against_one_key() -> None:
    two = run(
        optimizers=(
            Optimizer(0, "Adam", groups=(ParamGroup(0, (), {"lr": 1.0}),), steps=3),
            Optimizer(1, "Adam", groups=(ParamGroup(0, (), {"lr": 2.0}),), steps=3),
        )
    )
    lines = card(two, config(learning_rate=9.0, accumulation=4)).sections
    assert all(x.agrees is None for name in ("optimizers", "accumulation") for x in lines[name])


def test_many_groups_are_summed_up() -> None:
    groups = tuple(ParamGroup(i, (), {"lr": RATE, "weight_decay": 0.1 * (i % 2)}) for i in range(40))
    many = run(optimizers=(Optimizer(0, "AdamW", groups=groups, steps=3),))
    assert line(many, "optimizers", "weight decay").observed == "0 (20 groups); 0.1 (20 groups)"


def test_a_schedule_that_is_asked_for_and_missing() -> None:
    got = line(run(), "schedule", schedule="cosine")
    assert (got.observed, got.configured, got.agrees) == ("none: the rate is constant", "cosine", False)
    assert line(run(), "schedule", schedule="constant").agrees is True
    # Without the source, a rate that is set by hand later is not excluded.
    assert line(run(source=None), "schedule", schedule="cosine").agrees is None


def test_warm_up_and_final_rate_are_read_off_the_curve() -> None:
    rate = warm_cosine(RATE, 10, 100)
    warm = dataclasses.replace(
        loop(rate, schedulers=[scheduler(rate, 100, class_name="LambdaLR")], plan=Plan(100, source="max_steps")),
        ending=Ending("steps"),
    )
    asked = config(warmup_steps=10, min_lr=0.0, learning_rate=RATE)
    lines = {x.label: x for name in ("optimizers", "schedule") for x in card(warm, asked).sections[name]}
    assert (lines["warm-up"].observed, lines["warm-up"].agrees) == ("10 optimizer steps", True)
    assert lines["final rate"].agrees is True
    # The first rate is 0; the configured one is the peak.
    assert lines["learning rate"].agrees is True
    data = card(warm, asked).data["schedule"][0]
    assert data["warmup_steps"] == 10
    assert data["peak_rates"] == [pytest.approx(RATE)]
    wrong = {x.label: x for x in card(warm, config(warmup_ratio=0.5)).sections["schedule"]}
    assert wrong["warm-up"].agrees is False


def test_a_schedule_that_ends_early_says_so() -> None:
    rate = cosine(RATE, 1000)
    early = loop(
        rate, accumulation=8, call_when=lambda m, s: 1, schedulers=[scheduler(rate, 1000)], plan=Plan(1000, source="x")
    )
    text = next(x for x in card(early).sections["schedule"] if x.label == "final rate").observed
    assert "run its course at step 126" in text


def test_curves_are_shared_by_groups_that_agree() -> None:
    rate = cosine(RATE, 100)
    points = tuple(
        dataclasses.replace(p, rates=(p.rates[0], p.rates[0], p.rates[0] / 10)) for p in scheduler(rate, 100).curve
    )
    made = loop(rate, schedulers=[scheduler(rate, 100, curve=points)], plan=Plan(100, source="x"))
    events = tuple(
        dataclasses.replace(e, rates=(e.rates[0], e.rates[0], e.rates[0] / 10)) if e.kind == "step" else e
        for e in made.events
    )
    groups = tuple(ParamGroup(i, (), {"lr": RATE}) for i in range(3))
    three = dataclasses.replace(made, events=events, optimizers=(Optimizer(0, "AdamW", groups=groups, steps=3),))
    found = card(three).curves
    assert [(c.label, c.kind) for c in found] == [
        ("groups 0, 1", "observed"),
        ("groups 0, 1", "projected"),
        ("group 2", "observed"),
        ("group 2", "projected"),
    ]
    assert found[1].points[0] == (1, RATE)


@pytest.mark.parametrize(
    ("asked", "size", "agrees"), [(8, 8, True), (32, 8, True), (16, 8, False), (16, None, None), (None, 8, None)]
)
def test_batch_size(asked: int | None, size: int | None, agrees: bool | None) -> None:
    loader = Loader(0, batch_size=size, batches=50, training=True, shuffle=True, workers=2)
    with_loader = run(loaders=[loader], plan=Plan(accumulation=4))
    got = line(with_loader, "batches", **({"batch_size": asked} if asked else {}))
    assert got.agrees is agrees
    assert "50 batches, shuffled, 2 workers" in got.observed


@pytest.mark.parametrize(("asked", "seen", "agrees"), [(4, 4, True), (8, 4, False), (2, 4, None), (1, 1, True)])
def test_accumulation(asked: int, seen: int, agrees: bool | None) -> None:
    assert line(run(accumulation=seen), "accumulation", accumulation=asked).agrees is agrees


def test_accumulation_as_the_framework_has_it() -> None:
    driven = run(frameworks=(Framework("lightning", settings={"accumulate_grad_batches": 1}),))
    assert line(driven, "accumulation", accumulation=8).agrees is False


@pytest.mark.parametrize(
    ("clips", "asked", "agrees"),
    [
        ([Clip(0, 0.0, "norm", 1.0, total_norm=3.0)], {"clip_norm": 1.0}, True),
        ([Clip(0, 0.0, "norm", 1.0)], {"clip_norm": 0.5}, False),
        ([Clip(0, 0.0, "norm", math.inf)], {"clip_norm": 0.0}, True),
        ([Clip(0, 0.0, "value", 1.0)], {"clip_value": 1.0}, True),
        ([], {"clip_norm": 1.0}, False),
        ([], {"clip_norm": 0.0}, None),
        ([], {}, None),
    ],
)
def test_clipping(clips: list[Event], asked: dict[str, Value], agrees: bool | None) -> None:
    assert line(run(*clips), "clipping", **asked).agrees is agrees


BF16 = AutocastEntered(0, 0.0, "cpu", "torch.bfloat16", True)


@pytest.mark.parametrize(
    ("events", "asked", "agrees"),
    [
        ([BF16], {"precision": "bf16-mixed"}, True),
        ([], {"precision": "bf16-mixed"}, False),
        ([BF16], {"precision": "32"}, False),
        ([], {"precision": "32-true"}, True),
        ([BF16], {"bf16": True}, True),
        ([], {"bf16": False}, None),
        ([], {"precision": "bf16-true"}, False),
    ],
)
def test_precision(events: list[Event], asked: dict[str, Value], agrees: bool | None) -> None:
    assert line(run(*events), "precision", **asked).agrees is agrees


def test_the_rest_of_the_card() -> None:
    full = run(
        LossCall(0, 0.0, "cross_entropy", "mean", input_dtype="torch.float32", at=SourceLine("train.py", 5)),
        StateLoaded(0, 0.0, "optimizer", class_name="AdamW", path="last.ckpt"),
        StateLoaded(0, 0.0, "optimizer", class_name="AdamW", empty=True),
        Logged(0, 0.0, "train/loss", 1.0, by="csv"),
        Logged(0, 0.0, "train/lr", RATE, by="csv"),
        SeedSet(0, 0.0, "torch.manual_seed", 42),
        plan=Plan(100, epochs=2, batches_per_epoch=50, source="Trainer"),
    )
    sections = card(full, config(max_steps=50, epochs=2, seed=42, log_lr=True)).sections
    assert "cross_entropy, mean, fp32" in sections["loss"][0].observed
    assert sections["resume"][0].observed.startswith("optimizer state: AdamW from")
    assert len(sections["resume"]) == 1
    assert "learning rate as train/lr" in sections["logging"][0].observed
    assert sections["logging"][0].agrees is True
    assert [x.agrees for x in sections["length"]] == [False, None]
    assert [(x.label, x.agrees) for x in sections["batches"]] == [("seed", True)]


def test_a_length_told_by_the_config_alone_is_told_with_its_reason() -> None:
    keys = (ConfigKey("epochs", 14, "int", origin="default", meaning="epochs"),)
    told = run(loaders=[Loader(0, batch_size=8, batches=47, training=True)], config=ConfigFacts(keys=keys))
    lines = card(told).sections["length"]
    assert lines[0].observed == "658 optimizer steps"
    assert "epochs" in lines[0].note
    assert "47" in lines[0].note
