"""The run card: what this run will really do, observed beside configured.

The card shows; it does not judge. ``agrees`` is ``False`` only where the two were compared and differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainlint.judge import card_costs, card_curves, card_experiments, card_loop, card_schedule, card_weights
from trainlint.judge.configured import Configured, any_close, value_text
from trainlint.judge.locate import Locator
from trainlint.judge.scrub import clean_command
from trainlint.recording.boundary import evaluation_batches, steps_in_next_epoch
from trainlint.recording.describe import percent, plural
from trainlint.recording.length import planned_length
from trainlint.recording.projection import Projected, projection
from trainlint.recording.schema import (
    Backward,
    Boundary,
    ConfigFacts,
    Forward,
    Optimizer,
    OptimizerStep,
    Parameter,
    ParamGroup,
    Recording,
    SourceLine,
)
from trainlint.report.model import CardLine, RunCard

Section = tuple[list[CardLine], Any]

#: Param groups told one by one; more are summed up.
_MANY_GROUPS = 6
_KNOWN_OPTIMIZERS = frozenset(
    ("adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "nadam", "radam", "lion", "adafactor", "lamb", "lars")
    + ("muon", "adamax", "lbfgs", "asgd", "rprop")
)


def build_card(
    recording: Recording | None, config: ConfigFacts | None, *, route: str = "", locator: Locator
) -> RunCard:
    """The card of one run; only the launch when there was none."""
    launch, data = _launch(recording, route)
    sections: dict[str, tuple[CardLine, ...]] = {"launch": tuple(launch)} if launch else {}
    if recording is None or not (recording.optimizers or recording.roots or recording.events):
        return RunCard(sections=sections, data=data)
    wanted = Configured(config)
    curves = _projections(recording, wanted)
    parts: dict[str, Section] = {
        "device": _device(recording),
        "model": _model(recording),
        "weights": card_weights.weights(recording),
        "optimizers": _optimizers(recording, wanted, curves, locator),
        "schedule": card_schedule.schedule(recording, wanted, curves, _at(locator)),
        "length": card_schedule.length(recording, wanted, curves),
        "batches": card_loop.batches(recording, wanted, _at(locator)),
        "accumulation": card_loop.accumulation_line(recording, wanted),
        "clipping": card_loop.clipping(recording, wanted),
        "precision": card_loop.precision(recording, wanted),
        "loss": card_loop.losses(recording, _at(locator)),
        "resume": card_loop.resume(recording, locator),
        "logging": card_loop.logging(recording, wanted),
        "time": card_costs.time(recording),
        "memory": card_costs.memory(recording),
    }
    trained = any(isinstance(event, (Backward, OptimizerStep)) for event in recording.events)
    for name, (lines, values) in parts.items():
        # Of a program that died before it trained, "nothing was logged" says nothing.
        if lines and (trained or name not in ("length", "resume", "logging")):
            sections[name] = tuple(lines)
        data[name] = values
    data["boundary"] = _boundary(recording.boundary)
    told, data["experiments"], plots = card_experiments.experiments(recording)
    if told:
        sections["experiments"] = tuple(told)
    return RunCard(sections=sections, curves=card_curves.curves(recording, curves), plots=plots, data=data)


def _boundary(boundary: Boundary | None) -> dict[str, Any] | None:
    """What happened after the steps; the text report says it in its coverage line."""
    if boundary is None:
        return None
    return {
        "outcome": boundary.outcome,
        "reason": boundary.reason,
        "duration_s": boundary.duration_s,
        "batches_delivered": boundary.batches_delivered,
        "batches_meant": boundary.batches_meant,
        "evaluation_batches": evaluation_batches(boundary),
        "steps_in_next_epoch": steps_in_next_epoch(boundary),
    }


def _at(locator: Locator) -> Callable[[SourceLine | None], str]:
    return lambda at: f"{locator.file(at.file)}:{at.line}" if at is not None else ""


def _projections(recording: Recording, wanted: Configured) -> dict[tuple[int, int], Projected]:
    """The rate of every group of every optimizer that stepped, over the planned run."""
    steps = wanted.number("max_steps")
    asked = None
    if recording.plan.optimizer_steps is None and steps is not None and steps >= 1:
        asked = int(steps), f"config {wanted.place('max_steps')}"
    return {
        (optimizer.id, group.index): projection(
            recording, optimizer.id, group.index, planned=asked or planned_length(recording, optimizer.id)
        )
        for optimizer in recording.optimizers
        if optimizer.steps or any(getattr(e, "optimizer", None) == optimizer.id for e in recording.events)
        for group in optimizer.groups
    }


# --------------------------------------------------------------------------------------------- launch, device, model


def _launch(recording: Recording | None, route: str) -> tuple[list[CardLine], dict[str, Any]]:
    lines = [CardLine("launch", route)] if route else []
    data: dict[str, Any] = {"launch": {"route": route} if route else None}
    if recording is None:
        return lines, data
    program = recording.program
    if program.command:
        command = clean_command(program.command)
        lines.append(CardLine("command", " ".join(_quoted(a) for a in command)))
        data["command"] = list(command)
    versions = dict(program.packages)
    if program.torch:
        versions = {"torch": program.torch, **{k: v for k, v in versions.items() if k != "torch"}}
    frameworks = [f for f in recording.frameworks if f.class_name]
    drivers = ", ".join(dict.fromkeys(f"{f.name} ({f.class_name})" for f in frameworks))
    if versions:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines.append(CardLine("software", f"{text}; driven by {drivers}" if drivers else text))
    data["launch"] = {
        "route": route,
        "interpreter": program.interpreter,
        "python": program.python,
        "packages": versions,
        "frameworks": [{"name": f.name, "version": f.version, "class": f.class_name} for f in recording.frameworks],
        "steps_watched": max((o.steps for o in recording.optimizers), default=0),
        "time_to_first_step_s": program.time_to_first_step_s,
    }
    return lines, data


def _quoted(argument: str) -> str:
    return f"'{argument}'" if not argument or any(c in argument for c in " \t\n\"'$;&|<>*?") else argument


def _device(recording: Recording) -> Section:
    program = recording.program
    data = {
        "device": program.device,
        "name": program.device_name,
        "memory_bytes": program.device_memory_bytes,
        "world_size": program.world_size,
    }
    if program.device is None:
        return [], data
    text = program.device
    if program.device_name:
        memory = f", {program.device_memory_bytes / 2**30:.0f} GiB" if program.device_memory_bytes else ""
        text += f" ({program.device_name}{memory})"
    return [CardLine("device", f"{text}, {plural(program.world_size, 'process')}")], data


def _model(recording: Recording) -> Section:
    lines: list[CardLine] = []
    data: list[dict[str, Any]] = []
    held = {i for optimizer in recording.optimizers for group in optimizer.groups for i in group.parameters}
    ran = {event.root for event in recording.events if isinstance(event, Forward)}
    parts: dict[int | None, list[Parameter]] = {}
    for parameter in recording.parameters:
        parts.setdefault(parameter.root, []).append(parameter)
    # A copy that nothing trains or runs (kept by a config or a checkpoint) says nothing about the run.
    used = [
        root
        for root in recording.roots
        if root.id in ran or any(p.id in held or p.gradient_seen for p in parts.get(root.id, ()))
    ]
    for root in used or recording.roots:
        if root.n_parameters == 0:
            continue
        own = parts.get(root.id, [])
        total = sum(p.numel for p in own) or root.n_parameters
        # A GAN's trainer switches requires_grad back and forth: what got a gradient was trainable then.
        trainable = sum(p.numel for p in own if _trains(p)) if own else root.n_trainable
        sizes: dict[str, int] = {}
        for p in own:
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel
        dtypes = sorted(sizes, key=lambda d: (-sizes[d], d))
        wrapped = f" in {' in '.join(reversed(root.wrappers))}" if root.wrappers else ""
        if trainable == total:
            share = "all trainable"
        else:
            share = f"{percent(trainable, total)} trainable ({count(trainable)})"
        text = f"{root.class_name}{wrapped}: {count(total)} parameters, {share}"
        lines.append(CardLine("model", f"{text}, {', '.join(dtypes)}" if dtypes else text))
        data.append(
            {
                "class": root.class_name,
                "wrappers": list(root.wrappers),
                "parameters": total,
                "trainable": trainable,
                "dtypes": sizes,
                "training": root.training,
            }
        )
    # A program may build many small modules (metrics, losses): the largest say what it trains.
    ranked = sorted(range(len(lines)), key=lambda i: (-data[i]["parameters"], i))
    shown = [lines[i] for i in ranked[:4]]
    if len(ranked) > 4:
        shown.append(CardLine("", f"and {len(ranked) - 4} smaller modules"))
    return shown, [data[i] for i in ranked]


def _trains(parameter: Parameter) -> bool:
    return bool(parameter.requires_grad or parameter.requires_grad_later or parameter.gradient_seen)


def count(n: int) -> str:
    """``12.3M``, ``118k``, ``960``."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}" if n < 1000 * size else f"{n / size:.0f}{letter}"
    return str(n)


