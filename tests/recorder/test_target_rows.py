"""Targets laid beside what the model was given: rows, padding, shift, ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trainlint.recorder import loss_rows
from trainlint.recorder.batches import Inputs

V = 40


def texts(lengths: Sequence[int], seed: int = 0, low: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(low, V, (n,), generator=g) for n in lengths]


def padded(rows: list[Tensor], value: float = 0) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def logits(*shape: int) -> Tensor:
    return nn.Linear(4, V)(torch.randn(*shape, 4))


def look(
    given: Tensor,
    target: Tensor,
    *,
    ids: Sequence[Tensor] = (),
    batches: Sequence[Any] = (),
    function: str = "cross_entropy",
    weight: Tensor | None = None,
    padding_idx: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The figures; ``ids``: what embeddings looked up, oldest first."""
    inputs = Inputs()
    for batch in batches:
        inputs.fetched(batch)
    for one in ids:
        inputs.embedded(one, padding_idx)
    found = loss_rows.look(function, given, target, options, weight, inputs)
    return found[0] if found is not None else {}


LENGTHS = (9, 4, 7, 2, 5)


def test_flattened_next_tokens_get_their_rows_back() -> None:
    ids = padded(texts(LENGTHS))
    x, y = ids[:, :-1], ids[:, 1:]
    figures = look(logits(*x.shape).reshape(-1, V), y.reshape(-1), ids=[x])
    assert (figures["rows"], figures["length"]) == (5, 8)
    assert figures["same"][1] == 1.0
    assert figures["same"][2] < 0.3
    assert figures["embedded"]
    pad = int((x == 0).sum())
    assert (figures["padding"], figures["padding_supervised"], figures["padding_target"]) == (pad, pad, 0.0)
    assert figures["padding_kind"] == "ids"
    assert not figures["left"]


def test_the_model_shifts_and_pads_with_the_ignored_index() -> None:
    """transformers: labels shifted inside, the last position ignored."""
    ids = padded(texts(LENGTHS))
    labels = ids.masked_fill(ids == 0, -100)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    mask = (ids != 0).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    figures = look(logits(*ids.shape).float().view(-1, V), shifted, ids=[ids], batches=[batch])
    assert figures["same"][1] == 1.0
    assert figures["padding"] > 0
    assert figures["padding_supervised"] == 0
    assert figures["confirmed_by"] == "attention_mask (mask)"


def test_left_padding_without_the_position_before_the_text() -> None:
    ids = padded([t.flip(0) for t in texts(LENGTHS)]).flip(1)
    labels = nn.functional.pad(ids, (0, 1), value=-100)[..., 1:]
    figures = look(logits(*ids.shape).view(-1, V), labels.reshape(-1), ids=[ids])
    assert figures["left"]
    # The last padding of a row predicts its first token, which is no padding.
    assert figures["padding_supervised"] == int((ids == 0).sum()) - sum(n < 9 for n in LENGTHS)


def test_time_first_tagging_with_a_real_tag_as_padding() -> None:
    words, g = padded(texts(LENGTHS, low=2), value=1).T, torch.Generator().manual_seed(1)
    tags = padded([torch.randint(0, 5, (n,), generator=g) for n in LENGTHS]).T
    given = logits(*words.shape)[..., :5].flatten(0, 1)
    figures = look(given, tags.flatten(), ids=[words])
    assert (figures["rows"], figures["length"]) == (5, 9)
    assert figures["padding_supervised"] == int((words == 1).sum())
    assert figures["padding_target"] == 0


def test_a_decoder_that_starts_with_the_padding_token() -> None:
    """T5: decoder_input_ids begin with the padding token; the encoder has other rows of the same size."""
    labels = padded(texts(LENGTHS))
    decoder = nn.functional.pad(labels, (1, 0))[:, :-1]
    source = padded(texts((3, 9, 2, 8, 4), seed=5))
    given = logits(*labels.shape).view(-1, V)
    figures = look(given, labels.view(-1), ids=[source, decoder])
    assert figures["same"][1] == 1.0
    assert figures["padding_supervised"] == int((decoder == 0)[:, 1:].sum())
    masked = look(given, labels.masked_fill(labels == 0, -100).view(-1), ids=[source, decoder])
    assert masked["padding_supervised"] == 0


