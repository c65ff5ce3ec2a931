"""Every public name as a typed program uses it. Nothing here is run: `mypy` reads it, strictly, in CI (settings in pyproject.toml)."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import fulltune_nb as ft
from fulltune_nb import errors, insight, tiny


def model_and_data(folder: Path) -> None:
    lm = ft.load_model(folder, dtype="bfloat16")
    assert_type(lm, ft.LanguageModel)
    assert_type(lm.generate("prompt", max_tokens=8, temperature=0.5, stop="\n", seed=0), str)
    for piece in lm.stream("prompt"):
        assert_type(piece, str)
    assert_type(lm.chat([{"role": "user", "content": "Hello"}]), str)
    assert_type(lm.generate_many(["a", "b"], batch_size=2), list[str])
    saved: object = lm.save("folder")
    parameters: int = lm.num_parameters
    data = ft.load_data({"train": [{"text": "row"}]}, lm.tokenizer, mask_prompt=True, max_seq_length=64)
    assert data.train is not None
    assert_type(data.train[0], ft.Example)
    first: str = data.train[0].text + data.train[0].source
    print(saved, parameters, first, len(data.train), data.notes)


def training(lm: ft.LanguageModel) -> ft.History:
    data = ft.load_data("folder", lm.tokenizer)
    config = ft.TrainConfig(iters=600, batch_size=4, learning_rate=1e-5, optimizer="adamw", memory="lean")
    assert_type(config.replace(iters=3), ft.TrainConfig)
    assert_type(ft.TrainConfig.from_yaml("config.yaml"), ft.TrainConfig)
    plan = ft.preflight(lm, data, config)
    fits: bool = plan.fits
    peak: int = plan.peak
    with ft.launch(["localhost", "localhost"]) as ranks:
        assert_type(ft.Trainer(lm, data, config, parallel=ranks).step(), ft.StepReport)
    trainer = ft.Trainer(lm, data, config, run_dir=Path("runs/a"))
    assert_type(trainer.step(), ft.StepReport)
    for report in trainer.steps(10):
        assert_type(report, ft.StepReport)
        assert_type(report.loss, float)
    trainer.run(callbacks=[insight.UpdateMeter(every=10)])
    assert_type(trainer.evaluate("test"), ft.EvalReport)
    assert_type(trainer.save(), Path)
    trainer.set_learning_rate(3e-5)
    assert_type(ft.Trainer.resume("runs/a"), ft.Trainer)
    for entry in trainer.history:
        if isinstance(entry, ft.Event):
            assert_type(entry.message, str)
        elif isinstance(entry, ft.EvalReport):
            assert_type(entry.perplexity, float)
    print(fits, peak)
    return trainer.history


class Callback:
    """What `run` takes: any of these methods."""

    def on_step(self, trainer: ft.Trainer, report: ft.StepReport) -> None:
        if report.loss < 0.1:
            trainer.pause()


def looks(trainer: ft.Trainer, example: ft.Example) -> None:
    trainer.run(callbacks=[Callback()])
    suggestion: float | None = ft.find_lr(trainer, steps=50).suggestion
    ft.trace(trainer.lm, "text").plot_attention(1, head=0)
    loss: float = ft.inspect(trainer, example).loss
    ft.token_losses(trainer.lm, [example]).rows[0]
    score: float = ft.evaluate_generation(trainer.lm, [{"prompt": "a", "completion": "b"}]).score
    ft.compare(["runs/a", "runs/b"]).plot()
    ft.plot_loss(trainer.history, log=True).set_title("Loss")
    ft.plot_memory(trainer.history)
    found = ft.sweep("10_experiment.ipynb", {"learning_rate": [1e-5, 3e-5]}, "runs/sweep", jobs=2)
    trials = ft.search("10_experiment.ipynb", {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}, "runs/search", trials=8)
    best = found.best or trials.best
    print(suggestion, loss, score, best and best.parameters, ft.system_info(measure=True).cores, tiny.BASE_MODEL.name)


async def panels(trainer: ft.Trainer) -> None:
    panel = ft.TrainPanel(trainer, prompts=["Hello"])
    panel.start(10)
    await panel.wait()
    panel.close()
    ft.DataPanel(trainer.data).show(3, split="train")
    ft.ChatPanel(trainer.lm).send("Hello")
    ft.LossChart({"a": trainer, "b": trainer.history}).update()


def failures() -> None:
    try:
        ft.load_model("folder")
    except ft.DataError as error:
        assert_type(error.problems, list[str])
    except (ft.ConfigError, ft.ModelError, ft.TrainingError, ft.CheckpointError, errors.MissingDependencyError) as known:
        text: str = str(known)
        print(text)
    except ft.FulltuneError:
        raise
