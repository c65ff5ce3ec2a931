"""`python -m nbs_tests.training.rank_notebook FOLDER SIZE`: as a notebook does it, which starts its ranks itself; SIZE 1 trains alone."""

import fulltune_nb as ft  # noqa: I001  first of all: it gives MLX its BLAS
import json
import sys
from pathlib import Path

import pytest

from fulltune_nb import tiny
from fulltune_nb.tokenizer import load_tokenizer
from nbs_tests.training.conftest import TINY_LLAMA, make_rows
from nbs_tests.training.rank_program import SETTINGS, result_of


def main(folder: str, size: int) -> None:
    """Two trainers one after the other, each behind one that is refused, with a rehearsal, a fork and a step back."""
    ranks = ft.launch(["localhost"] * size) if size > 1 else False
    results = []
    for backward in ("whole", "layerwise"):
        config = ft.TrainConfig(**{**SETTINGS, "grad_accumulation_steps": 4, "backward": backward, "shard_optimizer": backward == "whole"})
        tokenizer = load_tokenizer(tiny.BASE_MODEL)
        lm = ft.LanguageModel.from_config({**TINY_LLAMA, "vocab_size": len(tokenizer)}, tokenizer)
        splits = {"train": make_rows(27), "valid": make_rows(9, start=100), "test": make_rows(3, start=200)}
        data = ft.load_data(splits, tokenizer, config=config)
        with pytest.raises(ft.CheckpointError, match="cannot be made"):  # when the others have begun: they are there for the next
            ft.Trainer(lm, data, config, __file__, parallel=ranks)
        trainer = ft.Trainer(lm, data, config, parallel=ranks)
        begin = trainer.snapshot()
        trainer.step()
        ft.find_lr(trainer, steps=10)
        fork = trainer.fork()
        fork.run(1)
        trainer.restore(begin)
        trainer.run()
        results.append([fork.history.steps[-1].loss, result_of(trainer, trainer.evaluate("test"))])
    (Path(folder) / f"{size}.json").write_text(json.dumps(results))
    if ranks:
        ranks.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
