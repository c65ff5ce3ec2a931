"""The model of the benchmarks: a Llama of 20 million parameters with random weights, and a tokenizer made from the data.

    python nbs_tests/benchmarks/wikisql_model.py DATA FOLDER

DATA holds `train.jsonl` with rows `{"text": ...}`; the same seed and data give the same folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

VOCAB_SIZE = 8192
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 384, 1536, 6, 6
MAX_POSITIONS = 2048


def make_model_folder(data: Path, folder: Path, seed: int = 0) -> Path:
    """Write a complete Hugging Face folder (float32) unless it is there already; returns it."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(data)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _speak_both_dialects(folder / "config.json")
    return folder


def _tokenizer(data: Path):
    """Byte-level BPE with `</s>` at the end of a text and a padding token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", model_max_length=MAX_POSITIONS)


def _speak_both_dialects(path: Path) -> None:
    """transformers 5 writes `rope_parameters` only; older readers (mlx-lm 0.32.2 among them) want `rope_theta`."""
    config = json.loads(path.read_text())
    config.setdefault("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(make_model_folder(arguments.data, arguments.folder))
