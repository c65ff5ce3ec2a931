"""Loading a model folder: what is read, in which dtype, and every reason for which it is refused."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.models.folder import INDEX_FILE, hf_tensors, load_decoder, resolve_model_path, weight_files
from fulltune_nb.tensor_files import read_tensors
from nbs_tests.memory_held import memory_held
from nbs_tests.models.model_cases import random_ids
from nbs_tests.models.parity import (
    EMBEDDING,
    HEAD,
    LOGITS_TOLERANCE,
    QUERY,
    RAW,
    TIED,
    dtypes,
    need_torch,
    relative_error,
    tensors_of,
    write_folder,
)

# ---- weights ---------------------------------------------------------------------------------------------------------------


def test_weights_arrive_where_they_belong(model_folder):
    tensors = tensors_of()
    loaded = hf_tensors(load_decoder(model_folder(tensors)))
    assert set(loaded) == set(tensors)
    assert all(np.array_equal(np.array(loaded[name]), tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        (lambda t: t.pop(QUERY), [f"1 tensors missing: {QUERY}"]),
        (lambda t: t.update(extra=np.ones(2, np.float32)), ["1 tensors unexpected: extra"]),
        (lambda t: t.update({QUERY: t[QUERY][:-1]}), ["1 tensors of another shape", f"{QUERY}: (23, 24) instead of (24, 24)"]),
        (lambda t: t.update(extra=t.pop(QUERY)), [f"1 tensors missing: {QUERY}", "1 tensors unexpected: extra"]),
        (lambda t: [t.pop(name) for name in list(t)[:15]], ["15 tensors missing", "and 5 more"]),
        (lambda t: t.pop(HEAD), ["1 tensors missing: lm_head.weight"]),
    ],
    ids=["missing", "unexpected", "mis-shaped", "renamed", "many", "head"],
)
def test_tensors_that_do_not_fit_are_listed(changed, messages, model_folder):
    tensors = tensors_of()
    changed(tensors)
    path = model_folder(tensors)
    with pytest.raises(WeightsError) as caught:
        load_decoder(path)
    assert str(path) in str(caught.value)
    assert all(message in str(caught.value) for message in messages)


@pytest.mark.parametrize(
    ("raw", "further"),
    [
        ({"model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}, "model.layers.2.eh_proj.weight"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 8}, "model.mtp_linear_proj.0.weight"),
    ],
)
def test_layers_for_predicting_several_tokens_at_once_are_left_aside_and_that_is_told(raw, further, tmp_path):
    raw = {**RAW, **raw, "moe_intermediate_size": 8}
    tensors = tensors_of(raw)
    write_folder(tmp_path, raw, {**tensors, further: np.ones((4, 4), np.float32)})
    with pytest.warns(UserWarning, match=f"predicts several tokens at once: 1 tensors for it .{further}. are left aside"):
        loaded = hf_tensors(load_decoder(tmp_path))
    assert loaded.keys() == tensors.keys()


def test_an_array_that_is_no_weight_is_refused(model_folder):
    with pytest.raises(WeightsError, match="floating-point weights are needed, found .*q_proj.weight: mlx.core.int32"):
        load_decoder(model_folder({**tensors_of(), QUERY: np.ones((24, 24), np.int32)}))


def test_rotary_buffers_of_old_checkpoints_are_passed_over(model_folder):
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for layer in range(2)}
    load_decoder(model_folder({**tensors_of(), **buffers}))


def test_loaded_weights_do_not_depend_on_the_file_any_more(model_folder):
    path = model_folder()
    model = load_decoder(path)
    (path / "model.safetensors").write_bytes(b"something else")
    np.testing.assert_array_equal(np.array(model.embed_tokens.weight), tensors_of()[EMBEDDING])


# ---- tied embeddings -------------------------------------------------------------------------------------------------------


def test_a_tied_head_stored_twice_is_tied(model_folder):
    tensors = tensors_of(TIED)
    model = load_decoder(model_folder({**tensors, HEAD: tensors[EMBEDDING]}, TIED))
    assert model.config.tie_word_embeddings and set(hf_tensors(model)) == set(tensors)


def test_a_tied_head_stored_as_the_head_alone_is_the_embedding_too(model_folder):
    tensors = tensors_of(TIED)
    renamed = {HEAD if name == EMBEDDING else name: array for name, array in tensors.items()}
    np.testing.assert_array_equal(np.array(load_decoder(model_folder(renamed, TIED)).embed_tokens.weight), tensors[EMBEDDING])


def test_a_head_of_its_own_in_a_checkpoint_that_says_tied_is_used_as_in_transformers(model_folder):
    tensors = tensors_of()
    model = load_decoder(model_folder(tensors, TIED))
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(np.array(model.lm_head.weight), tensors[HEAD])


@pytest.mark.parametrize("given", [RAW, TIED], ids=["own head", "tied head"])
def test_a_checkpoint_that_says_tied_computes_what_transformers_makes_of_it(given, model_folder):
    need_torch()
    from nbs_tests.models import torch_reference

    tensors = tensors_of(given)
    path, ids = model_folder({HEAD: tensors[EMBEDDING], **tensors}, TIED), random_ids(RAW, (1, 9), 0)
    expected = torch_reference.logits(torch_reference.load(path), ids)
    assert relative_error(load_decoder(path)(mx.array(ids)), expected) < LOGITS_TOLERANCE


# ---- dtypes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (mx.float32, None, mx.float32),
        (mx.bfloat16, None, mx.bfloat16),
        (mx.float16, None, mx.float32),
        (mx.float16, "bfloat16", mx.bfloat16),
        (mx.float16, "float32", mx.float32),
        (mx.float32, "bfloat16", mx.bfloat16),
        (mx.bfloat16, "float32", mx.float32),
    ],
)
def test_weights_keep_their_dtype_unless_it_is_float16_or_another_is_asked_for(stored, asked, expected, model_folder):
    tensors = {name: mx.array(array).astype(stored) for name, array in tensors_of().items()}
    model = load_decoder(model_folder(tensors), asked)
    assert dtypes(model) == {expected}
    expected_values = tensors[EMBEDDING].astype(expected).astype(mx.float32)
    np.testing.assert_array_equal(np.array(model.embed_tokens.weight.astype(mx.float32)), np.array(expected_values))


def test_dtypes_may_differ_within_a_checkpoint(model_folder):
    tensors = {name: mx.array(array).astype(mx.float32 if "norm" in name else mx.bfloat16) for name, array in tensors_of().items()}
    model = load_decoder(model_folder(tensors))
    assert model.norm.weight.dtype == mx.float32 and model.embed_tokens.weight.dtype == mx.bfloat16


@pytest.mark.parametrize(("asked", "message"), [("float16", "underflow in float16"), ("int8", "float32, bfloat16"), (32, "found 32")])
def test_other_dtypes_are_refused(asked, message, model_folder):
    with pytest.raises(ModelError, match=message):
        load_decoder(model_folder(), asked)


def test_loading_float16_does_not_keep_both_copies_in_memory(model_folder):
    raw = {**RAW, "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    path = model_folder({name: mx.array(array).astype(mx.float16) for name, array in tensors_of(raw).items()}, raw)
    mx.clear_cache()
    before = memory_held()
    model = load_decoder(path)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert mx.get_peak_memory() - before < 1.3 * size


# ---- files -----------------------------------------------------------------------------------------------------------------


def shard(path, names_of_shard):
    """Replaces the single file by shards with an index."""
    arrays = read_tensors(path / "model.safetensors")
    mx.eval(list(arrays.values()))
    (path / "model.safetensors").unlink()
    weight_map = {name: names_of_shard[i % len(names_of_shard)] for i, name in enumerate(sorted(arrays))}
    for file in set(names_of_shard):
        mx.save_safetensors(str(path / file), {name: arrays[name] for name in arrays if weight_map[name] == file})
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_shards_are_read_by_their_index(model_folder):
    path = model_folder()
    shard(path, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    (path / "consolidated.safetensors").write_bytes(b"not looked at")
    assert [file.name for file in weight_files(path)] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    np.testing.assert_array_equal(np.array(load_decoder(path).embed_tokens.weight), tensors_of()[EMBEDDING])


def test_the_single_file_comes_before_an_index_as_in_transformers(model_folder):
    path = model_folder()
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {EMBEDDING: "gone.safetensors"}}))
    load_decoder(path)


def test_a_missing_shard_is_named(model_folder):
    path = model_folder()
    shard(path, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards of its index: \['model-00002-of-00002.safetensors'\]"):
        load_decoder(path)


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/secret.safetensors", "sub/model.safetensors"])
def test_an_index_that_points_out_of_its_folder_is_refused(outside, model_folder):
    path = model_folder()
    (path / "model.safetensors").rename(path.parent / "secret.safetensors")
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {EMBEDDING: outside}}))
    with pytest.raises(ModelError, match="names files outside its folder.*Nothing was read"):
        load_decoder(path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(content, model_folder):
    path = model_folder()
    (path / "model.safetensors").unlink()
    (path / INDEX_FILE).write_text(content)
    with pytest.raises(ModelError, match="has no weight_map"):
        load_decoder(path)


def in_hub_cache(path, name="model.safetensors"):
    """The folder as the hub's cache has it: `snapshots/<revision>` with links to `blobs/<hash>`."""
    snapshot, blobs = path.parent / "models--x" / "snapshots" / "abc", path.parent / "models--x" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    path.rename(snapshot)
    (snapshot / name).rename(blobs / "0123")
    (snapshot / name).symlink_to("../../blobs/0123")
    return snapshot


