"""The model card: `README.md` of an exported folder, which says how its weights came about.

Markdown is markup too: what comes from outside (names of models and folders, settings) goes through `md`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fulltune_nb import svg
from fulltune_nb.data.dataset import DataSet
from fulltune_nb.data.read import PREFIX, stored
from fulltune_nb.html import esc
from fulltune_nb.system_info import package_versions
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import EvalReport, History

CURVE = "training_loss.svg"
LOSS = "loss (nats per token)"
_PACKAGES = ("fulltune_nb", "mlx", "transformers")
_FRONT_MATTER = 8192  # bytes of a README.md that are looked at
_ROWS = 12  # of the table of evaluations; more are thinned out
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = r"[\"']?([A-Za-z0-9][\w.-]{0,60})[\"']?"
_PLAIN = re.compile(r"[^\w ,./:+=()&;#\\-]|_|\\")  # what could mean something to Markdown; & ; # are left to `esc`


class ModelCard:
    """How a model's weights came about, kept up to date by the history it holds. It does not hold the trainer.

    Attributes:
        base: what the training began with: folder or hub id; None for random weights.
        config: the settings.
        history: every report so far.
        data: name -> text, what is known of the data.
        dequantized: the quantization that the base's weights were turned back from, in words; None where there was none.
    """

    def __init__(self, base: str | None, data: DataSet, config: TrainConfig, history: History, dequantized: str | None = None):
        self.base, self.config, self.history, self.dequantized = base, config, history, dequantized
        rows = ", ".join(f"{name} {len(split):,} rows of {split.format}" for name, split in data.splits.items())
        self.data = {"rows": rows, "source": _source_name(data.source)}
        self._data: DataSet | None = data  # until its fingerprint is first asked for

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokens and loss masks."""
        _ = self.single_turn  # while the data are there
        data, self._data = self._data, None
        return data.fingerprint

    @cached_property
    def single_turn(self) -> bool:
        """Whether each row is one question and its answer."""
        return self._data.single_turn

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.history.steps[-1].step if self.history.steps else 0

    def files(self) -> dict[str, str]:
        """File name -> text: the card, and the curve that it shows; nothing before the first step."""
        if not self.history.steps:
            return {}
        valid = [(report.step, report.loss) for report in self.history.evals if report.split == "valid"]
        training = [(report.step, report.loss) for report in self.history.steps]
        return {"README.md": self.markdown(), CURVE: svg.curves_file({"training": training, "validation": valid})}

    def markdown(self) -> str:
        """The card's text."""
        summary = self.history.summary
        facts = [
            ("base model", self._base_name()),
            *([("quantization of the base", f"{self.dequantized}; made ordinary weights before training")] if self.dequantized else []),
            *([("quantization of this model", "none")] if self.dequantized else []),
            ("data", self.data["source"]),
            ("rows", self.data["rows"]),
            ("data fingerprint (SHA-256 of tokens and masks)", self.fingerprint),
            ("optimizer steps", f"{summary.steps:,}"),
            ("trained tokens", f"{summary.tokens:,}"),
            *((f"version of {name}", version) for name, version in package_versions(_PACKAGES).items()),
        ]
        settings = [(name, json.dumps(value, default=list)) for name, value in self.config.changed().items()]
        return "\n".join([
            f"---\n{self._front_matter()}\n---\n",
            "# Model card\n",
            "Every weight of this model was fine-tuned with fulltune_nb.\n",
            _table(("", ""), facts),
            "## Held-out loss before and after\n",
            _table(("split", "step", LOSS, "perplexity", "trained tokens counted"), self._before_and_after()),
            "Loss is the mean cross-entropy over the tokens that count, perplexity its exponential.\n",
            "## Curve\n",
            f"![Loss over the optimizer steps]({CURVE})\n",
            _table(("step", "split", "loss", "perplexity"), self._curve_rows()),
            "## Settings\n",
            "Those that differ from the defaults of this version of fulltune_nb.\n",
            _table(("setting", "value"), settings),
        ])  # fmt: skip

    def _base_name(self) -> str:
        if self.base is None:
            return "random weights"
        return self.base if self._is_hub_id() else Path(self.base).name

    def _is_hub_id(self) -> bool:
        return self.base is not None and _HUB_ID.fullmatch(self.base) is not None and not Path(self.base).exists()

    def _front_matter(self) -> str:
        """What the hub reads, as YAML. Only what looks like a hub id is named, and folders of this machine nowhere in full."""
        from huggingface_hub import EvalResult, ModelCardData  # a quarter of a second

        source = self.data["source"]
        data_id = source.removeprefix(PREFIX).partition(":")[0] if source.startswith(PREFIX) else ""  # without its config
        is_hub_id = _HUB_ID.fullmatch(data_id) is not None
        losses = [
            EvalResult(
                task_type="text-generation",
                dataset_type=data_id if is_hub_id else "own",
                dataset_name=data_id if is_hub_id else source,
                dataset_split=report.split,
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for report in self._last_evals()
            for metric, name, value in (("loss", LOSS, report.loss), ("perplexity", "perplexity", report.perplexity))
            if math.isfinite(value)
        ]
        return ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            base_model=self.base if self._is_hub_id() else None,
            datasets=[data_id] if is_hub_id else None,
            tags=["fulltune_nb", "mlx"],
            model_name=f"{self.base if self._is_hub_id() else 'a model'}, fine-tuned",
            eval_results=losses or None,
            single_turn=self.single_turn,
            trained_steps=self.steps,
            **_license_of(self.base),
        ).to_yaml()

    def _last_evals(self) -> list[EvalReport]:
        """Of each held-out split the last evaluation, where it is of the weights after training."""
        reports = {report.split: report for report in self.history.evals if report.step > 0}
        return [reports[split] for split in ("test", "valid") if split in reports]

    def _before_and_after(self) -> list[tuple[object, ...]]:
        rows: list[tuple[object, ...]] = []
        for split in ("test", "valid"):
            found = [report for report in self.history.evals if report.split == split]
            before, after = [report for report in found if report.step == 0][:1], [report for report in found if report.step > 0][-1:]
            for reports, when in ((before, "before"), (after, "after")):
                rows += [(split, f"{when}: {r.step:,}", f"{r.loss:.4f}", f"{r.perplexity:,.3f}", f"{r.tokens:,}") for r in reports]
                rows += [] if reports else [(split, f"{when}: not measured", "", "", "")]
        return rows

    def _curve_rows(self) -> list[tuple[object, ...]]:
        valid = [(f"{r.step:,}", "valid", f"{r.loss:.4f}", f"{r.perplexity:,.3f}") for r in self.history.evals if r.split == "valid"]
        rows = valid or [(f"{r.step:,}", "train", f"{r.loss:.4f}", "") for r in self.history.steps]
        return [*rows[: -1 : math.ceil(len(rows) / _ROWS)], rows[-1]]


