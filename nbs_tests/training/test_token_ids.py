"""Token ids beyond the model's rows are refused wherever data meets a model."""

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import DataError
from fulltune_nb.insight import top_losses
from nbs_tests.conftest import CHATML
from nbs_tests.training.conftest import TINY_LLAMA, make_rows


@pytest.fixture
def wide(make_tokenizer):
    """A model, and data of a tokenizer with two tokens more than it has rows; only the valid and test split use them."""
    tokenizer = make_tokenizer(CHATML)
    lm = ft.LanguageModel.from_config({**TINY_LLAMA, "vocab_size": len(tokenizer)}, tokenizer, seed=1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|result|>"]})
    outside = [{"prompt": "<|tool|> rows", "completion": "table <|result|>"}]
    return lm, ft.load_data({"train": make_rows(6), "valid": outside, "test": outside}, tokenizer, max_seq_length=128)


SMALL = {"batch_size": 2, "iters": 2, "learning_rate": 1e-3}
MEETINGS = {
    "Trainer": lambda lm, data: ft.Trainer(lm, data, ft.TrainConfig(**SMALL)),
    "Trainer, lean": lambda lm, data: ft.Trainer(lm, data, ft.TrainConfig(memory="lean", **SMALL)),
    "preflight": lambda lm, data: ft.preflight(lm, data, ft.TrainConfig(**SMALL)),
    "token_losses": lambda lm, data: ft.token_losses(lm, data.valid[0]),
    "token_losses of a split": lambda lm, data: ft.token_losses(lm, data.valid),
    "top_losses": lambda lm, data: top_losses(lm, data.test),
    "trace": lambda lm, data: ft.trace(lm, data.test[0]),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_the_message_names_tokens_rows_and_remedy(wide, meeting):
    lm, data = wide
    with pytest.raises(DataError, match=r"(?s)(valid|test):1.*'<\|tool\|>' \(id \d+\), '<\|result\|>'.*lm\.add_tokens\(\['<\|tool\|>'"):
        MEETINGS[meeting](lm, data)


def test_a_split_that_comes_later_is_refused_too(wide):
    lm, data = wide
    trainer = ft.Trainer(lm, ft.load_data({"train": make_rows(6)}, lm.tokenizer), ft.TrainConfig(**SMALL))
    trainer.data = data
    with pytest.raises(DataError, match="no row"):
        trainer.evaluate("valid")


def test_a_split_knows_its_largest_id(wide):
    _, data = wide
    assert data.valid.largest_id == max(int(example.tokens.max()) for example in data.valid)
