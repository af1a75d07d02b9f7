"""Starts the program, follows it, and ends it so that nothing of it runs on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from trainlint.launch.endings import Evidence, Outcome, describe, where_from_dump
from trainlint.launch.marks import Marks, Worker
from trainlint.launch.memory import MemoryWatch
from trainlint.launch.model import Launch, LaunchError, Progress, Watched, WatchOptions
from trainlint.launch.output import Output
from trainlint.launch.prepare import Folder, Prepared, prepare
from trainlint.launch.processes import Tree, environment_of, look, send
from trainlint.launch.routes import config_secrets
from trainlint.launch.secrets import redact, secrets_in_arguments, secrets_in_environment
from trainlint.recording.schema import SourceLine

#: How often the streams are looked at; a parked program waits this long at most.
POLL_S = 0.02
#: How often the process tree is looked at.
TREE_S = 0.5
#: A program that has made its steps parks when it begins something new. One that begins nothing is ended after this
#: long, or three of its steps; longer while the recorder has not said that it has written everything.
GRACE_S = 3.0
WRITING_GRACE_S = 15.0
#: How long ranks that are late are waited for once the first has parked.
LATE_RANK_S = 10.0
#: A program that passes the end of its epoch parks by itself when it has taken too long, unless it begins nothing.
BOUNDARY_GRACE_S = 0.5
#: A launcher that has gone while its workers live is followed as long as they do; helpers get this long to leave.
LINGER_S = 1.0


def watch(launch: Launch, options: WatchOptions, run_folder: Folder, progress: Progress) -> Watched:
    """Start the program, watch it until its steps are made or it ends, and leave none of its processes behind.

    What the program's processes recorded lies in ``run_folder.path / "stream"`` afterwards. Files are not restored
    here: call ``run_folder.restore()`` when this has returned or raised.

    Ctrl-C, SIGTERM and SIGHUP end the program and give an ending ``interrupted``; they are not raised, so that what was
    seen can still be reported.

    Raises:
        LaunchError: the program could not be started.
    """
    prepared = prepare(launch, options, run_folder)
    return _Watch(launch, options, run_folder, progress, prepared).run()


class _Watch:
    def __init__(
        self, launch: Launch, options: WatchOptions, folder: Folder, progress: Progress, prepared: Prepared
    ) -> None:
        self.launch = launch
        self.options = options
        self.folder = folder
        self.progress = progress
        self.prepared = prepared
        self.marks = Marks(folder.path / "stream")
        self.memory = MemoryWatch()
        secrets = set(options.secrets) | secrets_in_environment(os.environ) | secrets_in_arguments(launch.command)
        secrets |= config_secrets(launch.config) | secrets_in_arguments(launch.overrides)
        ordered = sorted(secrets, key=len, reverse=True)
        self.redact: Callable[[str], str] = lambda text: redact(text, ordered)
        #: Names of the signals that asked trainlint to end.
        self.asked_to_stop: list[str] = []
        self._phase = ""
        self._next_tree = 0.0

    def run(self) -> Watched:
        began = time.monotonic()
        with _signals_noted(self.asked_to_stop):
            process, output = self._start()
            tree = Tree(process.pid, self.folder.run_id)
            outcome = Outcome("interrupted")
            try:
                outcome = self._follow(process, tree)
            finally:
                self._end(process, tree, output, outcome)
        return self._result(outcome, output.last_lines, began)

    # -- starting

    def _start(self) -> tuple[subprocess.Popen[bytes], Output]:
        self._say(f"starting {self.launch.shown}")
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                self.prepared.command,
                cwd=self.prepared.cwd,
                env=dict(self.prepared.env),
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            os.close(reading)
            os.close(writing)
            why = getattr(error, "strerror", None) or str(error)
            raise LaunchError(
                f"{self.prepared.command[0]} could not be started: {why}.",
                "A script without a first line #! needs its interpreter before it."
                if getattr(error, "errno", 0) == 8
                else "",
            ) from None
        os.close(writing)
        output = Output(reading, self.folder.path / "output.log", self.progress.output, self.redact)
        output.start()
        return process, output

    # -- following

    def _follow(self, process: subprocess.Popen[bytes], tree: Tree) -> Outcome:
        now = time.monotonic()
        deadline = now + self.options.timeout_s
        stepped = False
        gone_at: float | None = None
        while True:
            self._read()
            now = time.monotonic()
            if self.asked_to_stop:
                return Outcome("interrupted", interrupted_by=self.asked_to_stop[0], where=self._where(tree))
            if self.marks.most_steps and not stepped:
                stepped = True
                deadline = now + self.options.timeout_s
            if self._complete(now):
                if self._made_its_steps():
                    held = [w for w in self.marks.trainers if w.boundary_at is not None and w.parked_at is None]
                    return Outcome("steps", where=self._where(tree) if held else None)
                return Outcome("backward-cap", where=self._where(tree))
            if now >= self._next_tree:
                self._next_tree = now + TREE_S
                members = tree.members()
                self.memory.sample(p.pid for p in members)
            returncode = process.poll()
            if returncode is not None:
                gone_at = now if gone_at is None else gone_at
                if not self._workers_live_on(tree, now - gone_at):
                    self._read()  # what was written between the last look and the end
                    return Outcome("steps" if self._made_its_steps() else "exited", returncode)
            # Once the steps are made, what follows has a limit of its own.
            if now > deadline and not self._made_its_steps():
                return Outcome("timeout", where=self._where(tree), timeout_s=self.options.timeout_s)
            time.sleep(POLL_S)

    def _made_its_steps(self) -> bool:
        return any(worker.done_at is not None or worker.parked == "steps" for worker in self.marks.trainers)

    def _read(self) -> None:
        for step in self.marks.read():
            first = min(self.marks.trainers, key=lambda w: (w.rank, w.pid))
            if not self._made_its_steps():
                self._say("training")
            if step.pid == first.pid:
                self.progress.step(step.optimizer, step.index, self.options.steps)
        if any(worker.boundary_at is not None for worker in self.marks.trainers):
            self._say("passing the end of the epoch")
        if not self.marks.most_steps:
            if self.marks.seen_backward:
                self._say("first backward")
            elif self.marks.seen_torch:
                self._say("torch is imported")

    def _say(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self.progress.phase(phase)

    def _complete(self, now: float) -> bool:
        """Whether every process that trains has made its steps and is parked, or has had time enough to."""
        workers = self.marks.workers.values()
        stopped = [w for w in (w.parked_at if w.parked_at is not None else w.done_at for w in workers) if w is not None]
        if not stopped:
            return False
        running = [w for w in workers if w.parked_at is None]
        late = [w for w in running if w.done_at is None and self._may_train(w) and _exists(w.pid)]
        if late and now - min(stopped) <= max(LATE_RANK_S, 5 * max(w.step_s for w in workers)):
            return False
        # Also one that is gone: the program may be about to end by itself, and its exit status is worth the wait.
        return all(now > _grace_ends(w) for w in running if w.done_at is not None)

    def _may_train(self, worker: Worker) -> bool:
        """It trains, or its environment makes it a rank that has not begun to."""
        if worker.trains or not worker.torch:
            return worker.trains
        rank = environment_of(worker.pid).get(b"RANK", b"")
        return rank.isdigit() and int(rank) not in {other.rank for other in self.marks.trainers}

    def _workers_live_on(self, tree: Tree, gone_s: float) -> bool:
        """After the started program is gone: whether processes that train, or may, are left (``train.py &``)."""
        alive = {process.pid for process in tree.members()}
        left = [w for w in self.marks.workers.values() if w.pid in alive and not w.finished]
        if any(worker.torch or worker.trains for worker in left):
            return True
        return bool(left) and gone_s < LINGER_S

    def _where(self, tree: Tree) -> SourceLine | None:
        """Ask the processes for their stacks, the one that trains first."""
        alive = {process.pid for process in tree.members()}
        workers = [worker for worker in self.marks.workers.values() if worker.pid in alive]
        workers.sort(key=lambda w: (not w.trains, not w.torch, w.rank, w.pid))
        for worker in workers[:4]:
            for file in (self.folder.path / "stream").glob(f"where-{worker.pid}-*.txt"):
                number = file.stem.rpartition("-")[2]
                if number.isdigit():
                    send([worker.pid], int(number))
                    found = _wait_for_dump(file)
                    if found is not None:
                        return found
        return None

    # -- ending

    def _end(self, process: subprocess.Popen[bytes], tree: Tree, output: Output, outcome: Outcome) -> None:
        if outcome.how != "exited":
            self._say("stopping the program")
        left = tree.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        output.finish()
        self.marks.read()
        if left:
            self.progress.warn(f"These processes of the program could not be ended: {', '.join(map(str, left))}.")

    def _result(self, outcome: Outcome, output: tuple[str, ...], began: float) -> Watched:
        interpreter = self.launch.interpreter
        evidence = Evidence(self.folder.path, self.marks, output, self.memory, interpreter, self.redact)
        ending, hint = describe(outcome, evidence)
        first = self.marks.first_step
        return Watched(
            ending=ending,
            run_dir=self.folder.path,
            command=self.prepared.command,
            cwd=self.prepared.cwd,
            interpreter=interpreter,
            started=self.prepared.started,
            duration_s=time.monotonic() - began,
            first_step_s=max(0.0, first - self.prepared.started) if first is not None else None,
            steps=self.marks.most_steps,
            ranks=len(self.marks.trainers),
            hint=hint,
            notes=self.prepared.notes,
            configs=self.prepared.configs,
            returncode=outcome.returncode,
            stopped_at=outcome.where,
            redact=self.redact,
        )


# ------------------------------------------------------------------------------------------------ helpers


def _grace_ends(worker: Worker) -> float:
    """When a process that has made its steps and does not park has had time enough."""
    assert worker.done_at is not None
    if worker.boundary_at is not None:
        return worker.boundary_at + worker.boundary_budget_s + BOUNDARY_GRACE_S
    grace = max(GRACE_S, 3 * worker.step_s)
    if worker.closed:
        return worker.done_at + grace
    return min(max(worker.done_at + grace, worker.last_growth + GRACE_S), worker.done_at + max(WRITING_GRACE_S, grace))


def _exists(pid: int) -> bool:
    process = look(pid)
    return process is not None and not process.zombie


def _wait_for_dump(file: Path, patience_s: float = 1.0) -> SourceLine | None:
    end = time.monotonic() + patience_s
    size = -1
    while time.monotonic() < end:
        try:
            now = file.stat().st_size
        except OSError:
            return None
        if now and now == size:
            break
        size = now
        time.sleep(0.05)
    try:
        return where_from_dump(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux: the kernel kills the program when trainlint dies, however it dies."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    parent = os.getpid()

    # Between fork and exec: nothing here may import or take a lock.
    def set_death_signal() -> None:
        prctl(1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return set_death_signal


@contextlib.contextmanager
def _signals_noted(names: list[str]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP are noted, not raised: raised at the wrong line, one could leave a process behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # A hang-up that nohup has silenced stays silent.
    wanted = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in wanted:
            signal.signal(number, note)
        yield
    finally:
        for number in wanted:
            signal.signal(number, before[number])
