"""The run folder, checked against a model of it: two processes write runs, and all is done to their folders that people and machines do.

    python -m nbs_tests.benchmarks.run_folder_model --sequences 10000

Folders are deleted, moved (also back), copied and begun anew, locks removed, processes killed at any instant, forked and sent to another
working directory, clocks set, disks full, locks not there at all. After each action: nobody wrote into a folder that another one holds or
that it has not taken up, and no folder lost its newest whole checkpoint. What nobody disturbed must work.

A run here is all of `RunDirectory`; only weights, tokenizer and the flushing to the disk are left out, so that a sequence takes a moment.
The actions are drawn here, by seed: hypothesis draws short sequences, and cannot shorten one in which a process is killed at some instant.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Container
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fulltune_nb.errors import FulltuneError
from fulltune_nb.files import write_text
from fulltune_nb.training import lock, run, state
from fulltune_nb.training.history import Event
from fulltune_nb.training.run import RunDirectory

NAMES = ("a", "b")
PROJECTS = ("one", "two")
STATE = {
    "rate_factor": 1.0, "patience": {"best_loss": None, "waited": 0, "last_step": -1}, "config": {}, "model_source": None,
    "data": {"source": None, "fingerprint": ""}, "history": [], "random": [0, 0], "versions": {}, "optimizer_steps_before": 0,
    "backward": "whole",
}  # fmt: skip


class Config:
    """Settings, which take longer to write than all else here."""

    def to_yaml(self, path: Path, heading: str) -> None:
        write_text(path, heading)


LM = SimpleNamespace(model=None, tokenizer=None, generation_config=None, trained_ends=())


class Worker:
    """What a process that trains does with its folder, without the training."""

    def __init__(self):
        self.directory: RunDirectory | None = None
        self.step, self.is_full, self.has_locks, self.clock = 0, False, True, 0
        self._leave_out()

    def _leave_out(self) -> None:
        def fill_folder(folder: Path, *_: Any, **__: Any) -> dict:
            (folder / "config.json").write_text("{}")
            self._fail_if_full()
            return {}

        def append_line(path: Path, line: str, **_: Any) -> None:
            self._fail_if_full()
            append(path, line)

        def flock(descriptor: int, what: int) -> None:
            if not self.has_locks:
                raise OSError(95, "Operation not supported")
            lock_file(descriptor, what)

        append, run.append_line = run.append_line, append_line
        lock_file, lock.fcntl.flock = lock.fcntl.flock, flock
        now, when = time.time, lock.psutil.Process.create_time
        time.time = lambda: now() + self.clock
        lock.psutil.Process.create_time = lambda process: when(process) + self.clock
        state.fill_folder, state.parameters_of, state.check_space = fill_folder, lambda model: {}, lambda *_: None
        state.bytes_to_save = lambda tokenizer: 0
        os.fsync = lambda descriptor: None

    def _fail_if_full(self) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")

    def set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def chdir(self, project: str) -> None:
        os.chdir(project)

    def begin(self, name: str) -> None:
        self.close()
        directory = RunDirectory.create(name, Config())
        self.step = 0
        self._save(directory)

    def resume(self, name: str) -> None:
        self.close()
        directory = RunDirectory.open(run.absolute(name))
        try:
            self.step = state.newest_whole(directory.path)[1]["step"]
        except FulltuneError:
            directory.close()
            raise
        directory.lock.keep()
        self.directory = directory

    def move(self, name: str) -> None:
        before = self.directory
        self._save(RunDirectory.create(name, Config()))
        before.close()

    def _save(self, directory: RunDirectory) -> None:
        try:
            directory.save_checkpoint(LM, self._state(), 2)
        except FulltuneError:
            directory.close()
            raise
        self.directory = directory

    def _state(self) -> Any:
        return SimpleNamespace(step=self.step, optimizer_arrays={}, to_json=lambda: {**STATE, "step": self.step})

    def write(self) -> None:
        self.directory.append(Event(self.step, "note", "a step", 0.0))
        self.step += 1

    def save(self) -> None:
        self.directory.save_checkpoint(LM, self._state(), 2)

    def finish(self) -> None:
        self.directory.write_result({"steps": self.step})
        self.directory.rewrite_metrics([])
        self.directory.write_config(Config())

    def close(self) -> None:
        if self.directory is not None:
            self.directory.close()
            self.directory = None

    def fork(self) -> tuple[int, bool]:
        """A child that lives on. Returns its number, and whether it could write."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                self.write()
                os.write(write, b"w")
            except FulltuneError:
                os.write(write, b"-")
            self.directory = None  # its finalizers run
            time.sleep(1000)
            os._exit(0)
        answer = os.read(read, 1)
        os.close(read)
        os.close(write)
        return child, answer == b"w"


def work(pipe: Connection) -> None:
    """The process: does what it is told, and answers ("done", value), ("refused", message) or ("failed", traceback)."""
    worker = Worker()
    while True:
        name, *arguments = pipe.recv()
        try:
            pipe.send(("done", getattr(worker, name)(*arguments)))
        except FulltuneError as error:
            pipe.send(("refused", str(error)))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