def test_one_token_that_ends_turns_and_pads() -> None:
    """The end token also stands inside the rows, once in a while."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, V, (n,), generator=g) for n in (60, 30, 45, 52)]
    for row in rows:
        row[20] = row[-1] = 2
    ids = padded(rows, 2)
    labels = nn.functional.pad(ids, (0, 1), value=-100)[..., 1:]
    figures = look(logits(*ids.shape).view(-1, V), labels.reshape(-1), ids=[ids])
    assert figures["padding_value"] == 2
    assert figures["padding_supervised"] > 40


def test_the_weights_of_the_loss_take_padding_out() -> None:
    ids = padded(texts(LENGTHS))
    x, y = ids[:, :-1], ids[:, 1:]
    weight = torch.ones(V)
    weight[0] = 0
    figures = look(logits(*x.shape).transpose(1, 2), y, ids=[x], weight=weight)
    assert figures["padding_weightless"]
    series, mask = padded([torch.randn(n, 3) for n in LENGTHS]), padded([torch.ones(n) for n in LENGTHS])
    bce = {"function": "binary_cross_entropy_with_logits", "batches": [(series, mask)]}
    target = (series[..., 0] > 0).float()
    assert look(torch.randn(5, 9), target, weight=mask, **bce)["padding_weightless"]
    assert not look(torch.randn(5, 9), target, weight=torch.ones(5, 9), **bce)["padding_weightless"]


@pytest.mark.parametrize("layout", ["batch", "flat"])
def test_series_with_a_mask_lengths_or_nothing_but_zero_steps(layout: str) -> None:
    series, target = padded([torch.randn(n, 3) for n in LENGTHS]), padded([torch.randn(n) for n in LENGTHS])
    mask, lengths = padded([torch.ones(n, dtype=torch.bool) for n in LENGTHS]), torch.tensor(LENGTHS)
    given = nn.Linear(3, 1)(series).squeeze(-1)
    if layout == "flat":
        given, aim = given.view(-1), target.view(-1)
    else:
        aim = target
    count = int((~mask).sum())
    for batch, kind, confirmed in [
        ([series, target, mask], "values", "batch[2] (mask)"),
        ([series, target, lengths], "values", "batch[2] (lengths)"),
        ([series, target], "values", ""),
    ]:
        figures = look(given, aim, function="mse_loss", batches=[batch])
        assert (figures["padding_supervised"], figures["padding_kind"]) == (count, kind)
        assert figures["confirmed_by"] == confirmed
        assert not figures["classes"]


def test_masks_that_are_true_where_the_row_is_over() -> None:
    series, target = padded([torch.randn(n, 3) for n in LENGTHS]), padded([torch.randn(n) for n in LENGTHS])
    over = padded([torch.zeros(n) for n in LENGTHS], 1).bool()
    figures = look(torch.randn(5, 9), target, function="l1_loss", batches=[{"x": series, "y": target, "over": over}])
    assert figures["confirmed_by"] == "over (mask)"


def test_the_batch_that_the_target_came_with_counts_not_the_one_fetched_ahead() -> None:
    def batch(seed: int) -> dict[str, Tensor]:
        ids = padded(texts((9, 3, 5, 6), seed))
        return {"input_ids": ids, "labels": ids.masked_fill(ids < 12, -100)}

    first, second = batch(0), batch(1)
    labels = nn.functional.pad(first["labels"], (0, 1), value=-100)[..., 1:]
    given = logits(4, 9).view(-1, V)
    figures = look(given, labels.reshape(-1), ids=[first["input_ids"]], batches=[first, second])
    assert figures["shown_by"] == "input ids"
    assert figures["padding_supervised"] == 0


def test_what_an_earlier_batch_or_micro_batch_looked_up_is_forgotten() -> None:
    inputs = Inputs()
    first, second, third = (padded(texts(lengths)) for lengths in ((9, 3, 5, 6), (4, 9, 3, 7), (9, 8, 2, 5)))
    inputs.embedded(first, None)
    inputs.fetched([second])
    inputs.embedded(second, None)
    assert [known.tensor is second for known in inputs.lookups()] == [True]
    inputs.backward()
    inputs.embedded(third, None)
    assert [known.tensor is third for known in inputs.lookups()] == [True]
    assert len(inputs.batches()) == 1


def test_names_that_end_in_a_token_which_also_pads_the_input() -> None:
    """Starts and ends with 0; the target ignores what follows its end. Beside the batch before it would look padded."""
    rows = [texts(lengths, seed, 1) for seed, lengths in enumerate(((4, 6, 6, 5), (4, 6, 5, 6)))]
    inputs = Inputs()
    for one in rows:
        x = padded([nn.functional.pad(t, (1, 0)) for t in one])
        y = padded([nn.functional.pad(t, (0, 1)) for t in one], -1)
        inputs.fetched([x, y])
        inputs.embedded(x, None)
    found = loss_rows.look(
        "cross_entropy", logits(*y.shape).view(-1, V), y.view(-1), {"ignore_index": -1}, None, inputs
    )
    assert found is not None
    assert found[0].get("padding_supervised", 0) == 0


# ------------------------------------------------------------------------------------------- what is no padding


def borders() -> tuple[Tensor, Tensor]:
    """Drawings with black rows above and below."""
    g = torch.Generator().manual_seed(0)
    images = torch.zeros(12, 16, 16)
    for i in range(12):
        top, bottom = int(torch.randint(1, 6, (), generator=g)), int(torch.randint(8, 15, (), generator=g))
        images[i, top:bottom] = torch.rand(bottom - top, 16, generator=g) + 0.1
    return images, (images > 0.5).float()


def no_padding() -> dict[str, dict[str, Any]]:
    g = torch.Generator().manual_seed(7)
    counts = torch.poisson(torch.rand(64, 24, generator=g) * torch.linspace(3, 0.1, 24), generator=g)
    images, shapes = borders()
    packed = torch.randint(3, V, (8, 33), generator=g)
    packed[torch.rand(8, 33, generator=g) < 0.1] = 2
    pixels = (images * 8).long().reshape(12, -1)
    same = torch.randint(3, V, (6, 12), generator=g)
    same[:, 8:] = 0
    # A second segment of different length; its tags are all "outside".
    pair = torch.randint(3, V, (5, 9), generator=g)
    segment = torch.stack([(torch.arange(9) >= n).long() for n in (9, 4, 7, 2, 5)])
    tags = torch.randint(1, 5, (5, 9), generator=g).masked_fill(segment == 1, 0)
    # Every position is a target, and those of the padding are real (infilling).
    whole = torch.randint(3, V, (5, 9), generator=g)
    cut = whole.masked_fill(segment == 1, 0)
    blank = torch.randint(1, 9, (5, 9), generator=g).masked_fill(segment == 1, 0)
    speech = torch.rand(5, 9, 6, generator=g) + 0.1
    return {
        "counts": {"given": counts, "target": counts, "function": "mse_loss", "batches": [[counts.log1p(), counts]]},
        "drawings": {"given": images, "target": images, "function": "mse_loss", "batches": [[images]]},
        "shapes": {
            "given": images, "target": shapes, "function": "binary_cross_entropy_with_logits",
            "batches": [[images, shapes]],
        },
        "pixels": {
            "given": logits(12, 255).reshape(-1, V), "target": pixels[:, 1:].reshape(-1), "ids": [pixels[:, :-1]],
        },
        "packed": {"given": logits(8, 32).reshape(-1, V), "target": packed[:, 1:].reshape(-1), "ids": [packed[:, :-1]]},
        "segments": {
            "given": logits(5, 9).view(-1, V), "target": tags.view(-1), "ids": [pair, segment],
            "batches": [{"ids": pair, "token_type_ids": segment, "tags": tags}],
        },
        "infilling": {"given": logits(5, 9).view(-1, V), "target": whole.view(-1), "ids": [cut]},
        "slots": {"given": logits(5, 9).transpose(1, 2), "target": blank, "batches": [[torch.rand(5, 8, 8), blank]]},
        "speech": {"given": logits(5, 9).transpose(1, 2), "target": blank, "batches": [[speech, blank]]},
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(no_padding()))
def test_zeros_that_are_data(name: str) -> None:
    figures = look(**no_padding()[name])
    assert not figures.get("padding_supervised"), figures


def test_rows_of_equal_length_say_so() -> None:
    rows = torch.cat([torch.stack(texts([6] * 5)), torch.zeros(5, 3, dtype=torch.long)], dim=1)
    figures = look(logits(5, 8).reshape(-1, V), rows[:, 1:].reshape(-1), ids=[rows[:, :-1]])
    assert figures["padding_min"] == figures["padding_max"] == 2


def test_a_token_twice_at_an_edge() -> None:
    ids = torch.stack(texts([20] * 8))
    ids[3, :2] = ids[3, 0]
    figures = look(logits(8, 19).reshape(-1, V), ids[:, 1:].reshape(-1), ids=[ids[:, :-1]])
    assert figures["same"][1] == 1.0
    assert not figures.get("padding")


# ------------------------------------------------------------------------------------------- shift, ends, rows


def test_labels_that_both_sides_shifted() -> None:
    ids = torch.stack(texts([12] * 4))
    x, labels = ids[:, :-1], ids[:, 1:]
    for given, target in [
        (logits(4, 11)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)),
        (logits(4, 11).view(-1, V), nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)),
    ]:
        figures = look(given, target, ids=[x], batches=[[x, labels]])
        assert figures["same"][2] == 1.0
        assert max(figures["same"][:2]) < 0.3
        assert figures["embedded"]


def test_predictions_whose_first_position_was_cut_off() -> None:
    """A prefix token whose prediction is not used: position 0 of the target belongs to position 1 of the input."""
    ids = torch.stack(texts([12] * 4))
    given = logits(4, 12)[:, 1:-1].reshape(-1, V)
    figures = look(given, ids[:, 2:].reshape(-1), ids=[ids])
    assert figures["same"][1] == 1.0


def test_ends_that_are_ignored_because_they_look_like_padding() -> None:
    ids = padded([torch.cat([t, torch.tensor([2])]) for t in texts(LENGTHS)], 2)
    mask = padded([torch.ones(n + 1, dtype=torch.long) for n in LENGTHS])
    for labels, ignored in [(ids.masked_fill(ids == 2, -100), 5), (ids.masked_fill(mask == 0, -100), 0)]:
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        figures = look(logits(*ids.shape).view(-1, V), shifted.reshape(-1), ids=[ids], batches=[batch])
        assert (figures["ends"], figures["ends_ignored"], figures["end_token"]) == (5, ignored, 2)


def test_a_mask_of_another_batch_tells_no_ends() -> None:
    """The batch itself was fetched too long ago: what is left over are others, of the same shape."""

    def batch(seed: int, lengths: Sequence[int]) -> dict[str, Tensor]:
        ids, mask = padded(texts(lengths, seed)), padded([torch.ones(n, dtype=torch.long) for n in lengths])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    own, other = batch(0, (9, 3, 5, 6)), batch(1, (9, 9, 8, 9))
    shifted = nn.functional.pad(own["labels"], (0, 1), value=-100)[..., 1:].reshape(-1)
    for fetched in ([other], [own, other]):
        figures = look(logits(4, 9).view(-1, V), shifted, ids=[own["input_ids"]], batches=fetched)
        assert not figures.get("ends")
        assert figures["padding_supervised"] == 0


def test_rows_without_targets() -> None:
    ids = padded(texts((9, 9, 7, 2)))
    labels = ids.clone()
    labels[0], labels[3] = -100, -100
    labels[ids == 0] = -100
    figures = look(logits(4, 8).reshape(-1, V), labels[:, 1:].reshape(-1), ids=[ids[:, :-1]])
    assert figures["empty"] == 2
    assert figures["empty_full"] == 1, "the short row is not full"


@pytest.mark.parametrize(
    ("function", "target"),
    [
        ("cross_entropy", torch.rand(4, V)),  # soft
        ("cross_entropy", torch.randint(0, 5, (4, 8, 8))),  # pixels
        ("cross_entropy", torch.tensor(3)),
        ("kl_div", torch.rand(4, V)),
        ("mse_loss", torch.rand(4, 3, 8, 8)),
    ],
)
def test_targets_that_are_no_rows(function: str, target: Tensor) -> None:
    assert look(torch.randn(4, V), target, function=function) == {}


def test_samples_of_a_classification_have_no_rows() -> None:
    assert look(logits(8), torch.randint(0, 5, (8,)), batches=[[torch.rand(8, 3), torch.randint(0, 5, (8,))]]) == {}


def test_a_padding_idx_that_is_not_what_pads() -> None:
    ids = padded(texts(LENGTHS), 2)
    for declared, confirmed in [(0, ""), (2, "padding_idx of the embedding")]:
        figures = look(logits(5, 8).reshape(-1, V), ids[:, 1:].reshape(-1), ids=[ids[:, :-1]], padding_idx=declared)
        assert figures["padding_supervised"] == int((ids[:, :-1] == 2).sum())
        assert figures["confirmed_by"] == confirmed


def test_labels_of_a_batch_that_no_function_of_torch_sees() -> None:
    """Fused kernels: what the causal model would make of labels beside input_ids."""
    ids = padded([torch.cat([t, torch.tensor([2])]) for t in texts(LENGTHS)])
    mask = (ids != 0).long()
    right = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    figures = loss_rows.of_labels(right)
    assert figures is not None
    assert figures["same"][1] == 1.0
    assert figures["padding_supervised"] == 0
    wrong = loss_rows.of_labels({**right, "labels": ids.clone()})
    assert wrong is not None
    assert wrong["padding_supervised"] > 10
    for other in ({"input_ids": ids}, [ids, ids], {**right, "labels": ids[:, 0]}, {**right, "labels": "no tensor"}):
        assert loss_rows.of_labels(other) is None
