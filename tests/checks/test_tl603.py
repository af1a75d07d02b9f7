"""TL603 over recordings built by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from judging import findings, only
from trainlint.checks.finetuning.partial_weight_load import partial_weight_load

from tests.support.build import Run, at
from trainlint.contract import NotApplicable
from trainlint.recording.schema import NamedShape, Provenance, ShapeMismatch, WeightLoad

Shapes = Mapping[str, tuple[int, ...]]
BODY = {f"body.{i}.{n}": s for i in range(4) for n, s in {"weight": (32, 32), "bias": (32,)}.items()}
HEAD = {"head.weight": (5, 32), "head.bias": (5,)}
NET = {**BODY, **HEAD}


def weights(shapes: Shapes) -> int:
    return sum(math.prod(s) for s in shapes.values())


def load(
    fresh: Shapes,
    left: Shapes,
    *,
    model: Shapes = NET,
    file: Shapes = NET,
    mismatched: Sequence[str] = (),
    **fields: Any,
) -> WeightLoad:
    """A load into ``Net``: ``fresh`` of the model is from no file, ``left`` of the file arrived nowhere."""
    return WeightLoad(
        **{
            "path": "/data/pretrained.pt",
            "at": at(7),
            "root": 0,
            "class_name": "Net",
            "strict": False,
            "file_tensors": len(file),
            "file_weights": weights(file),
            "arrived_tensors": len(file) - len(left),
            "arrived_weights": weights(file) - weights(left),
            "model_tensors": len(model),
            "model_weights": weights(model),
            "matched_tensors": len(model) - len(fresh),
            "matched_weights": weights(model) - weights(fresh),
            "fresh_tensors": len(fresh),
            "fresh_weights": weights(fresh),
            "fresh": tuple(NamedShape(n, s) for n, s in fresh.items()),
            "left": tuple(NamedShape(n, s) for n, s in left.items()),
            "left_tensors": len(left),
            "left_weights": weights(left),
            "mismatched": tuple(ShapeMismatch(n, fresh[n], n, left[n]) for n in mismatched),
            **fields,
        }
    )


def judged(*loads: WeightLoad) -> list[tuple[str, str]]:
    return [
        (s, str(f.evidence["kind"])) for s, f in findings(partial_weight_load, run_of(), provenance=Provenance(loads))
    ]


def run_of() -> Run:
    run = Run()
    net = run.module("Net", NET)
    run.batch().backward().step(run.optimizer("AdamW", net))
    return run


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.backbone."])
def test_a_prefix_on_the_file(prefix: str) -> None:
    one = load(NET, under(prefix, NET))
    severity, finding = only(partial_weight_load, run_of(), provenance=Provenance((one,)))
    assert severity == "error"
    assert f'"{prefix}"' in finding.message and "0 of its 10 tensors" in finding.message
    assert f'removeprefix("{prefix}")' in finding.fix
    assert finding.at == at(7)


def test_a_prefix_on_the_module() -> None:
    model = under("encoder.", NET)
    one = load(model, NET, model=model)
    finding = only(partial_weight_load, run_of(), provenance=Provenance((one,)))[1]
    assert '"encoder." + k' in finding.fix


def test_a_wrapper_around_the_module() -> None:
    one = load(NET, NET, wrapper="_orig_mod.")
    finding = only(partial_weight_load, run_of(), provenance=Provenance((one,)))[1]
    assert '"_orig_mod."' in finding.message and "model._orig_mod.load_state_dict" in finding.fix


def test_a_prefix_on_part_of_the_file() -> None:
    """The embeddings arrived; the rest of the trunk lies one level deeper."""
    embed = {"embed.weight": (50, 32)}
    one = load(BODY, under("trunk.", BODY), model={**embed, **NET}, file={**embed, **under("trunk.", BODY)})
    assert judged(one) == [("error", "prefix")]


def test_nothing_arrived() -> None:
    other = {f"stage.{i}.kernel": (7, 7) for i in range(6)}
    assert judged(load(NET, other, file=other)) == [("error", "nothing")]


def test_set_anew_after_the_load() -> None:
    one = load(BODY, {}, overwritten_tensors=8, overwritten_weights=weights(BODY), passed_over=tuple(BODY))
    assert judged(one) == [("error", "overwritten")]


def test_other_names_inside_the_layers() -> None:
    theirs = {f"blocks.{i}.attention.kernel": (32, 32) for i in range(4)}
    file = {**theirs, **HEAD}
    assert judged(load(BODY, theirs, file=file)) == [("error", "renamed")]
    # With strict=True it was the program that chose what to hand over.
    assert judged(load(BODY, theirs, file=file, strict=True)) == [("warning", "renamed")]


def test_another_part_of_the_same_make() -> None:
    """Two towers in the file, one of them used; the module's second tower may be meant to be new."""
    model = {**under("a.", BODY), **under("c.", BODY)}
    file = {**under("a.", BODY), **under("b.", BODY)}
    assert judged(load(under("c.", BODY), under("b.", BODY), model=model, file=file)) == [("warning", "renamed")]


def test_many_other_shapes() -> None:
    wide = {name: tuple(2 * n for n in shape) for name, shape in BODY.items()}
    assert judged(load(BODY, wide, mismatched=list(BODY))) == [("warning", "shapes")]


def test_a_file_that_was_read_and_not_used() -> None:
    left = under("module.", NET)
    assert judged(load(NET, left, how="filtered", strict=True)) == [("error", "prefix")]
    assert judged(load(NET, left, how="read", strict=None)) == [("warning", "prefix")]
    assert judged(load(NET, NET, how="read", strict=None, passed_over=tuple(NET))) == []
    assert judged(load(NET, {"a.kernel": (7, 7)}, how="read", strict=None)) == []


@pytest.mark.parametrize(
    "one",
    [
        load({}, {}),
        load(HEAD, {"head.weight": (9, 32), "head.bias": (9,)}, mismatched=list(HEAD)),
        load(HEAD, {}, file=BODY),
        # The classifier of the old task has the very shape of the new one.
        load(HEAD, under("old.", HEAD)),
        # A decoder that the module has no place for; one that the file has nothing for.
        load({}, under("decoder.", BODY), model=BODY, file={**BODY, **under("decoder.", BODY)}),
        load(under("decoder.", BODY), {}, model={**BODY, **under("decoder.", BODY)}, file=BODY),
        # The upper layers are left out by their names.
        load(BODY, BODY, passed_over=tuple(BODY)),
        # New word embeddings and their head.
        load(
            {"embed.weight": (90, 32), "words.weight": (90, 32)},
            {"embed.weight": (70, 32), "words.weight": (70, 32)},
            model={**NET, "embed.weight": (90, 32), "words.weight": (90, 32)},
            mismatched=["embed.weight", "words.weight"],
        ),
    ],
)
def test_loads_as_they_are_meant(one: WeightLoad) -> None:
    assert judged(one) == []


def test_a_load_into_something_that_is_not_used() -> None:
    run = run_of()
    run.module("Spare", NET)
    assert not findings(partial_weight_load, run, provenance=Provenance((load(NET, under("module.", NET), root=1),)))


def test_no_load() -> None:
    with pytest.raises(NotApplicable):
        findings(partial_weight_load, run_of())
    with pytest.raises(NotApplicable):
        findings(partial_weight_load, run_of(), provenance=Provenance())
