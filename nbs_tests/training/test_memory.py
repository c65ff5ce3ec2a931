import json
import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.cpu import on_cpu
from fulltune_nb.data.batches import padded_to
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.device import cgroup_limits, device_kind, length_multiple, machine_limit
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.parameters import parameters_of, trainable_of
from fulltune_nb.training import memory
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.memory import read_memory
from fulltune_nb.training.plan import preflight
from nbs_tests.memory_held import memory_held

MISTRAL_7B = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}
GB = 10**9


def make_lm(**config):
    """A model whose weights are never evaluated, so that any size costs nothing."""
    read = read_config(config)
    return SimpleNamespace(model=Decoder(read), config=read, dtype="float32", tokenizer=None)


def make_data(length=256, rows=100, share=1.0):
    lengths = np.full(rows, length)
    trained = np.ceil(share * (lengths - 1)).astype(int)
    counts = {"trained_lengths": trained, "trained_tokens": int(trained.sum()), "largest_id": 0}
    split = SimpleNamespace(lengths=lengths, trainable=np.arange(rows), **counts)
    return SimpleNamespace(train=split, splits={"train": split}, settings=DataSettings())


@pytest.fixture
def set_limit(monkeypatch):
    return lambda size: monkeypatch.setattr(memory, "machine_limit", lambda: size)


def always_kept(plan):
    """Bytes of the cache: a Mac's gets what room there is."""
    return 0 if device_kind() == "metal" else plan.cache


def test_a_seven_billion_model_is_planned_without_allocating_anything(set_limit, monkeypatch):
    monkeypatch.setenv("FULLTUNE_KERNELS", "off")
    set_limit(128 * GB)
    before = memory_held()
    plan = preflight(make_lm(**MISTRAL_7B), make_data(512), TrainConfig(batch_size=1, grad_checkpoint=True))
    assert mx.get_active_memory() - before < 10**7
    assert plan.parts["weights"] == 4 * 7_241_732_096
    assert plan.parts["optimizer state"] == 8 * 7_241_732_096
    assert plan.parts["gradients"] == pytest.approx(4 * 7_241_732_096)
    # On a GPU neither the norm nor the update needs memory of its own.
    assert plan.moment == ("update" if on_cpu() else "first block") and plan.peak == sum(plan.parts.values())
    assert 116 * GB < plan.peak < 125 * GB and plan.fits and plan.advice == ()


def test_more_work_needs_more_and_savings_need_less(set_limit):
    set_limit(GB)
    lm = make_lm(**MISTRAL_7B | {"num_hidden_layers": 4, "hidden_size": 1024})
    base = TrainConfig(batch_size=4, memory="fast")
    peak = preflight(lm, make_data(512), base).peak
    assert preflight(lm, make_data(1024), base).peak > 1.9 * peak / 2
    assert preflight(lm, make_data(512), base.replace(batch_size=8)).peak > peak
    assert preflight(lm, make_data(512), base.replace(grad_checkpoint=True)).peak < peak
    assert preflight(lm, make_data(512), base.replace(optimizer="sgd")).peak < peak
    assert preflight(lm, make_data(512), base.replace(grad_accumulation_steps=2)).peak > peak
    assert preflight(lm, make_data(512), base.replace(train_only=["model.layers.3.*"])).peak < peak
    assert preflight(lm, None, base).peak > preflight(lm, make_data(1800), base).peak


def test_rows_shorter_than_the_limit_and_small_data_count_as_they_are(set_limit):
    set_limit(GB)
    lm, width = make_lm(**MISTRAL_7B | {"num_hidden_layers": 2}), padded_to(199, length_multiple())
    assert f"4 rows of {width} tokens" in preflight(lm, make_data(200), TrainConfig()).workload
    assert f"2 rows of {width} tokens" in preflight(lm, make_data(200, rows=2), TrainConfig()).workload
    width = padded_to(63, length_multiple())
    assert f"4 rows of {width} tokens" in preflight(lm, make_data(200), TrainConfig(max_seq_length=64)).workload


