"""The process that runs chat templates, so that what one takes of time and memory is no other's. `ChatRenderer` starts it and asks it.

The file is run as a script and imports nothing of the package. It reads batches of pickled requests from standard input, each behind its
length, and writes the answers of each as a line of JSON: nothing is made of what a template says but texts and numbers.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

_TICK = 0.03  # seconds of computing between two looks at a template that runs
_BATCH = 2**24  # characters of the texts of one batch; what is left of it is asked for again
_GRACE = 1.0  # seconds after which the system ends this process, when Python could not


class LimitReached(Exception):
    """The template took too much; the message says of what."""


class _Limits:
    """Of one rendering: `seconds` of computing, `memory` bytes on top of what the process has, both ended from within where Python can.

    Where it cannot, within one operation, the system refuses the memory, and ends the process when the time is over.
    """

    def __init__(self, seconds: float, memory: int):
        self.seconds, self.memory = seconds, memory

    def __enter__(self) -> None:
        if resource is None:
            return
        self._until, self._most = time.process_time() + self.seconds, _most_memory() + self.memory
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, _TICK, _TICK)
        signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds + _GRACE)
        _limit_address_space(self.memory)

    def __exit__(self, *error: object) -> None:
        if resource is not None:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
            _limit_address_space(None)

    def _look(self, number: int, frame: object) -> None:
        if time.process_time() > self._until:
            raise LimitReached(f"it was not done after {self.seconds:g} seconds of computing")
        if _most_memory() > self._most:
            raise MemoryError


def _most_memory() -> int:
    """Bytes of memory that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _limit_address_space(more: int | None) -> None:
    """Lets the process grow by so many bytes; None: by any."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    if more is None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # macOS says only what was met
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + more if most == resource.RLIM_INFINITY else min(size + more, most), most))


def answer(pickled: bytes, render: Callable[..., Any]) -> dict[str, Any]:
    """The text of a conversation and the places that the template marks; or why there is none, as "refused" or "limit"."""
    memory = 0
    try:
        request = pickle.loads(pickled)
        seconds, memory, characters = request.pop("limits")
        with _Limits(seconds, memory):
            texts, places = render(**request)
        if len(texts[0]) > characters:
            raise LimitReached(f"it made a text of {len(texts[0]):,} characters, of at most {characters:,}")
        return {"text": texts[0], "places": places[0] if places else []}
    # What is told is made of texts alone: an error from within would hold on to what the template has made.
    except MemoryError:
        return {"limit": f"it would take more than {memory / 2**20:,.0f} MiB of memory"}
    except LimitReached as error:
        return {"limit": str(error)}
    except Exception as error:  # a template is code from outside: it can raise anything
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _answers(batch: list[bytes], render: Callable[..., Any]) -> list[dict[str, Any]]:
    """Those of a batch, up to the first that met a limit."""
    found, characters = [], 0
    for pickled in batch:
        found.append(answer(pickled, render))
        characters += len(found[-1].get("text", ""))
        if "limit" in found[-1] or characters > _BATCH:
            break
    return found


def main() -> None:
    """Answers until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for whoever asks
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    sys.path[:] = json.loads(requests.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    while size := requests.read(8):
        answers_of_batch = _answers(pickle.loads(requests.read(int.from_bytes(size, "little"))), render_jinja_template)
        answers.write(json.dumps(answers_of_batch).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
