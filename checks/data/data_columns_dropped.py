"""TL908: the Trainer removes columns that the loss wanted."""

from __future__ import annotations

from collections.abc import Iterator

from trainlint.contract import Finding, NotApplicable, NotObserved, Recording, check
from trainlint.recording.describe import framework_settings, place, uses


@check("TL908", Recording, severity="warning")
def data_columns_dropped(run: Recording) -> Iterator[Finding]:
    """The Trainer removes columns that the loss wanted.

    ## What goes wrong
    With `remove_unused_columns=True`, its default, transformers' `Trainer` keeps those columns of the dataset that
    the model's `forward` names as arguments, and labels. A column meant for something else, such as sample weights for
    a `compute_loss` of one's own, teacher logits, or lengths for the collator, never arrives. `inputs["weight"]` then
    raises a KeyError; `inputs.pop("weight", None)` says nothing, and the training runs without weights.

    ## How it is detected
    The columns of the training data, those that the Trainer kept, and the program's own `compute_loss`,
    `training_step`, `compute_loss_func` and data collator, with the methods that they call: a removed column is
    reported where one of them takes an item by its name (`["weight"]`, `.get("weight")`, `.pop("weight")`).

    ## What to do
    `TrainingArguments(remove_unused_columns=False)`, and a collator that leaves out what cannot be a tensor. Or add
    the column to the model's `forward`.

    ## When it may be wrong
    Removed columns that nobody asks for (raw text, ids) are as they should be: silent. Code that looks for a column
    that other datasets have, and can do without, is not told apart from code that needs it. Under data loader workers
    only the columns of `datasets.Dataset` are known.

    ## References
    transformers documentation, `TrainingArguments.remove_unused_columns`; huggingface/transformers,
    `Trainer._remove_unused_columns`.
    """
    if not uses(run, "transformers"):
        raise NotApplicable("transformers' Trainer does not drive this run")
    if framework_settings(run, "transformers").get("remove_unused_columns") is False:
        raise NotApplicable("remove_unused_columns=False")
    columns = run.samples.columns if run.samples is not None else ()
    if not columns:
        raise NotObserved(
            "the columns of the training data were not seen: loader workers remove them; set dataloader_num_workers=0"
        )
    for found in columns:
        for lost in found.dropped:
            where = place(lost.at)
            yield Finding(
                f"The Trainer removes the column '{lost.name}' from the training data, and {lost.asked_by} "
                f"{f'({where}) ' if where else ''}takes it from the batch: it never arrives. remove_unused_columns="
                f"True keeps what {found.model or 'the model'}.forward names: {', '.join(found.kept) or 'nothing'}.",
                at=lost.at,
                evidence={"column": lost.name, "kept": list(found.kept), "columns": list(found.columns)},
                fix="TrainingArguments(remove_unused_columns=False), or name the column in the model's forward.",
                about=lost.name,
            )