def test_what_does_not_fit_gets_advice_that_fits_when_followed(set_limit):
    lm, data = make_lm(**MISTRAL_7B | {"num_hidden_layers": 4, "hidden_size": 1024, "vocab_size": 4000}), make_data(1024)
    config = TrainConfig(batch_size=16, memory="fast")
    set_limit(10**15)
    whole = preflight(lm, data, config)
    set_limit(int(0.8 * whole.peak) + always_kept(whole))
    plan = preflight(lm, data, config)
    assert not plan.fits and len(plan.advice) >= 2
    assert any("grad_checkpoint=True" in sentence for sentence in plan.advice)
    rows = next(sentence for sentence in plan.advice if "batch_size" in sentence)
    settings = dict(word.split("=") for word in rows.split() if "=" in word)
    changed = config.replace(**{name: int(value) for name, value in settings.items()})
    assert preflight(lm, data, changed).fits and changed.batch_size * changed.grad_accumulation_steps == 16


def test_where_no_single_change_is_enough_several_together_are_tried(set_limit):
    lm, data = make_lm(**MISTRAL_7B | {"num_hidden_layers": 4, "hidden_size": 1024, "vocab_size": 4000}), make_data(64)
    config = TrainConfig(batch_size=1, memory="fast")
    set_limit(10**15)
    together = preflight(lm, data, config.replace(memory="lean", optimizer="adafactor", weights="bfloat16"))
    set_limit(together.peak + always_kept(together))
    (sentence,) = preflight(lm, data, config).advice
    assert sentence.startswith("No single change") and "optimizer='adafactor', weights='bfloat16':" in sentence
    set_limit(together.parts["weights"])
    (sentence,) = preflight(lm, data, config).advice
    assert "smaller model" in sentence


def test_the_cache_counts_against_the_limit(set_limit):
    lm = make_lm(**MISTRAL_7B | {"num_hidden_layers": 1})
    set_limit(10**15)
    config = TrainConfig(memory="fast")
    plan = preflight(lm, make_data(), config)
    set_limit(plan.peak + always_kept(plan))
    assert preflight(lm, make_data(), config).fits
    set_limit(plan.peak + always_kept(plan) - 1)
    assert not preflight(lm, make_data(), config).fits


def test_auto_is_fast_where_that_fits_and_lean_where_only_that_does(set_limit):
    lm, data = make_lm(**MISTRAL_7B | {"num_hidden_layers": 8}), make_data()
    set_limit(10**15)
    fast, lean = (preflight(lm, data, TrainConfig(memory=memory)) for memory in ("fast", "lean"))
    assert lean.peak < fast.peak and (fast.backward, lean.backward) == ("whole", "layerwise")
    assert preflight(lm, data, TrainConfig()) == fast
    set_limit(fast.peak + always_kept(fast) - 1)
    assert preflight(lm, data, TrainConfig()).backward == "layerwise"
    assert preflight(lm, data, TrainConfig(backward="whole")).backward == "whole"


def test_wrong_patterns_and_missing_data_are_refused():
    lm = make_lm(**MISTRAL_7B | {"num_hidden_layers": 1})
    with pytest.raises(ConfigError, match="matches no tensor"):
        preflight(lm, make_data(), TrainConfig(freeze=["*nothing*"]))
    with pytest.raises(DataError, match="train split"):
        preflight(lm, SimpleNamespace(train=None, splits={}), TrainConfig())


def test_the_plan_shows_its_parts_against_the_limit(set_limit):
    set_limit(GB)
    plan = preflight(make_lm(**MISTRAL_7B), make_data(), TrainConfig())
    shown = plan._repr_html_()
    assert all(name in shown for name in ("weights", "optimizer state", "does not fit", "<svg", "limit 1.00 GB", "<li>"))
    filled = [float(size.replace(",", "")) for size in re.findall(r"■</span> [a-z ]+ ([\d,.]+) GB", shown)]
    assert sum(filled) == pytest.approx(plan.peak / GB, abs=0.05), "the cache is no part of the peak"
    assert repr(plan).startswith("MemoryPlan(peak ") and "\n" not in repr(plan)
    json.dumps(plan.parts)


