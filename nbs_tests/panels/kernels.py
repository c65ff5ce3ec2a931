"""Real kernels for tests: start one, run cells in it, press buttons, interrupt it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client import KernelManager

VARIABLE = "FULLTUNE_KERNEL_PYTHONS"
"""Python executables, separated as in PATH, whose ipykernel is tested too. Each needs this package installed."""

ROOT = Path(__file__).parents[2]
SETUP = """
import asyncio, gc, json, weakref
import numpy as np
import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb.tokenizer import load_tokenizer
from fulltune_nb.panels.train import TrainPanel

tokenizer = load_tokenizer(tiny.BASE_MODEL)
def make_trainer(run_dir=None, **settings):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    described = dict(model_type="llama", vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **shape)
    words = "the quick brown fox jumps over lazy dog".split()
    rows = [{"prompt": " ".join(words[i % 8:]), "completion": " ".join(words[: 1 + i % 5])} for i in range(20)]
    usual = {"batch_size": 4, "iters": 100_000, "learning_rate": 1e-3, "mask_prompt": True, "steps_per_eval": 10**6}
    config = ft.TrainConfig(**{**usual, **settings})
    data = ft.load_data({"train": rows, "valid": rows[:3]}, tokenizer, config=config)
    return ft.Trainer(ft.LanguageModel.from_config(described, tokenizer, seed=1), data, config, run_dir)
"""


def pythons() -> list[str]:
    """The executables to test with."""
    return [sys.executable, *filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))]


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def version_of(python: str) -> str:
    """Of its ipykernel."""
    code = "import importlib.metadata as m; print(m.version('ipykernel'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@dataclass
class Cell:
    """What became of an executed cell."""

    status: str = ""
    text: str = ""
    error: str = ""
    bundles: list[dict[str, Any]] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)


class Kernel:
    """One running kernel with settings of nobody."""

    def __init__(self, python: str, folder: Path):
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        environment = {**os.environ, **{name: str(folder / name.lower()) for name in names}, "FULLTUNE_PROGRESS": "auto"}
        environment.pop("MPLBACKEND", None)
        self.manager = KernelManager(kernel_name="python3")
        self.manager.connection_file = str(folder / "kernel.json")
        self.manager.kernel_spec.argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.manager.start_kernel(env=environment, cwd=str(ROOT))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.subshell: str | None = None

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def send(self, code: str, cell_id: str = "") -> str:
        """Starts a cell and returns its message's id, for `outcome`."""
        message = self.client.session.msg("execute_request", _request(code), metadata={"cellId": cell_id} if cell_id else {})
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def outcome(self, request: str, timeout: float = 60) -> Cell:
        """Waits for the end of a cell."""
        cell, end, idle = Cell(), time.monotonic() + timeout, False
        while not (idle and cell.status):
            if time.monotonic() > end:
                raise TimeoutError(f"no end of the cell after {timeout} s; so far: {cell}")
            for channel in (self.client.iopub_channel, self.client.shell_channel):
                while channel.msg_ready():
                    message = channel.get_msg(timeout=1)
                    if message["parent_header"].get("msg_id") == request:
                        idle |= _take(cell, message)
            time.sleep(0.005)
        return cell

    def run(self, code: str, cell_id: str = "", timeout: float = 60) -> Cell:
        """Runs a cell to its end. A cell that raises is an error here."""
        cell = self.outcome(self.send(code, cell_id), timeout)
        assert cell.status == "ok", cell.error
        return cell

    def value(self, expression: str) -> Any:
        """The value of an expression, as JSON carries it."""
        import json

        return json.loads(self.run(f"print(json.dumps({expression}))").text)

    def use_subshell(self) -> None:
        """From now on, buttons' messages go through a subshell, as JupyterLab sends them."""
        message = self.client.session.msg("create_subshell_request", {})
        self.client.control_channel.send(message)
        reply = self.client.get_control_msg(timeout=20)
        self.subshell = reply["content"]["subshell_id"]

    def told(self, model: str, words: str, timeout: float = 20) -> float:
        """Waits until a widget's state is sent with some words in it; the time then, as `time.monotonic` has it."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.client.iopub_channel.msg_ready():
                content = self.client.iopub_channel.get_msg(timeout=1)["content"]
                if content.get("comm_id") == model and words in str(content["data"].get("state")):
                    return time.monotonic()
            time.sleep(0.002)
        raise TimeoutError(f"{words!r} was not said within {timeout} s")

    def press(self, model: str) -> None:
        """Clicks a button."""
        self._tell_widget(model, {"method": "custom", "content": {"event": "click"}})

    def enter(self, model: str, **values: Any) -> None:
        """Types into a field."""
        self._tell_widget(model, {"method": "update", "state": values, "buffer_paths": []})

    def _tell_widget(self, model: str, data: dict[str, Any]) -> None:
        message = self.client.session.msg("comm_msg", {"comm_id": model, "data": data})
        if self.subshell:
            message["header"]["subshell_id"] = self.subshell
        self.client.shell_channel.send(message)

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()


def _request(code: str) -> dict[str, Any]:
    return {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False, "stop_on_error": True}


def _take(cell: Cell, message: dict[str, Any]) -> bool:
    """Adds a message to a cell; whether it says that the kernel is idle again."""
    kind, content = message["header"]["msg_type"], message["content"]
    if kind == "stream":
        cell.text += content["text"]
    elif kind in ("display_data", "execute_result"):
        cell.bundles.append(content["data"])
    elif kind == "update_display_data":
        cell.updates.append(content["data"])
    elif kind == "error":
        cell.error = "\n".join([content["ename"], content["evalue"], *content["traceback"]])
    elif kind == "execute_reply":
        cell.status = content["status"]
    return kind == "status" and content["execution_state"] == "idle"
