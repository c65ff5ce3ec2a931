"""What the update meter costs a live run: seconds a step and peak memory, with it and without, in turns.

    python nbs_tests/benchmarks/insight_cost.py    # --help: sizes, steps, rounds

Each round trains some steps without and as many with the meter, on one trainer, so that a change in the machine's load meets both.
The target: at most 5% more time and 2% more memory with the default settings.
"""

from __future__ import annotations

import argparse
import statistics

import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb.insight import Forgetting, UpdateMeter


def make_trainer(options: argparse.Namespace) -> ft.Trainer:
    """A Llama of the size asked for, with random weights, on rows of random words."""
    tokenizer = ft.load_model(tiny.BASE_MODEL).tokenizer
    config = {
        "model_type": "llama", "vocab_size": options.vocab, "hidden_size": options.hidden, "intermediate_size": 11 * options.hidden // 4,
        "num_hidden_layers": options.layers, "num_attention_heads": options.hidden // 64, "max_position_embeddings": 4096,
    }
    lm = ft.LanguageModel.from_config(config, tokenizer)
    text = " ".join(row["prompt"] for row in tiny.text_to_sql(train=400)["train"])
    words = text.split()
    rows = [{"text": " ".join(words[i : i + options.length])} for i in range(0, len(words) - options.length, options.length)]
    settings = ft.TrainConfig(
        batch_size=options.batch, iters=10**6, learning_rate=1e-4, max_seq_length=options.length, optimizer=options.optimizer
    )
    return ft.Trainer(lm, ft.load_data({"train": rows}, tokenizer, config=settings), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 40), ("rounds", 4), ("every", 10), ("hidden", 512), ("layers", 6), ("batch", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--optimizer", default="adamw")
    options = parser.parse_args()
    trainer = make_trainer(options)
    for _ in range(3):
        trainer.step()
    Forgetting().look(trainer)  # its sample of the weights stays in memory from here on, in both halves
    meter = UpdateMeter(every=options.every)
    found: dict[bool, list[ft.StepReport]] = {False: [], True: []}
    for _ in range(options.rounds):
        for on in (False, True):
            meter.attach(trainer) if on else meter.detach()
            found[on] += [trainer.step() for _ in range(options.steps)]
    seconds = {on: statistics.mean(r.seconds for r in reports) for on, reports in found.items()}
    peak = {on: max(r.peak_memory for r in reports) for on, reports in found.items()}
    print(f"{trainer.lm.num_parameters:,} parameters, every {options.every} steps, {options.optimizer}")
    print(f"seconds a step: {seconds[False]:.4f} without, {seconds[True]:.4f} with: {seconds[True] / seconds[False] - 1:+.2%}")
    print(f"peak memory:    {peak[False] / 1e6:.1f} MB without, {peak[True] / 1e6:.1f} MB with: {peak[True] / peak[False] - 1:+.2%}")


if __name__ == "__main__":
    main()