def test_a_part_has_its_colour_in_every_plan_and_all_parts_one_unit():
    def colours(**settings):
        shown = preflight(make_lm(**MISTRAL_7B), make_data(), TrainConfig(**settings))._repr_html_()
        legend = re.findall(r'color:(#\w+)">■</span> ([a-z ]+) [<\d&;lt.,]+ (\w+)<', shown)
        assert {unit for *_, unit in legend} == {"GB"}
        return {name: colour for colour, name, _ in legend}

    whole, lean = colours(), colours(memory="lean", optimizer="sgd")
    assert set(whole) != set(lean) and {"weights", "activations"} <= set(whole) & set(lean)
    assert all(whole[name] == lean[name] for name in set(whole) & set(lean))


def test_a_limit_far_above_the_parts_is_told_and_not_drawn(set_limit):
    set_limit(10**6 * GB)
    shown = preflight(make_lm(**MISTRAL_7B), make_data(), TrainConfig())._repr_html_()
    assert "fits in 1000.00 TB" in shown and "limit" not in shown


SHAPES = [
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, backward="layerwise"),
    dict(hidden_size=128, intermediate_size=1024, num_hidden_layers=3, backward="layerwise", weights="bfloat16", optimizer="adafactor"),
    dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, model_type="mixtral", num_local_experts=2, num_experts_per_tok=1),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, grad_checkpoint=True),
    dict(hidden_size=128, intermediate_size=448, num_hidden_layers=4, length=512, batch_size=2, grad_checkpoint=True),
    dict(hidden_size=128, intermediate_size=1024, num_hidden_layers=6, vocab_size=8192, length=200),
    dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8, length=500, batch_size=2),
    dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, length=40, grad_accumulation_steps=2),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, model_type="phi", optimizer="sgd"),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, model_type="gemma", head_dim=64, freeze=["model.embed_tokens.*"]),
    dict(hidden_size=256, intermediate_size=512, num_hidden_layers=6, train_only=["model.layers.4.*", "model.layers.5.*"]),
    dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, model_type="glm4_moe", n_routed_experts=4, num_experts_per_tok=2,
         moe_intermediate_size=128),
    dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, model_type="glm4_moe", n_routed_experts=4, num_experts_per_tok=2,
         moe_intermediate_size=128, n_shared_experts=2, backward="layerwise"),
]  # fmt: skip


