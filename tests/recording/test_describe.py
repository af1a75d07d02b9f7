"""Names of tensors by module, in few words."""

from __future__ import annotations

from trainlint.recording.describe import by_module, lines_of
from trainlint.recording.schema import Parameter


def parameters(*names: str) -> list[Parameter]:
    return [Parameter(i, name, (4, 4), "torch.float32", "cpu", True, root=0) for i, name in enumerate(names)]


def test_the_same_module_of_many_layers_is_one_line() -> None:
    every = [n for k in (0, 1, 2, 4, 5, 11) for n in (f"h.{k}.ln_1.weight", f"h.{k}.ln_2.weight", f"h.{k}.fc.weight")]
    all_of_them = parameters(*every, "ln_f.weight")
    chosen = [p for p in all_of_them if ".ln_" in p.name]
    text = lines_of(by_module(chosen, all_of_them), None)
    assert text == "h.0-2,4-5,11.ln_1.weight: 6 tensors; h.0-2,4-5,11.ln_2.weight: 6 tensors"


def test_few_groups_are_told_one_by_one() -> None:
    all_of_them = parameters("h.0.a.weight", "h.0.b.weight", "h.1.a.weight", "h.1.b.weight")
    chosen = [p for p in all_of_them if ".a." in p.name]
    assert lines_of(by_module(chosen, all_of_them), None) == (
        "h.0.a.weight: 1 tensor (4, 4); h.1.a.weight: 1 tensor (4, 4)"
    )


def test_the_tail_is_counted_and_cut_only_where_more_follows() -> None:
    all_of_them = parameters(*(f"{x}.{y}.weight" for x in "abcdef" for y in "pq"))
    chosen = [p for p in all_of_them if p.name.endswith("p.weight")]
    text = lines_of(by_module(chosen, all_of_them), None)
    assert text.endswith("and 2 more tensors (e.p.weight, f.p.weight)")
