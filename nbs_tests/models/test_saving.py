"""Saving: complete Hugging Face folders that other libraries read, and no half-written file, ever."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from fulltune_nb import files, tensor_files
from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.files import atomic_path
from fulltune_nb.models import folder as saving
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import INDEX_FILE, hf_tensors, load_decoder, save_folder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.model_file import read_metadata, save_model_file
from fulltune_nb.tensor_files import write_tensors
from nbs_tests.models.model_cases import CASES, LLAMA3, SMALL, random_ids
from nbs_tests.models.parity import RAW, need_torch, relative_error, tensors_of

OLD_DIALECT = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
NEW_DIALECT = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}


def decoder_of(raw=RAW, dtype=mx.float32) -> Decoder:
    mx.random.seed(0)
    decoder = Decoder(read_config(raw))
    decoder.set_dtype(dtype)
    mx.eval(decoder.parameters())
    return decoder


def saved(tmp_path, raw=RAW, dtype=mx.float32, **options):
    save_folder(tmp_path / "out", decoder_of(raw, dtype), None, **options)
    return tmp_path / "out"


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


# ---- the folder ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_complete_and_holds_nothing_else(make_tokenizer, tmp_path):
    decoder = decoder_of()
    folder = tmp_path / "a" / "out"
    save_folder(folder, decoder, make_tokenizer(), generation_config={"eos_token_id": [1, 2]})
    expected = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(folder)) == expected
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading_changes_nothing(case, tmp_path):
    decoder = decoder_of(CASES[case])
    save_folder(tmp_path / "out", decoder, None)
    again = load_decoder(tmp_path / "out")
    assert again.config == decoder.config
    ids = mx.array(random_ids(CASES[case], (1, 9), 0))
    np.testing.assert_array_equal(np.array(again(ids)), np.array(decoder(ids)))


def test_tensors_have_the_names_and_the_metadata_of_hugging_face(tmp_path):
    with safe_open(saved(tmp_path) / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(tensors_of())
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("dtype", "name"), [(mx.float32, "float32"), (mx.bfloat16, "bfloat16")])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_dtype_in_the_dialect_of_the_source(key, dtype, name, tmp_path):
    folder = saved(tmp_path, {**RAW, key: "float16"}, dtype)
    written = config_of(folder)
    assert written[key] == name and len({"dtype", "torch_dtype"} & set(written)) == 1
    assert load_decoder(folder).embed_tokens.weight.dtype == dtype


def test_the_config_keeps_everything_of_the_source(tmp_path):
    raw = {**RAW, **OLD_DIALECT, "architectures": ["LlamaForCausalLM"], "made_up": {"a": [1, None]}, "transformers_version": "4.1"}
    written = config_of(saved(tmp_path, raw))
    assert {key: written[key] for key in raw} == raw


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_config_says_whether_the_embeddings_are_tied(family, tied, tmp_path):
    folder = saved(tmp_path, {**RAW, "model_type": family, "tie_word_embeddings": tied})
    assert config_of(folder)["tie_word_embeddings"] is tied
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert ("lm_head.weight" in file.keys()) is not tied


def test_tying_left_to_the_familys_default_is_written_out(tmp_path):
    assert config_of(saved(tmp_path, {**RAW, "model_type": "gemma"}))["tie_word_embeddings"] is True


@pytest.mark.parametrize("dialect", [OLD_DIALECT, NEW_DIALECT], ids=["old", "new"])
def test_rotary_settings_stand_in_the_older_dialect_too(dialect, tmp_path):
    """mlx-lm reads only that one, and takes its own defaults where it finds nothing."""
    written = config_of(saved(tmp_path, {**RAW, **dialect}))
    assert written["rope_theta"] == 5e5 and written["rope_scaling"]["factor"] == 2.0
    assert {key: written[key] for key in dialect} == dialect
    assert read_config(written) == read_config({**RAW, **dialect})


def test_a_count_of_positions_stays_a_whole_number(tmp_path):
    written = config_of(saved(tmp_path, {**RAW, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}))
    assert written["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert isinstance(written["rope_scaling"]["original_max_position_embeddings"], int)


def test_the_share_of_rotated_dimensions_is_written_out(tmp_path):
    raw = {**RAW, "model_type": "phi", "hidden_size": 32}
    assert config_of(saved(tmp_path, raw))["partial_rotary_factor"] == 0.5


def test_values_that_readers_default_differently_are_written_out(tmp_path):
    raw = {key: value for key, value in RAW.items() if key != "num_key_value_heads"}
    written = config_of(saved(tmp_path, {**raw, "model_type": "gemma", "num_attention_heads": 16, "hidden_size": 32}))
    assert (written["num_key_value_heads"], written["head_dim"], written["rms_norm_eps"], written["rope_theta"]) == (16, 256, 1e-6, 1e4)


def test_the_default_rotation_is_written_as_no_scaling(tmp_path):
    written = config_of(saved(tmp_path, {**RAW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}))
    assert written["rope_theta"] == 1e6 and written.get("rope_scaling") is None


# ---- shards ----------------------------------------------------------------------------------------------------------------


def test_large_models_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", 8000)
    decoder = decoder_of()
    save_folder(tmp_path / "out", decoder, None)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    tensors = hf_tensors(decoder)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*files, INDEX_FILE, "config.json"])
    for name in files:
        with safe_open(tmp_path / "out" / name, framework="numpy") as file:
            assert set(file.keys()) == {key for key, place in index["weight_map"].items() if place == name}
            assert file.metadata() == {"format": "pt"}
        inside = sum(tensors[key].nbytes for key, place in index["weight_map"].items() if place == name)
        assert inside <= 8000 or sum(place == name for place in index["weight_map"].values()) == 1
    ids = mx.array(random_ids(RAW, (1, 9), 0))
    np.testing.assert_array_equal(np.array(load_decoder(tmp_path / "out")(ids)), np.array(decoder(ids)))


# ---- in transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 8000], ids=["whole", "shards"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_folder_and_computes_the_same(case, shard_bytes, tmp_path, monkeypatch):
    need_torch()
    from nbs_tests.models import torch_reference

    monkeypatch.setattr(saving, "SHARD_BYTES", shard_bytes)
    decoder = decoder_of(CASES[case])
    save_folder(tmp_path / "out", decoder, None)
    ids = random_ids(CASES[case], (2, 27), 0)
    found = torch_reference.logits(torch_reference.load(tmp_path / "out"), ids)
    assert relative_error(found, np.array(decoder(mx.array(ids)))) < 1e-5


def test_transformers_loads_bfloat16_as_bfloat16(tmp_path):
    need_torch()
    import torch

    from nbs_tests.models import torch_reference

    assert {parameter.dtype for parameter in torch_reference.load(saved(tmp_path, dtype=mx.bfloat16)).parameters()} == {torch.bfloat16}


# ---- what is not overwritten, and what is not left behind ------------------------------------------------------------------


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    (tmp_path / "out").mkdir()
    folder = saved(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="is not an empty folder.*new or empty"):
        save_folder(folder, decoder_of(dtype=mx.bfloat16), None)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.fixture
def moments(tmp_path, monkeypatch):
    """Copies of `tmp_path/now`: after each call by which a file or folder gets its name."""
    (tmp_path / "now").mkdir()
    found, numbers = [], itertools.count()

    def watch(place, name):
        call = getattr(place, name)

        def seen(*arguments):
            result = call(*arguments)
            found.append(tmp_path / f"moment{next(numbers)}")
            shutil.copytree(tmp_path / "now", found[-1])
            return result

        monkeypatch.setattr(place, name, seen)

    for place, name in ((os, "replace"), (os, "rename"), (files, "exchange_names"), (tensor_files, "write_parts")):
        watch(place, name)
    return found


def test_whenever_a_save_into_an_empty_folder_is_killed_it_is_empty_or_whole(moments, make_tokenizer, tmp_path):
    out, mode = tmp_path / "now" / "out", 0o750
    out.mkdir()
    out.chmod(mode)
    (tmp_path / "now" / "link").symlink_to(out)
    save_folder(tmp_path / "now" / "link", decoder_of(), make_tokenizer(), generation_config={})
    whole = sorted(os.listdir(out))
    assert "config.json" in whole and {str(sorted(os.listdir(moment / "out"))) for moment in moments} == {"[]", str(whole)}
    assert stat.S_IMODE(out.stat().st_mode) == mode and sorted(os.listdir(tmp_path / "now")) == ["link", "out"]


def test_the_working_directory_stays_the_folder_that_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(Path(os.curdir), decoder_of(), None)
    assert os.path.samefile(os.curdir, tmp_path) and sorted(os.listdir(os.curdir)) == ["config.json", "model.safetensors"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ModelError, match="is not an empty folder"):
        saved(tmp_path)
    assert (tmp_path / "out").read_text() == "mine"


class UnwritableTokenizer:
    def save_pretrained(self, path):
        raise OSError("disk full")


@pytest.mark.parametrize("there_before", [True, False])
def test_a_failed_save_leaves_no_half_model(there_before, tmp_path):
    if there_before:
        (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="could not be written: disk full"):
        save_folder(tmp_path / "out", decoder_of(), UnwritableTokenizer())
    assert os.listdir(tmp_path) == (["out"] if there_before else [])
    assert not there_before or os.listdir(tmp_path / "out") == []
    saved(tmp_path)  # and the next try is not refused


def break_writing(monkeypatch, error):
    """The libraries write a part of the file, then fail."""

    def write_half(path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    monkeypatch.setattr(tensor_files, "write_parts", write_half)
    monkeypatch.setattr(tensor_files, "write_npz", write_half)


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
@pytest.mark.parametrize("error", [RuntimeError("[write] Unable to write"), OSError("No space left on device")])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(ending, error, tmp_path, monkeypatch):
    path = tmp_path / f"model{ending}"
    write_tensors(path, {"x": mx.ones(3)})
    before = path.read_bytes()
    break_writing(monkeypatch, error)
    with pytest.raises(WeightsError, match="could not be written: .*Check free space"):
        write_tensors(path, {"x": mx.zeros(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_a_disk_that_is_full_at_the_last_bytes_is_told(ending, tmp_path):
    path, limits = tmp_path / f"model{ending}", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_tensors(path, {str(i): mx.ones(9) for i in range(9)})
    whole = path.read_bytes()
    for missing in (1, 30, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - missing, limits[1]))
        try:
            with pytest.raises(WeightsError, match="could not be written: .*Check free space"):
                write_tensors(path, {str(i): mx.zeros(9) for i in range(9)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == whole and os.listdir(tmp_path) == [path.name]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    write_tensors(path, {"x": mx.ones(3)})
    break_writing(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"x": mx.zeros(3)})
    assert os.listdir(tmp_path) == ["model.npz"] and mx.load(str(path))["x"].tolist() == [1, 1, 1]


def file_of(path, number, tokenizer):
    lm = LanguageModel(decoder_of(), tokenizer)
    lm.model.norm.weight = mx.full(lm.model.norm.weight.shape, number)
    save_model_file(path, lm, template_date=str(number))


@pytest.mark.parametrize("before", ["nothing", "a file", "a file without texts"])
def test_whenever_a_save_is_killed_an_npz_has_its_own_texts(before, moments, make_tokenizer, tmp_path):
    path, beside, tokenizer = tmp_path / "now" / "model.npz", tmp_path / "now" / "model.npz.json", make_tokenizer()
    if before != "nothing":
        file_of(path, 1, tokenizer)
    if before == "a file without texts":
        beside.unlink()
    moments.clear()
    file_of(path, 2, tokenizer)
    assert "replaces" not in json.loads(beside.read_text())
    found = set()
    for file in (moment / "model.npz" for moment in moments):
        if file.exists():
            found.add((mx.load(str(file))["model.norm.weight"][0].item(), read_metadata(file).get("template_date")))
    earlier = {"nothing": set(), "a file without texts": {(1, None)}}.get(before, {(1, "1")})
    assert found == {*earlier, (2, "2")}


def test_the_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    with atomic_path(tmp_path / "model.safetensors") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "model.safetensors").exists()
        assert not list(tmp_path.glob("model*"))  # a reader that takes model*.safetensors does not see it either
    assert (tmp_path / "model.safetensors").read_text() == "whole"


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX files")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_umask_leaves(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        folder = saved(tmp_path, generation_config={})
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)} == {mode}


@pytest.mark.parametrize("name", ["model.bin", "model", "model.npz.gz"])
def test_other_endings_are_refused(name, tmp_path):
    with pytest.raises(WeightsError, match="ends in .safetensors or .npz"):
        write_tensors(tmp_path / name, {"x": mx.ones(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_written_tensors_are_read_back_as_they_were(ending, dtype, tmp_path):
    tensors = {"model.layers.0.x": mx.arange(6).reshape(2, 3).astype(dtype), "y": mx.ones((1,), dtype=dtype).T}
    write_tensors(tmp_path / f"m{ending}", tensors)
    again = mx.load(str(tmp_path / f"m{ending}"))
    assert {name: (array.dtype, array.tolist()) for name, array in again.items()} == {
        name: (array.dtype, array.tolist()) for name, array in tensors.items()
    }


def test_own_metadata_is_added_to_that_of_mlx(tmp_path):
    write_tensors(tmp_path / "m.safetensors", {"x": mx.ones(3)}, {"source": "somewhere"})
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "source": "somewhere"}


def test_a_trained_models_new_values_are_what_is_saved(tmp_path):
    decoder = decoder_of({"model_type": "mixtral", **SMALL, "num_local_experts": 2})
    decoder.layers[0].mlp.experts[1].up_proj.weight = mx.full((20, 24), 0.5)
    save_folder(tmp_path / "out", decoder, None)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert np.all(file.get_tensor("model.layers.0.block_sparse_moe.experts.1.w3.weight") == 0.5)
