"""Contender: `fulltune_nb`."""

from __future__ import annotations

from importlib.metadata import version

from common import Clock, arguments, finish

import fulltune_nb as ft


def main() -> None:
    args = arguments()
    config = ft.TrainConfig(
        batch_size=args.batch_size, iters=args.warmup + args.steps, learning_rate=args.learning_rate, max_seq_length=args.max_length
    )
    lm = ft.load_model(args.model)
    data = ft.load_data(args.data, lm.tokenizer, config=config)
    trainer = ft.Trainer(lm, data, config)
    clock, tokens, losses, peak = Clock(), [], [], 0
    for _ in range(config.iters):
        clock.start()
        report = trainer.step()
        clock.stop()
        tokens.append(report.tokens)
        losses.append(report.loss)
        peak = max(peak, report.peak_memory)
    finish(clock, tokens, args.warmup, losses, peak, {"fulltune_nb": version("fulltune_nb"), "mlx": version("mlx")})


if __name__ == "__main__":
    main()
