"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`, extra `eval`) on a model in memory, such as one that is being trained.

    from fulltune_nb.insight.harness import evaluate_tasks

    before = evaluate_tasks(lm, ["arc_easy", "hellaswag"], limit=200)
    trainer.run()
    after = evaluate_tasks(lm, ["arc_easy", "hellaswag"], limit=200)
    before.beside(after)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fulltune_nb.chat_template import ChatRenderer, ensure_chat_template
from fulltune_nb.errors import ConfigError, optional_import
from fulltune_nb.frames import frame
from fulltune_nb.html import table
from fulltune_nb.insight.predictions import token_statistics
from fulltune_nb.models.language_model import LanguageModel

with optional_import("evaluating by lm_eval's tasks", "eval"):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

_NO_LIMIT = 2048  # tokens of a row where neither configuration nor tokenizer tells, as in lm_eval's own models
_DRAWING = ("temperature", "top_p", "top_k", "min_p")


class HarnessModel(TemplateLM):
    """A model as `lm_eval` asks for one: `lm_eval.simple_evaluate(HarnessModel(lm), tasks=[...])`.

    Log-likelihoods are sums of float32 losses, in nats; rows are read side by side, without an effect on them beyond rounding. The weights
    are those of the moment.

    Attributes:
        lm: the model.
        max_length: tokens of a row at most; of a longer one the beginning is cut off, as in lm_eval's own models.
        max_gen_toks: tokens of an answer, where a task does not say.
    """

    max_gen_toks = 256

    def __init__(self, lm: LanguageModel, batch_size: int = 32):
        super().__init__()
        self.lm, self.tokenizer, self.batch_size = lm, lm.tokenizer, batch_size
        self.max_length = lm.context_length or _NO_LIMIT

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the BOS, or the EOS where there is none."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """By which lm_eval tells what it cached."""
        return str(self.tokenizer.name_or_path or self.lm.source).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's token ids, with the special tokens that its tokenizer adds unless told otherwise, but no second BOS."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a text, by the tokenizer's chat template, within its bounds."""
        ensure_chat_template(self.tokenizer)
        if not add_generation_prompt:
            raise ConfigError("An answer that is begun by the task (gen_prefix) is not supported together with the chat template.")
        return ChatRenderer(self.tokenizer).render(chat_history, add_generation_prompt=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` that predict each token once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((("", text), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        self.lm.check_whole()
        rows = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(f"A task has a continuation of {len(continuation):,} tokens; 1 to {self.max_length:,} can be scored.")
            rows.append(np.array([*context, *continuation][-self.max_length - 1 :], dtype=np.int32))
        scored = [len(continuation) for _, _, continuation in requests]
        found = []
        for last, statistics in zip(scored, token_statistics(self.lm.model, rows, alternatives=1, last=scored), strict=True):
            losses, ranks = statistics.losses[-last:], statistics.ranks[-last:]
            found.append((-float(losses.sum(dtype=np.float64)), bool((ranks == 1).all())))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each text, up to the texts that end an answer; those of equal settings side by side.

        Raises:
            ConfigError: a task asks for a way to draw that there is not, such as beams.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for numbers in groups.values():
            settings = self._settings(requests[numbers[0]].args[1])
            room = self.max_length - settings["max_tokens"]
            if room < 1:
                raise ConfigError(f"A task asks for {settings['max_tokens']:,} tokens; a row has at most {self.max_length:,}.")
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            for number, text in zip(numbers, self.lm.generate_many(prompts, self.batch_size, **settings), strict=True):
                answers[number] = text
        return answers

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A task's settings of generation in our words."""
        settings = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        stops, most, draws = settings.pop("until", []), settings.pop("max_gen_toks"), settings.pop("do_sample", False)
        if unknown := [name for name in settings if name not in _DRAWING]:
            raise ConfigError(f"A task asks for {unknown[0]}={settings[unknown[0]]!r:.80} in generation; there are {', '.join(_DRAWING)}.")
        drawing = {"temperature": 1.0, **settings, "seed": 0} if draws else {}
        return {"max_tokens": most, "stop": [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop], **drawing}


@dataclass(frozen=True)
class TaskScore:
    """A task's score by one metric."""

    task: str
    metric: str
    """With the filter that answers go through, where there is one: `"exact_match, strict-match"`."""
    value: float
    stderr: float | None
    samples: int
    higher_is_better: bool | None


class TaskScores:
    """What `evaluate_tasks` returns.

    Attributes:
        columns: name -> scores; one name, or several where results stand side by side.
        results: what `lm_eval.simple_evaluate` returned, by the same names.
    """

    def __init__(self, columns: Mapping[str, Sequence[TaskScore]], results: Mapping[str, Any]):
        self.columns = {name: list(scores) for name, scores in columns.items()}
        self.results = dict(results)

    def beside(self, other: TaskScores) -> TaskScores:
        """Both in one table; columns of the same name are told apart by a number."""
        columns, results = dict(self.columns), dict(self.results)
        for name, scores in other.columns.items():
            new, number = name, 1
            while new in columns:
                number += 1
                new = f"{name} ({number})"
            columns[new], results[new] = scores, other.results[name]
        return TaskScores(columns, results)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each task and metric, with value and standard error of each column; None where a column has not got it."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name, scores in self.columns.items():
            for score in scores:
                row = found.setdefault((score.task, score.metric), {"task": score.task, "metric": score.metric})
                better = {True: "higher", False: "lower", None: ""}[score.higher_is_better]
                row |= {"better": better, "samples": score.samples, name: score.value, f"{name} ±": score.stderr}
        empty = {key: None for name in self.columns for key in (name, f"{name} ±")}
        return [{"task": "", "metric": "", "better": "", "samples": 0, **empty, **row} for row in found.values()]

    def to_frame(self) -> Any:
        """`rows` as a pandas DataFrame. Raises `MissingDependencyError` without pandas."""
        return frame(self.rows())

    def __repr__(self) -> str:
        tasks = sorted({score.task for scores in self.columns.values() for score in scores})
        return f"TaskScores({', '.join(self.columns)}: {', '.join(tasks):.200})"

    def _repr_html_(self) -> str:
        headers = ["task", "metric", "better", "samples", *self.columns]
        shown = []
        for row in self.rows():
            cells = []
            for name in self.columns:
                value, error = row[name], row[f"{name} ±"]
                cells.append("" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
            shown.append([row["task"], row["metric"], row["better"], row["samples"], *cells])
        return table(headers, shown, "Tasks of lm_eval")


@cache
def _task_manager(with_names: bool) -> TaskManager:
    """Kept, since it reads some ten thousand files to know the names of tasks: half a minute. Tasks that are told whole need none."""
    return TaskManager(include_defaults=with_names)


def evaluate_tasks(
    lm: LanguageModel,
    tasks: Sequence[Any],
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    chat: bool = False,
    batch_size: int = 32,
    name: str = "score",
    **more: Any,
) -> TaskScores:
    """Scores of a model on tasks of lm_eval.

    Args:
        lm: the model; its weights as they are now.
        tasks: names that lm_eval knows, its `Task` objects, or dicts as its YAML files hold them. Most download their data.
        num_fewshot: examples before each question; None: what the task says.
        limit: rows of a task at most, or a share of them below 1.
        chat: questions go through the chat template.
        batch_size: answers that are generated side by side.
        name: of the column.
        more: further arguments of `lm_eval.simple_evaluate`. It seeds the random states of Python, NumPy and torch; MLX's it leaves alone.

    Raises:
        ConfigError: a task asks for what there is not.
        MissingDependencyError: lm_eval is not installed.
    """
    manager = _task_manager(any(isinstance(task, str) for task in tasks))
    options = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": chat, "log_samples": False, "task_manager": manager}
    results = simple_evaluate(HarnessModel(lm, batch_size), tasks=list(tasks), **options | more)
    scores = []
    for task, values in results["results"].items():
        samples = int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if not way or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            shown = metric if way == "none" else f"{metric}, {way}"
            error = None if error is None or isinstance(error, str) else float(error)
            scores.append(TaskScore(task, shown, float(value), error, samples, better.get(metric)))
    return TaskScores({name: scores}, {name: results})