@pytest.fixture
def run_of(tokenizer):
    """`run_of(shape)`: model, data and config of a shape."""

    def make(shape):
        model = {"model_type": "llama", "vocab_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
        length, settings = shape.get("length", 128), {"batch_size": 4, "iters": 2}
        for name, value in shape.items():
            (settings if name in TrainConfig.__dataclass_fields__ else model)[name] = value
        model.pop("length", None)
        lm = ft.LanguageModel.from_config(model, tokenizer, seed=1)
        data = ft.load_data({"train": [{"text": "a " * 3000}] * 8}, tokenizer, max_seq_length=length)
        return lm, data, TrainConfig(**settings, max_seq_length=length)

    return make


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_what_is_counted_and_what_is_measured_beside_the_peak_of_a_run(run_of, shape):
    """Counted: from a tenth too little to the margin too much. Measured: within 5%, and nothing is changed by it."""
    lm, data, config = run_of(shape)
    outside = memory_held() - sum(array.nbytes for array in parameters_of(lm.model).values())
    counted = preflight(lm, data, config)
    random, weights, trainable = mx.array(mx.random.state[0]), parameters_of(lm.model), set(trainable_of(lm.model))
    bits = {name: np.array(array) for name, array in weights.items()}
    measured = preflight(lm, data, config, measure=True)
    assert mx.array_equal(random, mx.random.state[0]) and set(trainable_of(lm.model)) == trainable
    after = parameters_of(lm.model)
    assert all(after[name] is array and np.array_equal(bits[name], np.array(array)) for name, array in weights.items())
    del weights, after, bits  # held, they would not be updated in place
    peak = [report.peak_memory for report in ft.Trainer(lm, data, config).steps()][-1] - outside
    for plan in (counted, measured):
        assert plan.peak == sum(plan.parts.values()) and plan.backward == counted.backward
    assert 0.9 * peak < counted.peak < (1 + memory.MARGIN) * peak
    assert measured.peak == pytest.approx(peak, rel=0.05)
    assert "measured" in repr(measured) and "counted" in repr(counted)


def test_a_trainer_is_not_changed_by_measuring_and_its_run_neither(make_trainer, make_data):
    straight, trainer = make_trainer(train_only=["*layers*"]), make_trainer(train_only=["*layers*"])
    straight.run()
    trainer.run(3)
    state, entries = trainer.optimizers.state_arrays(), len(trainer.history)
    preflight(trainer.lm, trainer.data, trainer.config, measure=True)
    assert all(mx.array_equal(array, state[name]) for name, array in trainer.optimizers.state_arrays().items())
    assert len(trainer.history) == entries and trainer.step_count == 3
    trainer.run()
    assert [report.loss for report in trainer.history.steps] == [report.loss for report in straight.history.steps]


def test_what_is_counted_just_above_the_limit_is_measured_before_it_is_refused(run_of, set_limit):
    lm, data, config = run_of(SHAPES[5])
    config = config.replace(memory="fast")
    counted, measured = preflight(lm, data, config), preflight(lm, data, config, measure=True)
    assert measured.peak < counted.peak
    set_limit((counted.peak + measured.peak) // 2 + always_kept(measured))
    assert not preflight(lm, data, config).fits
    assert ft.Trainer(lm, data, config).backward == "whole"
    set_limit(int(0.95 * measured.peak) + always_kept(measured))
    with pytest.raises(ft.errors.MemoryLimitError):
        ft.Trainer(lm, data, config)


def test_the_readers_show_what_mlx_counts():
    mx.reset_peak_memory()
    array = mx.zeros((1000, 1000))
    mx.eval(array)
    reading = read_memory()
    assert reading.active >= 4_000_000 and reading.peak >= reading.active and reading.cache >= 0
    assert "active" in repr(reading) and "peak" in reading._repr_html_()


def test_the_limit_is_the_memory_of_this_machine():
    assert 10**8 < machine_limit() < 10**14


@pytest.mark.parametrize(
    "info, expected",
    [
        ({"max_recommended_working_set_size": 11 * GB, "memory_size": 16 * GB}, 11 * GB),
        ({"total_memory": 80 * GB}, 80 * GB),
        ({"memory_size": 16 * GB}, 16 * GB),
    ],
)
def test_on_a_gpu_the_device_tells_its_limit(monkeypatch, info, expected):
    monkeypatch.setattr(memory.mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(memory.mx, "device_info", lambda device: info)
    assert machine_limit() == expected


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    files = {
        "sys/a/b/memory.max": "max",
        "sys/a/memory.max": "3000000000",
        "sys/memory/job/memory.limit_in_bytes": "2000000000",
        "sys/memory/memory.limit_in_bytes": "9223372036854771712",
        "proc": "5:cpu:/\n4:memory:/job\n0::/a/b\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = list(cgroup_limits(tmp_path / "proc", tmp_path / "sys"))
    assert sorted(found) == [2_000_000_000, 3_000_000_000]
    assert list(cgroup_limits(tmp_path / "missing", tmp_path / "sys")) == []
    monkeypatch.setattr("fulltune_nb.device.cgroup_limits", lambda: [123])
    monkeypatch.setattr(memory.mx, "default_device", lambda: mx.Device(mx.cpu))
    assert machine_limit() == 123


@pytest.mark.parametrize(
    ("memory", "limit", "short"), [("lean", 10**12, True), ("fast", 1, False), ("auto", 10**12, False), ("auto", 10**6, True)]
)
def test_a_layerwise_run_gives_memory_back_where_it_is_short(make_lm, make_data, monkeypatch, memory, limit, short):
    given = []
    monkeypatch.setattr("fulltune_nb.training.memory.machine_limit", lambda: limit)
    monkeypatch.setattr("fulltune_nb.training.trainer.cap_cache", given.append)
    config = ft.TrainConfig(memory=memory, backward="layerwise")
    ft.Trainer(make_lm(), make_data(config=config), config, force=True)
    assert given == [short]