def test_links_to_the_blobs_of_the_hub_cache_are_read(model_folder):
    load_decoder(in_hub_cache(model_folder()))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_a_model_folder_are_refused(name, model_folder):
    path = model_folder()
    outside = path.parent / "elsewhere"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    with pytest.raises(ModelError, match=rf"{name} is a link out of the model folder, to .*elsewhere"):
        load_decoder(path)
    load_decoder_through_link = path.parent / "link"
    (path / name).unlink()
    outside.rename(path / name)
    load_decoder_through_link.symlink_to(path)
    load_decoder(load_decoder_through_link)  # the folder itself may be one


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_with_the_reason(name, model_folder):
    path = model_folder()
    (path / "model.safetensors").rename(path / name)
    with pytest.raises(ModelError, match=f"only as {re.escape(name)}.*pickle files, which can run code"):
        load_decoder(path)


def test_a_folder_without_weights_is_refused(model_folder):
    path = model_folder()
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_decoder(path)


@pytest.mark.parametrize("keep", [0, 4, 60, -50])
def test_a_safetensors_file_cut_short_is_refused(keep, model_folder):
    path = model_folder()
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(WeightsError, match="cannot be read as safetensors.*copy it again"):
        load_decoder(path)


# ---- config.json -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'single': 1}", "cannot be read as JSON"),
        (b'{"model_type": "lla', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[1, 2]", "must hold a JSON object, found a list"),
        (b"{}", "model_type is None"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(content, message, model_folder):
    path = model_folder()
    (path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_decoder(path)
    assert str(path / "config.json") in str(caught.value)


def test_a_missing_config_says_what_is_there(model_folder):
    path = model_folder()
    (path / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json is missing.*found here: model.safetensors"):
        load_decoder(path)


# ---- paths and hub ids -----------------------------------------------------------------------------------------------------


def test_a_local_folder_is_itself(tmp_path):
    assert resolve_model_path(str(tmp_path)) == tmp_path


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.npz").write_bytes(b"x")
    with pytest.raises(ModelError, match="is a file; a model folder or a hub id is needed"):
        resolve_model_path(str(tmp_path / "model.npz"))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="No model folder at"):
        resolve_model_path(path)


def test_a_hub_id_without_a_network_gives_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'someone/some-model' is not a folder here.*(?s:.*)download the folder elsewhere"):
        resolve_model_path("someone/some-model")


def test_a_name_that_no_repository_can_have_is_refused():
    with pytest.raises(ModelError, match="neither a folder here nor a valid hub id"):
        resolve_model_path("not a name!")


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    from fnmatch import fnmatch

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name) or str(tmp_path))
    assert resolve_model_path("someone/some-model") == tmp_path
    wanted = "config.json generation_config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json"
    wanted += " tokenizer.json tokenizer_config.json tokenizer.model chat_template.jinja merges.txt README.md"
    unwanted = "consolidated.safetensors pytorch_model.bin model.gguf modeling_custom.py onnx/model.onnx"
    taken = [name for name in f"{wanted} {unwanted}".split() if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])]
    assert taken == wanted.split()