class Process:
    """A worker's process, and what the model knows of it."""

    held: int | None = None  # the number (inode) of the folder that it has taken up
    path: Path | None = None
    project: Path
    is_full = False

    def __init__(self):
        self.pipe, other = Pipe()
        sys.stdout.flush()
        self.number = os.fork()
        if self.number == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                self.pipe.close()
                work(other)
            finally:
                os._exit(0)
        other.close()

    def ask(self, *what: Any) -> tuple[str, Any]:
        self.pipe.send(what)
        kind, value = self.pipe.recv()
        assert kind != "failed", value
        return kind, value

    def start(self, project: Path, has_locks: bool) -> None:
        for what in (("close",), ("set", "is_full", False), ("set", "has_locks", has_locks), ("chdir", str(project))):
            self.ask(*what)
        self.held = self.path = None
        self.project, self.is_full = project, False

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)
        os.waitpid(self.number, 0)
        self.pipe.close()


class Sequence:
    """Actions upon two processes and their folders; `owner` and `saved` are the model."""

    def __init__(self, seed: int, processes: list[Process], counts: Counter):
        self.random, self.processes, self.counts, self.done = random.Random(seed), processes, counts, []
        self.root, self.has_locks, self.count = Path(tempfile.mkdtemp(prefix="fulltune-model-")), self.random.random() < 0.7, 0
        for project in PROJECTS:
            (self.root / project).mkdir()
        for process in processes:
            process.start(self.root / PROJECTS[0], self.has_locks)
        self.owner: dict[int, Process] = {}  # folder -> who has taken it up last, if it lives
        self.unlocked: set[int] = set()  # folders whose lock somebody has removed
        self.saved: dict[int, int] = {}  # folder -> the newest step of which a checkpoint was whole
        self.children: list[int] = []

    def go(self, length: int) -> None:
        """The actions, one after the other.

        Raises:
            AssertionError: a promise was broken.
        """
        actions = {
            self.take_up: 5, self.write: 12, self.move_run: 1, self.kill: 2, self.fork: 1, self.chdir: 1, self.disk_and_clock: 1,
            self.disturb: 3,
        }  # fmt: skip
        try:
            for action in self.random.choices(list(actions), list(actions.values()), k=length):
                action(self.random.choice(self.processes))
        finally:
            for child in self.children:
                os.kill(child, signal.SIGKILL)
            shutil.rmtree(self.root)

    # -- what is there

    def folders(self) -> dict[int, Path]:
        return {path.stat().st_ino: path for project in PROJECTS for path in (self.root / project).iterdir()}

    def files(self) -> dict[int, dict[str, tuple[int, int, int]]]:
        """Folder -> its files, whichever name it has now."""
        found = {}
        for number, folder in self.folders().items():
            stats = ((str(path.relative_to(folder)), path.lstat()) for path in folder.rglob("*") if not path.is_dir())
            found[number] = {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in stats}
        return found

    def check_checkpoints(self, changed: Container[int] | None = None) -> None:
        folders = self.folders()
        for number in self.saved if changed is None else [number for number in self.saved if number in changed]:
            step = state.newest_whole(folders[number])[1]["step"]
            assert step >= self.saved[number], f"{folders[number]} had step {self.saved[number]}, has {step}"
            self.saved[number] = step

    def holds(self, process: Process) -> bool:
        """Whether its folder is where it was, with its lock, and nobody else's."""
        if process.held is None or not process.path.exists() or process.path.stat().st_ino != process.held:
            return False
        return self.owner.get(process.held) is process and process.held not in self.unlocked

    # -- what the processes do

    def ask(self, process: Process, *what: Any) -> str:
        before = self.files()
        kind, value = process.ask(*what)
        self.counts[what[0], kind] += 1
        self.done.append(f"{self.processes.index(process)}: {' '.join(map(str, what))}: {kind} {value or ''}")
        changed = [number for number, files in self.files().items() if before.get(number, {}) != files]
        for number in changed:
            taking = number in self.unlocked and what[0] in ("begin", "resume", "move")
            may = self.owner.get(number) in (None, process) or taking
            assert may, f"{self.folders()[number]} changed, which another process holds"
        self.check_checkpoints(changed)
        return kind

    def let_go(self, process: Process) -> None:
        if self.owner.get(process.held) is process:
            del self.owner[process.held]
            self.unlocked.discard(process.held)
        process.held = process.path = None

    def taken(self, process: Process, name: str) -> None:
        path = process.project / name
        number = path.stat().st_ino
        assert self.owner.get(number) in (None, process) or number in self.unlocked, f"{path} was taken up by two processes"
        self.let_go(process)
        process.path, process.held, self.owner[number] = path, number, process
        self.unlocked.discard(number)
        self.saved[number] = state.newest_whole(path)[1]["step"]

    def take_up(self, process: Process) -> None:
        name, how = self.random.choice(NAMES), self.random.choice(["begin", "resume"])
        path = process.project / name
        number = path.stat().st_ino if path.exists() else None
        self.let_go(process)  # which it does first
        free = self.owner.get(number) is None or number in self.unlocked
        possible = number in self.saved and free and self.has_locks if how == "resume" else number is None
        if self.ask(process, how, name) == "done":
            self.taken(process, name)
        else:  # without locks a process that lives is believed to hold what was moved or copied from it
            assert not possible or process.is_full, f"{how} {path} was refused"

    def write(self, process: Process) -> None:
        if process.held is None:
            return
        what, may = self.random.choice(["write", "save", "save", "finish"]), self.holds(process)
        kind = self.ask(process, what)
        assert may or kind == "refused", f"{what} into {process.path}, which is not its own any more"
        assert kind == "done" or process.is_full or not may, f"{what} was refused"

    def move_run(self, process: Process) -> None:
        if process.held is None:
            return
        name = self.random.choice(NAMES)
        possible = not (process.project / name).exists()
        if self.ask(process, "move", name) == "done":
            self.taken(process, name)
        else:
            assert not possible or process.is_full, "move was refused"

    def kill(self, process: Process) -> None:
        """At some instant of what it does."""
        what = self.random.choice([("begin", "a"), ("resume", "b"), ("write",), ("save",), ("save",), ("finish",)])
        if process.held is not None or len(what) > 1:
            if len(what) == 1 and not self.holds(process) or len(what) > 1 and not self._is_free(process, process.project / what[1]):
                return  # what it may not do is tried by the other actions
            process.pipe.send(what)
            time.sleep(self.random.random() * 0.004)
        self.done.append(f"{self.processes.index(process)}: killed in {what}")
        self.counts["kill", what[0]] += 1
        process.kill()
        self.let_go(process)
        new = self.processes[self.processes.index(process)] = Process()
        new.start(process.project, self.has_locks)
        self.check_checkpoints()

    def _is_free(self, process: Process, path: Path) -> bool:
        return not path.exists() or self.owner.get(path.stat().st_ino) in (None, process)

    def fork(self, process: Process) -> None:
        if process.held is not None:
            before = self.files()
            child, wrote = process.ask("fork")[1]
            self.children.append(child)
            self.done.append(f"{self.processes.index(process)}: fork")
            self.counts["fork", "done"] += 1
            assert not wrote and self.files() == before, "a forked child wrote"

    def chdir(self, process: Process) -> None:
        process.project = self.root / self.random.choice(PROJECTS)
        self.ask(process, "chdir", str(process.project))

    def disk_and_clock(self, process: Process) -> None:
        process.is_full = not process.is_full
        self.ask(process, "set", "is_full", process.is_full)
        self.ask(process, "set", "clock", self.random.randint(-5000, 5000))

    # -- what is done to the folders

    def disturb(self, _: Process) -> None:
        folders = sorted(self.folders().items(), key=lambda item: item[1])
        if not folders:
            return
        (number, path), what = self.random.choice(folders), self.random.choice(["delete", "move", "move", "copy", "unlock"])
        self.count += 1
        self.done.append(f"{what} {path}")
        self.counts["disturb", what] += 1
        project = self.root / self.random.choice(PROJECTS)
        place = next((place for name in NAMES if not (place := project / name).exists()), project / str(self.count))
        if what == "delete":
            shutil.rmtree(path)
            self.saved.pop(number, None)
            self.owner.pop(number, None)
            self.unlocked.discard(number)
            for process in self.processes:
                if process.held == number:
                    process.held = -self.count  # a later folder may get the number
        elif what == "move":
            path.rename(place)
        elif what == "copy":
            shutil.copytree(path, place)
            if number in self.saved:
                self.saved[place.stat().st_ino] = self.saved[number]
        elif (path / lock.LOCK_FILE).exists():
            (path / lock.LOCK_FILE).unlink()
            self.unlocked.add(number)


def check(seeds: range, length: int = 25) -> Counter:
    """Tries a sequence of actions for each seed. Returns how often each action came out how.

    Raises:
        AssertionError: one broke a promise; the message has the seed and what was done.
    """
    counts, processes = Counter(), [Process(), Process()]
    try:
        for seed in seeds:
            sequence = Sequence(seed, processes, counts)
            try:
                sequence.go(length)
            except BaseException as error:
                done = "\n".join(sequence.done)
                raise AssertionError(f"seed {seed}, locks {sequence.has_locks}: {error}\n{done}") from error
    finally:
        for process in processes:
            process.kill()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence")
    arguments, began = parser.parse_args(), time.perf_counter()
    found = check(range(arguments.seed, arguments.seed + arguments.sequences))
    print(", ".join(f"{what} {how} {count:,}" for (what, how), count in sorted(found.items())))
    print(f"{arguments.sequences:,} sequences: never two writers, never a lost checkpoint; {time.perf_counter() - began:.0f} s")
