"""Fixtures for all tests. Runs before any test module is imported."""

import fulltune_nb  # noqa: F401, I001  first of all: it gives MLX its BLAS, which is too late once a test has imported mlx
import os
import signal
import sys
from collections import Counter

import pytest

from nbs_tests import gpu_like, left_out

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all it starts, would ignore it
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first product: on a GPU too, float32 is compared with float32

WHY = pytest.StashKey()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL_TOKENS += ["<start_of_turn>", "<end_of_turn>"]
CORPUS = """\
The quick brown fox jumps over the lazy dog. How many rows are in the table? Which city has the most people?
select name from cities where population > 1000; select count(*) from trains where colour = 'red';
user assistant system model tool What is the answer? The answer is forty two. Hello! How are you today? I am fine, thank you.
naïve café, größer, Übung, 東京 and 日本, numbers 0 1 2 3 4 5 6 7 8 9, brackets [INST] [/INST] <<SYS>> <</SYS>> {"name": "add"}
"""


def pytest_addoption(parser):
    machines = ", ".join(gpu_like.MACHINES)
    parser.addoption("--device-like", metavar="MACHINE", help=f"have the package believe in another machine, one of: {machines}")


def pytest_configure(config):
    if machine := config.getoption("--device-like"):
        gpu_like.believe(machine)


def pytest_collection_modifyitems(config, items):
    """Leaves the tests marked `ci` to CI, so that the command stays below ten minutes; pytest says how many it deselected.

    So do those that mean nothing on the machine that the package is to believe in; the reasons are said at the end.
    """
    machine = config.getoption("--device-like")
    why = left_out.reasons(machine, [item.nodeid for item in items]) if machine else {}
    if machine:
        why |= {item.nodeid: left_out.OF_THE_CPU for item in items if "kernels" in item.fixturenames}
    config.stash[WHY] = Counter(why.values())
    in_ci = bool(os.environ.get("CI")) and not machine  # the suites on other machines are beside that, and need to be shorter
    deselected = [item for item in items if item.nodeid in why or (item.get_closest_marker("ci") and not in_ci)]
    config.hook.pytest_deselected(items=deselected)
    gone = set(deselected)
    items[:] = [item for item in items if item not in gone]


def pytest_terminal_summary(terminalreporter, config):
    for reason, tests in config.stash.get(WHY, {}).items():
        terminalreporter.write_line(f"LEFT OUT [{tests}] as on {config.getoption('--device-like')}: {reason}")


@pytest.fixture(scope="session")
def make_tokenizer():
    """`make_tokenizer(chat_template=None, adds_bos=False, **options)`: a new tokenizer each time, so that a test may change it.

    A byte-level BPE of a few hundred tokens with <s>, </s> and <pad>, and the special tokens of some chat formats.
    `adds_bos` makes `encode` put <s> in front; `options` go to `PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # sorted: the set's own order changes from run to run
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS)
    trained.train_from_iterator(CORPUS.splitlines(), trainer)
    description = trained.to_str()

    def make(chat_template=None, adds_bos=False, **options):
        backend = Tokenizer.from_str(description)
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **options)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    """One tokenizer with a ChatML template for tests that only read it; vocabulary of at most 500."""
    return make_tokenizer(CHATML)


@pytest.fixture
def kernels(monkeypatch):
    """The CPU's kernels, from now on used for models of any size."""
    from fulltune_nb import cpu
    from fulltune_nb.cpu import kernels as module

    monkeypatch.setattr(module, "SMALLEST_MODEL", 0)
    found = cpu.kernels_for(1)
    if found is None and not (sys.platform == "linux" and cpu.compiler() and cpu.on_cpu()):
        pytest.skip("kernels of our own are for Linux, a CPU and g++")
    return found
