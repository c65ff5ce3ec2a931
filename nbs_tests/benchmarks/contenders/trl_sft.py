"""Contender: TRL's `SFTTrainer` on PyTorch's CPU backend, float32, its defaults but for gradient checkpointing (off)."""

from __future__ import annotations

from importlib.metadata import version

from common import Clock, arguments, finish


def main() -> None:
    args = arguments()
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock, tokens, losses = Clock(), [], []

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *rest, **options):
            tokens.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *rest, **options)

    class Notes(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()

        def on_log(self, *_, logs=None, **__):
            losses.extend([float(logs["loss"])] if "loss" in (logs or {}) else [])

    config = SFTConfig(
        output_dir=str(args.scratch / "trl"),
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.01,
        max_length=args.max_length,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=config,
        train_dataset=load_dataset("json", data_files=str(args.data / "train.jsonl"), split="train", cache_dir=str(args.scratch / "cache")),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Notes()],
    )
    trainer.train()
    finish(clock, tokens, args.warmup, losses, None, {p: version(p) for p in ("trl", "torch", "transformers")})


if __name__ == "__main__":
    main()
