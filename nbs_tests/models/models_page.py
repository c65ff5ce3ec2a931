"""The tables of docs/models.md: `python -m nbs_tests.models.models_page` compares every family with transformers and writes both.

With names of families it compares these alone and leaves the other rows as they are; with `macs` it compares none.
"""

from __future__ import annotations

import fulltune_nb  # noqa: F401  first of all: it gives MLX its BLAS

# isort: split
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any
from unittest import mock

from fulltune_nb import doctor
from fulltune_nb.html import human_bytes
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.family import Experts, Family, Stack
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.training import memory
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.family_cases import KNOWN, PUBLISHED
from nbs_tests.models.real_configs import EXPECTED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMPARED = ("logits", "gradients", "engines", "packing", "saved", "mlx-lm")
CASES = 8

# ---- families ------------------------------------------------------------------------------------------------------------------------


def mechanisms(row: Family | Experts) -> str:
    """What a row says, where it differs from a row that says nothing."""
    said = []
    for part in fields(row):
        value = getattr(row, part.name)
        default = part.default_factory() if part.default_factory is not MISSING else part.default
        if part.name not in ("defaults", "names", "norm_eps") and value != default:
            name = part.name.replace("_", " ")
            said.append(name if value is True else f"{name}: {_words(value)}")
    return "; ".join(said)


def _words(value: Any) -> str:
    if isinstance(value, Experts):
        return f"({mechanisms(value)})"
    if isinstance(value, Stack):
        return value.name
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} ({_words(switch)})" if isinstance(switch, str) else _words(key) for key, switch in value.items())
    return " ".join(map(_words, value)) if isinstance(value, (tuple, list, frozenset)) else str(value)


def family_rows(known: Mapping[str, list[str]], compared: list[str]) -> list[str]:
    """The rows of the table of families: the errors of the compared ones are new, those of the others as the page has them."""
    from nbs_tests.models.family_parity import mlx_lm_error, run

    rows = []
    for name, family in FAMILIES.items():
        if name in compared:
            result = run(name, CASES)
            print("\n".join([f"{name}: {result.errors}", *result.problems]), flush=True)
            errors = {**result.errors, "mlx-lm": mlx_lm_error(name)}
            figures = ["–" if (error := errors.get(kind)) is None else f"{error:.0e}" for kind in COMPARED]
        else:
            figures = known.get(name, ["", "", *["?"] * len(COMPARED)])[2:]
        rows.append("| " + " | ".join([f"`{name}`", KNOWN[name].checkpoints, mechanisms(family), *figures]) + " |")
    return rows


# ---- Macs ----------------------------------------------------------------------------------------------------------------------------

MACS = {16: 2 / 3, 32: 2 / 3, 64: 3 / 4, 128: 3 / 4}
"""Main memory in GB (2**30 bytes) -> the share that Metal recommends as the largest working set."""
FITS_FOR = (
    "Qwen3 0.6B", "Gemma 3 1B", "Llama 3.2 1B", "Qwen3 1.7B", "Gemma 2 2B", "Qwen2.5 3B", "SmolLM3 3B", "Llama 3.2 3B", "Phi-4-mini",
    "Mistral 7B v0.3", "OLMo 2 7B", "Llama 3.1 8B", "Qwen3 8B", "Gemma 2 9B", "OLMo 2 13B", "gpt-oss-20b", "Qwen3 30B-A3B", "Qwen3 32B",
    "Llama 3.1 70B",
)  # fmt: skip
_ALSO = {"Llama 3.2 1B": "llama-3.2-1b", "Mistral 7B v0.3": "mistral-7b-v0.3"}


def mac_rows() -> list[str]:
    """The rows of the table of Macs, for the published shapes whose family is there."""
    published = {**PUBLISHED, **{name: EXPECTED[key][0] for name, key in _ALSO.items()}}
    return [_mac_row(name, published[name]) for name in FITS_FOR if published[name]["model_type"] in FAMILIES]


def _mac_row(name: str, raw: dict[str, Any]) -> str:
    weights = sum(array.size for array in parameters_of(Decoder(read_config(raw))).values())
    with gpu_like(), mock.patch.object(memory, "machine_limit", lambda: 2**60):
        peaks = doctor.peaks(raw)
    cells = [next((way for way, peak in peaks.items() if peak <= share * size * 2**30), "–") for size, share in MACS.items()]
    return "| " + " | ".join([name, f"{weights / 1e9:.1f}B", *map(human_bytes, peaks.values()), *cells]) + " |"


# ---- the page ------------------------------------------------------------------------------------------------------------------------


def rows_of(text: str, table: str) -> list[str]:
    """The rows of a table of the page, which stands behind a comment with its name."""
    return [line for line in text.split(f"<!-- {table} -->", 1)[1].split("\n\n", 1)[0].splitlines() if line.startswith("|")][2:]


def cells(row: str) -> list[str]:
    """The cells of a table's row."""
    return [cell.strip() for cell in row.strip("|").split("|")]


def with_rows(text: str, table: str, rows: list[str]) -> str:
    """The page with another content of a table."""
    pattern = re.compile(rf"(<!-- {table} -->\n\|[^\n]*\n\|[-| ]*\n)(?:\|[^\n]*\n)*")
    return pattern.sub(lambda found: found[1] + "".join(f"{row}\n" for row in rows), text)


def main(names: list[str]) -> None:
    """Writes both tables; compares the named families, or all."""
    text = PAGE.read_text(encoding="utf-8")
    known = {cells(row)[0].strip("`"): cells(row)[1:] for row in rows_of(text, "families")}
    text = with_rows(text, "families", family_rows(known, names or list(FAMILIES)))
    PAGE.write_text(with_rows(text, "macs", mac_rows()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