# --------------------------------------------------------------------------------------------- optimizers


def _optimizers(
    recording: Recording, wanted: Configured, curves: dict[tuple[int, int], Projected], locator: Locator
) -> Section:
    lines: list[CardLine] = []
    data = []
    # With several optimizers a config key cannot be held against one of them without knowing whose it is.
    alone = len(recording.optimizers) == 1
    nothing = Configured(None)
    for optimizer in recording.optimizers:
        at = _at(locator)(optimizer.at)
        tensors = sum(len(g.parameters) for g in optimizer.groups)
        groups = f"{plural(len(optimizer.groups), 'group')}, {plural(tensors, 'tensor')}"
        steps = "" if optimizer.steps else ", no step in the watch"
        text = f"{optimizer.class_name}, {groups}{f', {at}' if at else ''}{steps}"
        config = wanted if alone else nothing
        lines.append(CardLine("optimizer", text, config.text("optimizer"), _same_class(optimizer, config)))
        lines += _hyperparameters(optimizer, config, curves)
        data.append(
            {
                "class": optimizer.class_name,
                "at": at or None,
                "steps": optimizer.steps,
                "skipped_steps": optimizer.skipped_steps,
                "state_loaded": optimizer.state_loaded,
                "groups": [
                    {"tensors": len(g.parameters), "compute_dtype": g.compute_dtype, **dict(g.hyperparameters)}
                    for g in optimizer.groups
                ],
            }
        )
    return lines, data