def training_of(lm: Any) -> tuple[bool, int]:
    """Whether each row that a model was last trained on is one question and its answer, and its steps (0: not known): by its trainer's
    card, or the one in the folder that it was loaded from."""
    if (card := getattr(lm, "card", None)) is not None:
        return card.single_turn, card.steps
    front = _front_matter_of(Path(getattr(lm, "source", None) or "") / "README.md")
    steps = re.search(r"^trained_steps: (\d{1,12})$", front, re.MULTILINE)
    return re.search(r"^single_turn: true$", front, re.MULTILINE) is not None, int(steps[1]) if steps else 0


def _front_matter_of(page: Path) -> str:
    """What stands between the first two lines of `---` of a card; "" where there is none."""
    try:
        with page.open("rb") if page.is_file() else io.BytesIO() as file:
            text = file.read(_FRONT_MATTER).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return ""
    return text.removeprefix("---\n").partition("\n---\n")[0] if text.startswith("---\n") else ""


def _license_of(base: str | None) -> dict[str, str]:
    """`license`, and `license_name` of one without an identifier, as the base model's card has them: what is made of it is bound by it."""
    if base is None:
        return {}
    page = Path(base) / "README.md"
    if not Path(base).exists() and _HUB_ID.fullmatch(base):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(base, "README.md")
        page = Path(found if isinstance(found, str) else "")
    front = _front_matter_of(page)
    found = {key: re.search(rf"^{key}: *{_LICENSE} *$", front, re.MULTILINE) for key in ("license", "license_name")}
    return {key: match[1] for key, match in found.items() if match} if found["license"] else {}


def _source_name(source: str | None) -> str:
    if source is None:
        return "rows in memory"
    if source.startswith("{"):  # a place for each split, or a weight for each place
        items = stored(source).items()
        return ", ".join(f"{key}: {_source_name(v)}" if isinstance(v, str) else f"{_source_name(key)} ({v:g})" for key, v in items)
    return source if source.startswith(PREFIX) else Path(source).name


def md(text: object) -> str:
    """A text as itself in Markdown: no link, image, emphasis, table border, mention or HTML comes of it."""
    safe = esc(" ".join(str(text).split()), limit=500)
    safe = _PLAIN.sub(lambda found: f"&#{ord(found[0])};" if found[0].isascii() else found[0], safe)
    return safe.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def _table(headers: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    headers = list(headers)
    lines = [headers, ["---"] * len(headers), *([md(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
