"""Every system call of a save, an export and a resume that writes below its folder, or opens there, fails once: one at a time, in order.

    python -m nbs_tests.benchmarks.failing_calls

After each, what stands there is the old or the new, whole; what failed was told as a `FulltuneError`, or did no harm; and the same again
succeeds and leaves nothing beside. Each call fails in two ways, such as a full disk and a missing permission. Linux, with a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "FULLTUNE_FAILING_CALLS"
NEW = "new"


class Scenario:
    """Something that writes below `folder`; a subclass says what, and what is whole afterwards."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self) -> None:
        """All as it is before the work."""

    def work(self) -> None:
        """What fails."""
        raise NotImplementedError

    def stands(self) -> str:
        """`NEW`, or "old"; raises where what stands there is neither."""
        raise NotImplementedError


class OfARun(Scenario):
    """With a trainer at step 3 that keeps one checkpoint, that of step 2."""

    keep = 1

    def __init__(self, folder: Path):
        from nbs_tests.benchmarks import small_run

        super().__init__(folder / "run")
        small_run.SETTINGS |= {"keep": self.keep, "save_every": 2}
        self.trainer = small_run.begin(folder, self.folder)
        self.trainer.run(2)
        self.trainer.step()
        shutil.copytree(self.folder, folder / "before")
        self.before = folder / "before"

    def reset(self) -> None:
        for name in ("checkpoints", "best"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if (self.before / name).exists():
                shutil.copytree(self.before / name, self.folder / name)


class Checkpoint(OfARun):
    """`trainer.save()`, and the older checkpoint goes."""

    def work(self) -> None:
        self.trainer.save()

    def stands(self) -> str:
        from fulltune_nb.training.state import list_checkpoints, read_state

        steps = [read_state(path)["step"] for path in list_checkpoints(self.folder / "checkpoints")]
        assert steps in ([2], [2, 3], [3]), steps
        return NEW if 3 in steps else "old"


class SameCheckpoint(Checkpoint):
    """`trainer.save()` where a checkpoint of the step stands already."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.trainer.save()
        shutil.rmtree(self.before)
        shutil.copytree(self.folder, self.before)
        self.trainer.event("note", "not in the checkpoint before")

    def stands(self) -> str:
        from fulltune_nb.training.state import list_checkpoints, read_state

        (state,) = map(read_state, list_checkpoints(self.folder / "checkpoints"))
        return NEW if any(entry.get("event") == "note" for entry in state["history"]) else "old"


class Best(OfARun):
    """`best/` is written over an earlier one."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.trainer._directory.save_best(self.trainer.lm, 2)
        shutil.copytree(self.folder / "best", self.before / "best", dirs_exist_ok=True)

    def work(self) -> None:
        self.trainer._directory.save_best(self.trainer.lm, 3)

    def stands(self) -> str:
        from fulltune_nb.training.state import check_files

        check_files(self.folder / "best")
        return {2: "old", 3: NEW}[json.loads((self.folder / "best" / "trainer.json").read_text())["step"]]


class Reports(OfARun):
    """A report and an event of the run, a line each."""

    def reset(self) -> None:
        self.number = getattr(self, "number", 0) + 1

    def work(self) -> None:
        self.trainer.evaluate("valid", 1)
        self.trainer.event("note", str(self.number))

    def stands(self) -> str:
        from fulltune_nb.training.run import EVENTS_FILE, read_metrics

        (reports, bad), (events, worse) = read_metrics(self.folder), read_metrics(self.folder, EVENTS_FILE)
        assert not bad and not worse, (bad, worse)
        in_memory = self.trainer.history
        others = [report for report in in_memory if report.kind_of_report != "event"]
        assert reports == others[: len(reports)] and events == in_memory.events[: len(events)], "twice, or out of order"
        return NEW if len(reports) + len(events) == len(in_memory) else "old"


class Result(OfARun):
    """`result.json` and `config.yaml`."""

    def reset(self) -> None:
        self.number = getattr(self, "number", 0) + 1

    def work(self) -> None:
        self.trainer._directory.write_result({**self.trainer.result(), "number": self.number})
        self.trainer._directory.write_config(self.trainer.config)

    def stands(self) -> str:
        import fulltune_nb as ft

        assert ft.TrainConfig.from_yaml(self.folder / "config.yaml") == self.trainer.config
        path = self.folder / "result.json"
        return NEW if path.exists() and json.loads(path.read_text())["number"] == self.number else "old"


class Resume(OfARun):
    """`Trainer.resume`, and a step."""

    keep = 2

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.trainer.save()
        del self.trainer
        gc.collect()
        shutil.rmtree(self.before)
        shutil.copytree(self.folder, self.before)

    def reset(self) -> None:
        self.resumed = None
        gc.collect()
        super().reset()

    def work(self) -> None:
        from fulltune_nb.training.trainer import Trainer

        self.resumed = None
        gc.collect()
        resumed = Trainer.resume(self.folder)
        resumed.step()
        self.resumed = resumed

    def stands(self) -> str:
        from fulltune_nb.training.state import list_checkpoints, read_state

        steps = [read_state(path)["step"] for path in list_checkpoints(self.folder / "checkpoints")]
        assert steps == [2, 3], f"a checkpoint is gone: {os.listdir(self.folder / 'checkpoints')}"
        assert self.resumed is None or self.resumed.step_count == 4, "it went on from an older checkpoint"
        return NEW if self.resumed else "old"


class Begin(Scenario):
    """A new trainer in a new folder."""

    def __init__(self, folder: Path):
        super().__init__(folder / "runs")
        self.place, self.trainer = folder, None

    def reset(self) -> None:
        self.trainer = None
        gc.collect()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def work(self) -> None:
        from nbs_tests.benchmarks import small_run

        trainer = small_run.begin(self.place, self.folder / "a")
        trainer.step()
        self.trainer = trainer

    def stands(self) -> str:
        from fulltune_nb.training.state import list_checkpoints, read_state

        for path in list_checkpoints(self.folder / "a" / "checkpoints"):
            read_state(path)
        return NEW if self.trainer else "old"


class OfAModel(Scenario):
    """With a model."""

    def __init__(self, folder: Path):
        from fulltune_nb.models.language_model import load_model

        super().__init__(folder / "out")
        self.lm = load_model(folder / "base")

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()


class Export(OfAModel):
    """A model folder in the place of an earlier one."""

    def reset(self) -> None:
        from fulltune_nb.models.model_file import export_folder

        super().reset()
        export_folder(self.lm, self.folder / "model", {"number": 1})

    def work(self) -> None:
        from fulltune_nb.models.model_file import export_folder

        export_folder(self.lm, self.folder / "model", {"number": 2})

    def stands(self) -> str:
        from fulltune_nb.models.model_file import _is_unchanged_export

        folders = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        # One that could not be read stays, and the new one stands beside it.
        assert self.folder / "model" in folders and all(map(_is_unchanged_export, folders))
        return NEW if 2 in [json.loads((path / "fulltune_nb.json").read_text())["number"] for path in folders] else "old"


class Save(OfAModel):
    """`lm.save` into a new folder."""

    def work(self) -> None:
        if self.stands() == "old":  # it is not saved over
            self.lm.save(self.folder / "model")

    def stands(self) -> str:
        if not (self.folder / "model").exists():
            return "old"
        assert sorted(os.listdir(self.folder / "model")) == sorted(os.listdir(self.lm.source))
        return NEW


class SaveIntoEmpty(Save):
    """`lm.save` into an empty folder that is there."""

    def reset(self) -> None:
        super().reset()
        (self.folder / "model").mkdir()

    def stands(self) -> str:
        return super().stands() if os.listdir(self.folder / "model") else "old"


class ModelFile(OfAModel):
    """A model file over an earlier one."""

    def __init__(self, folder: Path, ending: str = ".safetensors"):
        super().__init__(folder)
        self.path = self.folder / f"weights{ending}"

    def write(self, number: int) -> None:
        import mlx.core as mx

        from fulltune_nb.models.model_file import save_model_file

        self.lm.model.norm.weight = mx.full(self.lm.model.norm.weight.shape, number)
        save_model_file(self.path, self.lm, template_date=str(number))

    def reset(self) -> None:
        super().reset()
        self.write(1)

    def work(self) -> None:
        self.write(2)

    def stands(self) -> str:
        from fulltune_nb.models.model_file import read_metadata
        from fulltune_nb.tensor_files import read_tensors

        number = int(read_tensors(self.path)["model.norm.weight"][0].item())
        assert read_metadata(self.path)["template_date"] == str(number), "texts of other weights"
        return {1: "old", 2: NEW}[number]


class Npz(ModelFile):
    """The same as npz, with the small file beside it."""

    def __init__(self, folder: Path):
        super().__init__(folder, ".npz")


SCENARIOS = {
    "checkpoint": Checkpoint, "same-checkpoint": SameCheckpoint, "best": Best, "reports": Reports, "result": Result, "resume": Resume,
    "begin": Begin, "export": Export, "save": Save, "save-into-empty": SaveIntoEmpty, "model-file": ModelFile, "npz": Npz,
}  # fmt: skip


def instants(scenario: Scenario, way: int, every: int, first: int) -> Iterator[tuple[str, list[str]]]:
    """For each call that fails: which it is, and what is wrong afterwards."""
    from fulltune_nb.errors import FulltuneError

    library = ctypes.CDLL(None)
    library.failed.restype = ctypes.c_char_p
    number = first
    while True:
        scenario.reset()
        wrong, told = [], False
        library.arm(os.fsencode(scenario.folder), number, way)
        try:
            scenario.work()
        except FulltuneError:
            told = True
        except BaseException as error:
            wrong.append(f"a bare {type(error).__name__}: {error}")
        call = os.fsdecode(library.failed())
        if not call:
            return
        wrong += check(scenario.stands, allowed=("old", NEW) if told else (NEW,))
        try:
            scenario.work()
            wrong += check(scenario.stands, allowed=(NEW,))
        except Exception as error:
            wrong.append(f"the same again fails: {type(error).__name__}: {error}")
        wrong += [f"left over: {path}" for path in scenario.folder.rglob(".*")]
        yield call, wrong
        number += every


def check(stands: Callable[[], str], allowed: tuple[str, ...]) -> list[str]:
    """What is wrong with what stands there."""
    try:
        found = stands()
        return [] if found in allowed else [f"what stands there is the {found}, and nothing was told"]
    except Exception as error:
        return [f"what stands there is not whole: {type(error).__name__}: {error}"]


def main(names: list[str], ways: list[int], every: int, first: int) -> int:
    """Returns the exit code: 0 where nothing is wrong after any call."""
    from nbs_tests.benchmarks import small_run

    os.environ.update(TOKENIZERS_PARALLELISM="false", FULLTUNE_PROGRESS="off")
    failed, tried = 0, Counter()
    base = Path(tempfile.mkdtemp(prefix="fulltune-calls-"))
    small_run.prepare(base)
    for name in names:
        for way in ways:
            folder = base / f"{name}-{way}"
            shutil.copytree(base / "base", folder / "base")
            shutil.copytree(base / "data", folder / "data")
            count = 0
            scenario = SCENARIOS[name](folder)
            for call, wrong in instants(scenario, way, every, first):
                count += 1
                tried[call.split()[0]] += 1
                for line in wrong:
                    print(f"{name}, {call.replace(str(folder), '')}: {line}", flush=True)
                failed += bool(wrong)
            print(f"{name}, way {way}: {count} calls failed", flush=True)
    kinds = ", ".join(f"{count} {kind}" for kind, count in tried.most_common())
    print(f"{sum(tried.values())} calls failed ({kinds}); something was wrong after {failed}")
    shutil.rmtree(base, ignore_errors=True)
    return 1 if failed else 0


def with_shim() -> int:
    """This command again, in a process whose calls can be made to fail."""
    with tempfile.TemporaryDirectory() as place:
        shim, source = f"{place}/failing_calls.so", Path(__file__).with_suffix(".c")
        subprocess.run([os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-o", shim, str(source), "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": shim, VARIABLE: "1"}
        return subprocess.run([sys.executable, "-m", "nbs_tests.benchmarks.failing_calls", *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--ways", nargs="+", type=int, choices=[0, 1], default=[0, 1], help="0: a full disk above all; 1: permissions")
    parser.add_argument("--every", type=int, default=1, help="only each n-th call")
    parser.add_argument("--first", type=int, default=1, help="the first call to fail")
    arguments = parser.parse_args()
    if VARIABLE not in os.environ:
        raise SystemExit(with_shim())
    raise SystemExit(main(arguments.scenarios, arguments.ways, arguments.every, arguments.first))