def _same_class(optimizer: Optimizer, wanted: Configured) -> bool | None:
    key = wanted.key("optimizer")
    if key is None:
        return None
    # ``torch.optim.AdamW``, ``adamw_torch_fused``, ``AdamW``
    asked = str(key.value).rpartition(".")[2].lower().partition("_")[0]
    seen = optimizer.class_name.lower()
    if asked == seen:
        return True
    return False if asked in _KNOWN_OPTIMIZERS and seen in _KNOWN_OPTIMIZERS else None


def _hyperparameters(
    optimizer: Optimizer, wanted: Configured, curves: dict[tuple[int, int], Projected]
) -> list[CardLine]:
    lines = []
    rates = [_group_rates(optimizer, g, curves) for g in optimizer.groups]
    shown = [_rate_text(optimizer, g, curves) for g in optimizer.groups]
    if any(shown):
        agrees = any_close(wanted.number("learning_rate"), (r for group in rates for r in group))
        lines.append(
            CardLine(
                "learning rate",
                _by_group(shown),
                wanted.text("learning_rate"),
                agrees,
                wanted.place("learning_rate") if agrees is False else "",
            )
        )
    for label, name, meaning in (
        ("weight decay", "weight_decay", "weight_decay"),
        ("eps", "eps", "eps"),
        ("momentum", "momentum", "momentum"),
    ):
        values = [g.hyperparameters.get(name) for g in optimizer.groups]
        seen = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        asked = wanted.number(meaning)
        if not seen and asked is None:
            continue
        if name in ("momentum", "eps") and asked is None:
            continue
        agrees = any_close(asked, seen) if seen else (False if asked else None)
        text = _by_group([value_text(v) if v is not None else "none" for v in values])
        lines.append(CardLine(label, text, wanted.text(meaning), agrees, wanted.place(meaning) if not agrees else ""))
    betas = [g.hyperparameters.get("betas") for g in optimizer.groups]
    if any(isinstance(b, (tuple, list)) for b in betas):
        asked_betas = wanted.betas()
        text = _by_group([value_text(b) if b is not None else "none" for b in betas])
        asked_text = wanted.text("betas") or wanted.text("beta1", "beta2")
        lines.append(CardLine("betas", text, asked_text, _same_betas(asked_betas, betas)))
    return lines


def _same_betas(asked: tuple[float | None, float | None] | None, seen: list[Any]) -> bool | None:
    if asked is None:
        return None
    pairs = [b for b in seen if isinstance(b, (tuple, list)) and len(b) == 2]
    return any(
        all(a is None or (isinstance(s, (int, float)) and abs(a - s) < 1e-9) for a, s in zip(asked, pair, strict=True))
        for pair in pairs
    )


def _group_rates(optimizer: Optimizer, group: ParamGroup, curves: dict[tuple[int, int], Projected]) -> list[float]:
    """Every rate that a config's learning rate may rightly be: at the start, as set, watched, or at the peak."""
    out = [v for n in ("lr", "initial_lr") if isinstance(v := group.hyperparameters.get(n), (int, float))]
    seen = curves.get((optimizer.id, group.index))
    if seen is not None:
        out += [rate for _, rate in seen.observed]
        out += [seen.peak_rate] if seen.peak_rate is not None else []
    return [float(v) for v in out]


def _rate_text(optimizer: Optimizer, group: ParamGroup, curves: dict[tuple[int, int], Projected]) -> str:
    seen = curves.get((optimizer.id, group.index))
    if seen is None:
        rate = group.hyperparameters.get("lr")
        return value_text(rate) if rate is not None else ""
    return card_schedule.rate_words(seen)


def _by_group(texts: list[str]) -> str:
    """``3e-5`` when all groups agree, else each in turn."""
    if len(set(texts)) == 1:
        return texts[0]
    if len(texts) > _MANY_GROUPS:
        kinds = list(dict.fromkeys(texts))
        if len(kinds) > _MANY_GROUPS:
            return f"{'; '.join(kinds[:3])}; ... ({len(texts)} groups)"
        return "; ".join(f"{text} ({plural(texts.count(text), 'group')})" for text in kinds)
    return "; ".join(f"group {i}: {text}" for i, text in enumerate(texts))
