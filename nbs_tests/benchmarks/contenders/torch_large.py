"""Contender: PyTorch as usually used, a transformers Llama in bfloat16 with `torch.optim.AdamW`, every weight trained.

Random weights made in memory; one row of `--tokens` trained tokens a step; transformers' own loss, which turns the logits to
float32; no gradient checkpointing.
"""

from __future__ import annotations

from importlib.metadata import version

from common import Clock, finish, shape_arguments


def main() -> None:
    args = shape_arguments()
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[args.shape["model_type"]](**args.shape, use_cache=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, config.vocab_size, (1, args.tokens + 1))
    clock, losses = Clock(), []
    model.train()
    for _ in range(args.steps):
        clock.start()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.stop()
        del loss  # with it goes what the graph still holds
    assert len(optimizer.state) == len(list(model.parameters())), "some weights were not trained"
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    finish(clock, [args.tokens] * args.steps, 0, losses, None, {p: version(p) for p in ("torch", "transformers")})


if __name__ == "__main__":
    main()
