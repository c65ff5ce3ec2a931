"""The benchmark runs where there is no GPU too, at tiny sizes, so that it is known to run where there is one."""

import importlib.util

import mlx.core as mx
import pytest

from nbs_tests.gpu.__main__ import main


@pytest.mark.ci
def test_a_dry_run_fills_the_whole_table(tmp_path, capsys):
    assert main(["--dry", "--out", str(tmp_path / "table.md")]) == 0
    written = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if line.startswith("| tiny")]
    training, generation = [cells for cells in rows if len(cells) == 6], [cells for cells in rows if len(cells) == 4]
    assert len(training) == 8 and len(generation) == 4
    if importlib.util.find_spec("mlx_lm") is None:
        assert all("not installed" in str(cells) for cells in rows if "mlx-lm" in cells)
        training = [cells for cells in training if "mlx-lm" not in cells]
    assert all(int(tokens) > 0 and float(peak) >= 0 for *_, tokens, _, peak in training)
    # mlx-lm generates on a stream of a GPU that is really there
    assert all(int(tokens) > 0 for *_, way, _, tokens in generation if way == "fulltune_nb" or mx.is_available(mx.gpu))
