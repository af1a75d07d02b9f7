"""What went wrong with the job itself: the program died, hung, never stepped; and how short the watch was."""

from __future__ import annotations

from dataclasses import dataclass

from trainlint.recording.boundary import text as boundary_text
from trainlint.recording.describe import place, plural
from trainlint.recording.schema import Backward, Ending, OptimizerStep, Recording
from trainlint.recording.timeline import of_kind


@dataclass(frozen=True)
class Course:
    """How the watch went."""

    troubles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    #: The program ended, was ended or never began before its first optimizer step.
    no_step: bool = False
    #: It never stepped although it had every chance to: a check may prove why.
    never_stepped: bool = False
    output: tuple[str, ...] = ()


def course(recording: Recording, hint: str = "") -> Course:
    """Troubles and notes of one watch.

    Args:
        recording: what was seen, however little.
        hint: what to do, when whoever started the program knows better.
    """
    ending = recording.ending
    steps = _steps(recording)
    notes = _notes(recording, steps)
    if steps == 0:
        text = _before_first_step(recording, ending)
        todo = hint or _todo(recording, ending)
        return Course(
            troubles=(f"{text}\n{todo}" if todo else text,),
            notes=notes,
            no_step=True,
            never_stepped=ending.how == "backward-cap",
            output=_output(ending),
        )
    early = _after_some_steps(recording, ending, steps)
    if not early:
        return Course(notes=notes)
    failed = ending.how != "exit" or bool(ending.exit_code) or bool(ending.error)
    if failed:
        return Course(troubles=(f"{early}\n{hint}" if hint else early,), notes=notes, output=_output(ending))
    return Course(notes=(early, *notes))


def _steps(recording: Recording) -> int:
    """Optimizer steps seen; of several optimizers, those of the one that made the most."""
    counted: dict[int, int] = {}
    for step in of_kind(recording, OptimizerStep):
        counted[step.optimizer] = counted.get(step.optimizer, 0) + 1
    return max([*counted.values(), *(o.steps for o in recording.optimizers)], default=0)


def _output(ending: Ending) -> tuple[str, ...]:
    output = ending.last_output
    if ending.traceback and not any("Traceback" in line for line in output):
        return (*output, *ending.traceback)
    return output


def _died(ending: Ending) -> str:
    if ending.error:
        return f"died of {ending.error}"
    if ending.signal:
        return f"was killed by {ending.signal}"
    if ending.exit_code:
        return f"ended with exit code {ending.exit_code}"
    return "ended by itself"


def _at(ending: Ending) -> str:
    return f" It was at {place(ending.where)}." if ending.where is not None else ""


def _before_first_step(recording: Recording, ending: Ending) -> str:
    by = f" by {ending.signal}" if ending.signal else ""
    if ending.how == "not-started":
        return f"The program could not be started{': ' + ending.error if ending.error else '.'}"
    if ending.how == "timeout":
        return f"The time ran out before the program's first optimizer step.{_at(ending)}"
    if ending.how == "backward-cap":
        backwards = len(of_kind(recording, Backward)) + recording.events_dropped.get("backward", 0)
        return f"{plural(backwards, 'backward')} and no optimizer stepped; the program was ended.{_at(ending)}"
    if ending.how == "killed":
        return f"The program was killed{by} before its first optimizer step."
    if ending.how == "interrupted":
        return f"Interrupted before the program's first optimizer step.{_at(ending)}"
    if ending.how == "exit":
        return f"The program {_died(ending)} before its first optimizer step."
    return "No optimizer step was seen."


def _todo(recording: Recording, ending: Ending) -> str:
    torch = recording.program.torch
    if ending.how == "not-started":
        return "Check that the command runs by itself in this folder and environment."
    if ending.how == "timeout":
        return "Give it more time with --timeout SECONDS, or point it at less data for the check."
    if ending.how == "backward-cap":
        return (
            "Either optimizer.step() is never called, or the weights are updated without a torch optimizer, "
            "which trainlint does not see."
        )
    if ending.how == "killed" and ending.signal in ("SIGKILL", "9"):
        return (
            "SIGKILL from outside is most often the kernel or the cluster's scheduler ending a program that is out of "
            "memory: look at dmesg, try a smaller batch or --device cpu."
        )
    if ending.how == "exit" and not ending.exit_code and not ending.error:
        if torch is None:
            return "It never imported torch: is this the program that trains?"
        return "Is training switched off, already finished by a checkpoint it resumed from, or left to another command?"
    if ending.how == "exit":
        return (
            "Its last lines are below. Without trainlint it would most likely fail the same way, unless it needs a "
            "terminal or standard input: it has neither while it is watched."
        )
    return ""


def _after_some_steps(recording: Recording, ending: Ending, steps: int) -> str:
    wanted = recording.program.steps_wanted
    seen = f"{steps} of {plural(wanted, 'wanted optimizer step')}"
    if ending.how == "steps" or (ending.how == "exit" and steps >= wanted and not ending.exit_code):
        return ""
    if ending.how == "timeout":
        return f"The time ran out after {seen}: judged by those.{_at(ending)} --timeout SECONDS gives it more."
    if ending.how == "interrupted":
        return f"Interrupted after {seen}: judged by those."
    if ending.how == "backward-cap":
        return f"After {seen} many backwards came and no further step: judged by those.{_at(ending)}"
    if ending.how == "killed":
        by = f" by {ending.signal}" if ending.signal else ""
        return f"The program was killed{by} after {seen}: judged by those."
    if ending.how == "exit":
        return f"The program {_died(ending)} after {seen}: judged by those."
    return ""


def _notes(recording: Recording, steps: int) -> tuple[str, ...]:
    program = recording.program
    notes = []
    if steps:
        watched = f"{plural(steps, 'optimizer step')} watched"
        if recording.boundary is None:
            notes.append(f"{watched}; what shows only later, or only at the end of an epoch, was not seen.")
        else:
            notes.append(f"{watched}; epoch boundary: {boundary_text(recording.boundary)}.")
    if program.world_size > max(program.ranks_seen, 1):
        notes.append(f"{program.ranks_seen} of {program.world_size} ranks were watched.")
    if recording.events_dropped:
        dropped = ", ".join(f"{n} {kind}" for kind, n in sorted(recording.events_dropped.items()))
        notes.append(f"Too many events to keep all; left out: {dropped}.")
    if recording.problems:
        first = recording.problems[0]
        more = f", and {len(recording.problems) - 1} more" if len(recording.problems) > 1 else ""
        notes.append(f"The recorder could not do everything: {first.where}: {first.error}{more}.")
    return tuple(notes)
