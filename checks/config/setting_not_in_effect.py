"""TL104: the config asks for a setting and the run does something else."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainlint.contract import Finding, Key, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording import in_effect
from trainlint.recording.describe import number, place, uses
from trainlint.recording.in_effect import Observed, any_close
from trainlint.recording.schema import ConfigKey, SourceLine, Value
from trainlint.recording.unread import Unread


@check("TL104", Recording, severity="error")
def setting_not_in_effect(run: Recording) -> Iterator[Finding]:
    """The config asks for a setting and the run does something else, or nothing.

    ## What goes wrong
    `lr_scheduler: cosine` stands in the config and the rate is constant; `weight_decay: 1e-3` and Adam decays by 0;
    `accumulate_grad_batches: 8` and every batch makes a step. Nothing fails, because the key travels through
    `**kwargs` to code that drops it. Days later the run is compared with others under settings that it never had.

    ## How it is detected
    Keys are recognised by name and section (`training.lr`, `optimizer.init_args.lr`, `learning_rate` ...), and only
    where the section speaks of training in general. Each is held against what the watched steps did: hyperparameters
    of the live param groups, the projected curve of the scheduler (a warm-up is compared with the peak, never with the
    first rate), autocast and dtypes of the forward pass, micro-batches per step, thresholds of clipping calls, batch
    sizes of the training loader, limits of the Trainer, seeds.

    How much a difference proves follows from how the key was read. Never read, or only passed along in bulk
    (`**kwargs`, `save_hyperparameters()`, a dump), while the feature is off or at its default: an error. Passed in
    bulk and the run has some third value, or read by itself and the feature is off: a warning. Read by itself and some
    other value in effect: nothing, because the value may rightly be derived (scaled by world size, split by layer).
    A source line that could read the key and was not run in the watched steps makes it an info; where another key was
    read in the condition above that line, and where a sibling section with the same keys is the one in use (the other
    optimizer, the earlier phase), nothing is reported.

    ## What to do
    Pass the value to what should use it: the optimizer's constructor in `configure_optimizers`, a scheduler built and
    stepped, an argument of the `Trainer`. Or remove the key, so that the config says what runs. Where another key is
    the one that is read, the finding names it.

    ## When it may be wrong
    Weight decay, clipping or precision done by code of one's own instead of torch's functions is not seen: where the
    key is read by itself, weight decay and clipping give an info only. Rates that the program assigns by hand are not
    compared, nor are rates that were restored beside a schedule; hyperparameters that came with a loaded optimizer
    state are, and the finding names the file. A key that was not followed in the program (`reads` unknown) gives a
    warning at most. On a CPU, mixed precision that the program switches off itself is not reported when the key is
    read. A run that is ended after few steps does not show a seed or a size that is used later. `log_lr` is judged by
    TL404.

    ## References
    Lightning, "save_hyperparameters"; Hydra, "Override syntax" (`+key=value` adds any key).
    """
    keys = _declared(run)
    if not keys:
        raise NotApplicable("the config names no setting that can be compared with the run")
    if not in_effect.stepping(run):
        raise NotObserved("no optimizer step was seen, so nothing can be compared; raise --timeout or --steps")
    unread = Unread(run)
    for key in keys:
        compare = _COMPARE.get(key.meaning)
        difference = compare(run, key) if compare is not None else None
        if difference is None or _ruled_by_another(run, key, keys, difference):
            continue
        severity = _severity(run, key, difference)
        if severity is None or unread.is_alternative(key) or unread.is_switched_off(key):
            continue
        later = unread.later_reads(key)
        if later and key.meaning in _FOR_THE_DEVICE and _on_cpu(run):
            continue  # read behind a test of the device, which this machine fails
        yield _finding(run, key, difference, Severity.INFO if later else severity, keys, later)


@dataclass(frozen=True)
class _Difference:
    """What runs instead of what a key asks for. ``text`` is a clause, ``Adam runs with weight_decay = 0``."""

    text: str
    #: The feature is off or at a default that nobody chose.
    absent: bool
    fix: str
    observed: Any = None
    #: Code of one's own may do this unseen: weaker where the key is read by itself.
    unseen_ways: bool = False
    values: tuple[float, ...] = field(default=())
    #: The file whose optimizer state brought the value in effect.
    restored: str = ""


def _declared(run: Recording) -> list[ConfigKey]:
    """Keys that somebody gave and whose meaning is known, in the order of the config."""
    keys = run.config.keys if run.config is not None else ()
    return [k for k in keys if k.meaning in _COMPARE and k.origin != "default" and not k.secret]


# ------------------------------------------------------------------------------------------- how much is proven


def _bulk_only(key: ConfigKey) -> bool:
    return bool(key.reads) and all(r.how == "bulk" for r in key.reads or ())


#: Settings that programs switch off where the device cannot do them.
_FOR_THE_DEVICE = frozenset(("precision", "bf16", "fp16"))


def _on_cpu(run: Recording) -> bool:
    return (run.program.device or "cpu").startswith("cpu")


def _severity(run: Recording, key: ConfigKey, difference: _Difference) -> Severity | None:
    if key.reads is None:
        if not difference.absent:
            return None
        # Where other keys were followed, this one may belong to another program or another stage.
        if run.config is not None and any(k.reads is not None for k in run.config.keys) and key.origin != "override":
            return None
        # A library's parser (Lightning's CLI) read the program's config: the key is its own, its way is not seen.
        by_library = run.config is not None and run.config.tracked_by and key.origin != "override"
        return Severity.INFO if by_library and difference.unseen_ways else Severity.WARNING
    if key.reads == ():
        return Severity.ERROR if _reader_seen(run, key) else Severity.WARNING
    if _bulk_only(key):
        return Severity.ERROR if difference.absent else Severity.WARNING
    if not difference.absent:
        return None
    return Severity.INFO if difference.unseen_ways else Severity.WARNING


def _reader_seen(run: Recording, key: ConfigKey) -> bool:
    """Whether reads of this section are seen: one of its keys was read (pydantic would read them all unseen)."""
    section = key.path.rpartition(".")[0]
    followed = run.config.keys if run.config is not None else ()
    return any(k.path.rpartition(".")[0] == section and k.reads for k in followed)


def _ruled_by_another(run: Recording, key: ConfigKey, keys: Sequence[ConfigKey], difference: _Difference) -> bool:
    """A second key of the same meaning that belongs to another optimizer or stage and is read by itself."""
    if key.reads == () or _bulk_only(key):
        return False
    others = [k for k in keys if k.meaning == key.meaning and k.path != key.path]
    return any(_matches(k, difference) for k in others)


def _matches(key: ConfigKey, difference: _Difference) -> bool:
    return (wanted := _number(key.value)) is not None and any_close(wanted, difference.values)


# ------------------------------------------------------------------------------------------- what is said


def _finding(
    run: Recording,
    key: ConfigKey,
    difference: _Difference,
    severity: Severity,
    keys: Sequence[ConfigKey],
    later: Sequence[SourceLine] = (),
) -> Finding:
    where = _at(key) or (" (command line)" if key.origin == "override" else "")
    instead, reading = _instead(key, keys, difference), _reading(key, difference)
    if later:
        difference = replace(difference, text=f"{difference.text} in the watched steps")
        reading = f"{place(later[0])} may read the key and was not run so far."
    return Finding(
        f"{key.path} = {_text(key.value)}{where} is not in effect: {difference.text}. {reading}{instead}",
        at=Key(key.path),
        evidence={
            "setting": key.meaning,
            "declared": list(key.value) if isinstance(key.value, tuple) else key.value,
            "observed": difference.observed,
            "reads": [f"{r.by or r.how} at {place(r.at) or 'unknown'}" for r in key.reads or ()],
        },
        fix=difference.fix,
        severity=severity,
        about=key.path,
    )


def _reading(key: ConfigKey, difference: _Difference) -> str:
    if key.reads is None:
        return "How the program reads the key was not seen."
    if not key.reads:
        return "The key was never read."
    if _bulk_only(key):
        takers = [f"{r.by}{' at ' + place(r.at) if r.at else ''}" for r in key.reads]
        # What passes values on says more than what prints or saves them.
        takers.sort(key=lambda t: not t.startswith("**"))
        if difference.restored:
            return f"The key is only taken in bulk ({', '.join(takers[:2])}), and the state that was loaded rules."
        return f"The key is only taken in bulk ({', '.join(takers[:2])}) and handed to nothing that uses it."
    first = next(r for r in key.reads if r.how != "bulk")
    return f"The key is read{' at ' + place(first.at) if first.at else ''}, but its value does not arrive."


def _instead(key: ConfigKey, keys: Sequence[ConfigKey], difference: _Difference) -> str:
    for other in keys:
        read = other.reads and not _bulk_only(other)
        if other.meaning == key.meaning and other.path != key.path and read and _matches(other, difference):
            return f" What is read is {other.path} = {_text(other.value)}{_at(other)}."
    return ""


def _at(key: ConfigKey) -> str:
    return f" ({place(key.at)})" if key.at is not None else ""


def _text(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Value) -> float | None:
    """A number, also as text (YAML 1.1 reads ``1e-4`` as text)."""
    if isinstance(value, bool) or value is None or isinstance(value, tuple):
        return None
    if isinstance(value, str):
        return float(value) if re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", value) else None
    return float(value) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------- comparing


def _from(observed: Observed | None, wanted: float, fix: str, *, unseen_ways: bool = False) -> _Difference | None:
    """The difference between a wanted number and observed ones; ``None`` when it is in effect or was not seen."""
    if observed is None or any_close(wanted, observed.values):
        return None
    if observed.restored:
        fix = fix.removesuffix(", or remove the key.").rstrip(".")
        fix += ", and set it in the param groups again after the state is loaded, which replaces it; or remove the key."
    return _Difference(
        observed.text, observed.absent, fix, list(observed.values)[:8], unseen_ways, observed.values, observed.restored
    )


def _optimizer_fix(run: Recording, argument: str) -> str:
    where = "in configure_optimizers" if uses(run, "lightning") else "where it is built"
    if uses(run, "transformers"):
        where = "where it is built, or let the Trainer build it from TrainingArguments"
    return f"Pass {argument} to the optimizer {where}, or remove the key."


def _hyper(
    name: str, index: int | None = None, *, unseen_ways: bool = False
) -> Callable[[Recording, ConfigKey], _Difference | None]:
    def compare(run: Recording, key: ConfigKey) -> _Difference | None:
        wanted = _number(key.value)
        if wanted is None:
            return None
        observed = in_effect.hyperparameter(run, name, index)
        argument = f"{name}={_text(key.value)}" if index is None else "betas"
        return _from(observed, wanted, _optimizer_fix(run, argument), unseen_ways=unseen_ways)

    return compare


def _betas(run: Recording, key: ConfigKey) -> _Difference | None:
    pair = key.value if isinstance(key.value, tuple) else ()
    fix = _optimizer_fix(run, f"betas=({', '.join(_text(v) for v in pair)})")
    for index, value in enumerate(pair):
        wanted = _number(value)
        difference = _from(in_effect.hyperparameter(run, "betas", index), wanted, fix) if wanted is not None else None
        if difference is not None:
            return difference
    return None


def _rate(run: Recording, key: ConfigKey) -> _Difference | None:
    wanted = _number(key.value)
    if not wanted:
        return None
    difference = _from(in_effect.peak_rates(run), wanted, _optimizer_fix(run, f"lr={_text(key.value)}"))
    if difference is None or key.reads == () or difference.absent:
        return difference
    return None if any(_scaled(run, wanted, r) for r in difference.values) else difference


def _scaled(run: Recording, wanted: float, rate: float) -> bool:
    """Whether a rate is the wanted one times a size of the run (ranks, batch size, accumulation), or its root."""
    if rate <= 0:
        return False
    sizes = [float(run.program.world_size), *(float(x.batch_size) for x in run.loaders if x.batch_size)]
    sizes += [s / 256 for s in sizes if s > 1]
    factors = [a * b for a in [1.0, *sizes] for b in [1.0, *sizes]]
    return any(
        f != 1 and any_close(wanted, (rate / f, rate * f, rate / math.sqrt(f), rate * math.sqrt(f))) for f in factors
    )


_CONSTANT_NAMES = re.compile(r"^(?:none|null|no|off|false|constant|fixed|const|disabled|)$")
_SCHEDULE_WORDS = re.compile(
    r"cos|linear|poly|exp|step|plateau|one_?cycle|cycl|anneal|decay|warm|wsd|trapez|inverse|inv_|sqrt|noam|tri_?stage|lambda"
)


def _schedule(run: Recording, key: ConfigKey) -> _Difference | None:
    name = str(key.value).strip().lower().rpartition(".")[2]
    if _CONSTANT_NAMES.match(name) or name.startswith("constant") or not _SCHEDULE_WORDS.search(name):
        return None
    return _constant(run)


def _constant(run: Recording) -> _Difference | None:
    constant = in_effect.constant_rate(run)
    if constant is None:
        return None
    fix = "Build the scheduler, step it after every optimizer step, or remove the keys."
    if uses(run, "lightning"):
        fix = (
            'Return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}} from '
            "configure_optimizers, or remove the keys."
        )
    elif uses(run, "transformers"):
        fix = "Set lr_scheduler_type and warm-up in TrainingArguments, or remove the keys."
    return _Difference(constant.text, True, fix, constant.rate)


def _warm_up(run: Recording, key: ConfigKey) -> _Difference | None:
    wanted = _number(key.value)
    if not wanted or _too_short(run, key.meaning, wanted):
        return None
    constant = _constant(run)
    if constant is not None:
        return replace(constant, text=f"there is no warm-up, the rate is constant at {number(constant.observed)}")
    found = in_effect.has_warm_up(run)
    if found is None or found[0]:
        return None
    fix = "Begin the schedule with a rising part (LinearLR before it in a SequentialLR), or remove the key."
    if uses(run, "transformers"):
        fix = "Set warmup_steps in TrainingArguments (below 1 a fraction, from transformers 5 on), or remove the key."
    return _Difference(f"{found[1]}, so there is no warm-up", True, fix, 0)


def _too_short(run: Recording, meaning: str, wanted: float) -> bool:
    """A warm-up of a step or less, which cannot be told from none."""
    if meaning == "warmup_steps":
        return wanted <= 1 and not 0 < wanted < 1
    steps = run.plan.optimizer_steps
    return meaning == "warmup_ratio" and steps is not None and wanted * steps < 2


def _minimum(run: Recording, key: ConfigKey) -> _Difference | None:
    wanted = _number(key.value)
    if not wanted:
        return None
    constant = _constant(run)
    peaks = in_effect.peak_rates(run)
    top = max(peaks.values, default=0.0) if peaks is not None else 0.0
    if constant is not None:
        if key.meaning == "min_lr" and top and wanted >= top:
            return None
        return replace(constant, text=f"the rate never falls, it is constant at {number(constant.observed)}")
    lowest = in_effect.lowest_rate(run)
    if lowest is None or not top:
        return None
    minimum = wanted if key.meaning == "min_lr" else wanted * top
    # Only a schedule that goes clearly below is no minimum; one that ends higher may be meant.
    if all(r >= 0.5 * minimum for r in lowest.values):
        return None
    fix = "Pass it to the schedule (eta_min in CosineAnnealingLR is a rate, not a ratio), or remove the key."
    return _Difference(lowest.text, lowest.absent, fix, list(lowest.values), values=lowest.values)


_PRECISIONS: dict[str, tuple[str, bool]] = {
    "bf16-mixed": ("bfloat16", True), "bf16": ("bfloat16", True), "bfloat16": ("bfloat16", True),
    "bf16-true": ("bfloat16", False), "16-mixed": ("float16", True), "fp16": ("float16", True),
    "16": ("float16", True), "float16": ("float16", True), "16-true": ("float16", False),
}  # fmt: skip


def _precision(run: Recording, key: ConfigKey) -> _Difference | None:
    asked = _PRECISIONS.get(name := key.meaning if key.value is True else str(key.value).strip().lower())
    seen = in_effect.low_precision(run)
    if asked is None or seen is None or seen[0]:
        return None
    by_itself = bool(key.reads) and not _bulk_only(key)
    if _on_cpu(run) and (by_itself or (key.reads == () and in_effect.autocast_switched_off(run))):
        return None  # `enabled=torch.cuda.is_available()` is right on a CPU
    fix = f"Wrap the forward pass and the loss in torch.autocast(device_type, dtype=torch.{asked[0]})"
    if uses(run, "lightning"):
        fix = f'Pass precision="{key.value if key.value is not True else name + "-mixed"}" to the Trainer'
    elif uses(run, "transformers"):
        fix = f"Set {'bf16' if asked[0] == 'bfloat16' else 'fp16'}=True in TrainingArguments"
    elif uses(run, "accelerate"):
        fix = f'Pass mixed_precision="{"bf16" if asked[0] == "bfloat16" else "fp16"}" to the Accelerator'
    text = f"the forward pass runs in 32-bit ({seen[1]})"
    return _Difference(text, True, f"{fix}, or remove the key.", "float32")


def _accumulation(run: Recording, key: ConfigKey) -> _Difference | None:
    wanted = _number(key.value)
    observed = in_effect.accumulated(run)
    if wanted is None or wanted <= 1 or observed is None:
        return None
    if any(v and v % wanted == 0 for v in observed.values):
        return None  # several backwards per micro-batch
    world = run.program.world_size
    if world > 1 and any(v * world == wanted for v in observed.values):
        return None  # divided among the ranks
    n = int(wanted)
    fix = f"Call optimizer.step() every {n} micro-batches with the loss divided by {n}, or remove the key."
    if uses(run, "lightning"):
        fix = f"Pass accumulate_grad_batches={n} to the Trainer, or remove the key."
    elif uses(run, "transformers"):
        fix = f"Set gradient_accumulation_steps={n} in TrainingArguments, or remove the key."
    elif uses(run, "accelerate"):
        fix = (
            f"Pass gradient_accumulation_steps={n} to the Accelerator and train inside accumulate(), or remove the key."
        )
    return _from(observed, wanted, fix)


def _clip(method: str) -> Callable[[Recording, ConfigKey], _Difference | None]:
    def compare(run: Recording, key: ConfigKey) -> _Difference | None:
        wanted = _number(key.value)
        if wanted is None or wanted <= 0:
            return None
        fix = f"Call torch.nn.utils.clip_grad_{method}_(parameters, {_text(key.value)}) before the step"
        if uses(run, "lightning"):
            fix = f"Pass gradient_clip_val={_text(key.value)} to the Trainer"
        elif uses(run, "transformers"):
            fix = f"Set max_grad_norm={_text(key.value)} in TrainingArguments"
        observed = in_effect.clip_thresholds(run, method)
        return _from(observed, wanted, f"{fix}, or remove the key.", unseen_ways=True)

    return compare


def _batch_size(run: Recording, key: ConfigKey) -> _Difference | None:
    wanted = _number(key.value)
    if not wanted:
        return None
    observed = in_effect.batch_sizes(run)
    if observed is None:
        return None
    # A product or a part of it is as likely derived (sets of cells, views, ranks) as wrong.
    if key.reads != () and any(max(v, wanted) % min(v, wanted) == 0 for v in observed.values if v):
        return None
    return _from(observed, wanted, "Pass it to the DataLoader, or remove the key.")


def _limit(
    observe: Callable[[Recording], Observed | None], argument: str
) -> Callable[[Recording, ConfigKey], _Difference | None]:
    def compare(run: Recording, key: ConfigKey) -> _Difference | None:
        wanted = _number(key.value)
        if not wanted or wanted < 0:
            return None
        owner = "TrainingArguments" if uses(run, "transformers") else "the Trainer"
        fix = f"Pass {argument}={_text(key.value)} to {owner}, or remove the key."
        return _from(observe(run), wanted, fix)

    return compare


def _seed(run: Recording, key: ConfigKey) -> _Difference | None:
    wanted = _number(key.value)
    observed = in_effect.seeds(run)
    # Ranks and workers add their number to the seed.
    if wanted is None or observed is None or any(0 <= v - wanted <= 4096 for v in observed.values):
        return None
    difference = _from(observed, wanted, f"Call torch.manual_seed({_text(key.value)}) before the model is built.")
    return difference if difference is not None and (key.reads == () or _bulk_only(key)) else None


_COMPARE: dict[str, Callable[[Recording, ConfigKey], _Difference | None]] = {
    "learning_rate": _rate,
    "weight_decay": _hyper("weight_decay", unseen_ways=True),
    "betas": _betas,
    "beta1": _hyper("betas", 0),
    "beta2": _hyper("betas", 1),
    "eps": _hyper("eps"),
    "momentum": _hyper("momentum"),
    "schedule": _schedule,
    "warmup_steps": _warm_up,
    "warmup_epochs": _warm_up,
    "warmup_ratio": _warm_up,
    "min_lr": _minimum,
    "min_lr_ratio": _minimum,
    "precision": _precision,
    "bf16": _precision,
    "fp16": _precision,
    "accumulation": _accumulation,
    "clip_norm": _clip("norm"),
    "clip_value": _clip("value"),
    "batch_size": _batch_size,
    "max_steps": _limit(in_effect.planned_max_steps, "max_steps"),
    "epochs": _limit(in_effect.planned_epochs, "max_epochs"),
    "seed": _seed,
}
