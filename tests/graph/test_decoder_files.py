"""Files of decoders that are broken or hostile: each is refused with a reason, and nothing is executed."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph.decoder import bundler
from isthmus_tools.graph.decoder.config import DecoderSource
from isthmus_tools.graph.decoder.gguf_file import read_gguf
from isthmus_tools.graph.decoder.transformers_folder import read_folder
from support.decoders import save_decoder, tiny_config, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("files") / "llama", tiny_config("llama"))


@pytest.fixture(scope="module")
def gguf_bytes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(keys: bytes, tensors: bytes = b"", *, key_count: int = 1, tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors + bytes(64)


STRING, ARRAY, UINT32 = 8, 9, 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not begin with GGUF"),
        (b"PK\3\4" + bytes(64), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "has the version"),
        (header(b"", key_count=2**60), "states 1152921504606846976 keys"),
        (header(b"", tensor_count=2**60), "states 1152921504606846976 tensors"),
        (header(struct.pack("<Q", 2**63) + b"x"), "a text of 9223372036854775808 bytes"),
        (header(text(b"a") + struct.pack("<IIQ", ARRAY, UINT32, 2**60)), "elements in its arrays up to a"),
        (header(text(b"a") + struct.pack("<IIQ", ARRAY, STRING, 2**22)), r"truncated: its \d+ bytes"),
        # An array of arrays of arrays …, as deep as a file is long.
        (header(text(b"a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000), "array of arrays, a"),
        (header(text(b"a") + struct.pack("<I", 77)), "unknown type 77"),
        (
            header(b"", text(b"t") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0), key_count=0, tensor_count=1),
            "tensor t of 18446744073709551616 elements",
        ),
        (header(b"", text(b"t") + struct.pack("<I", 2**31), key_count=0, tensor_count=1), "2147483648 dimensions"),
        (
            header(b"", text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**40), key_count=0, tensor_count=1),
            "truncated: the tensor t ends at byte",
        ),
        (header(text(b"general.architecture") + struct.pack("<I", STRING) + text(b"mamba")), "architecture 'mamba'"),
    ],
)
def test_hostile_headers_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (path := tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        read_gguf(path)


def test_a_truncated_file_is_refused_wherever_it_ends(gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for length in (*range(0, len(gguf_bytes), len(gguf_bytes) // 40), len(gguf_bytes) - 1):
        path.write_bytes(gguf_bytes[:length])
        with pytest.raises(ModelError, match=r"truncated|does not begin with GGUF|has the version"):
            read_gguf(path)


def test_damaged_headers_are_refused_or_read(gguf_bytes: bytes, tmp_path: Path) -> None:
    generator, path = np.random.default_rng(0), tmp_path / "model.gguf"
    refused = 0
    for _ in range(60):
        content = bytearray(gguf_bytes)
        for at in generator.integers(4, 1500, 3):
            content[at] = generator.integers(256)
        path.write_bytes(content)
        try:
            read_gguf(path)
        except ModelError:
            refused += 1
    assert refused > 30


def with_tensors(folder: Path, out: Path, change: Callable[[dict[str, Array]], object]) -> DecoderSource:
    """The folder with changed tensors."""
    shutil.copytree(folder, out)
    arrays = safetensors.numpy.load_file(out / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, out / "model.safetensors")
    return read_folder(out)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays: arrays.pop("model.layers.2.mlp.up_proj.weight"), "lacks the tensor blk.2.ffn_up.weight"),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.zeros(32, np.float32)}),
            r"output_norm.weight has the shape \[32\]; the configuration says \[64\]",
        ),
        (
            lambda arrays: arrays.update({"model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}),
            "has the tensor model.layers.0.self_attn.o_proj.bias, which",
        ),
        (
            lambda arrays: arrays.update({"model.norm.weight": np.full(64, np.nan, np.float32)}),
            "scores are no finite numbers",
        ),
    ],
)
def test_tensors_that_fit_no_decoder_are_refused(change: Any, reason: str, llama: Path, tmp_path: Path) -> None:
    decoder = with_tensors(llama, tmp_path / "changed", change)
    with pytest.raises(ModelError, match=reason):
        bundler.build_decoder(decoder, "tiny", tmp_path / "out")


def copied(folder: Path, out: Path, **documents: Mapping[str, Any]) -> Path:
    """The folder with changed documents: `config` is config.json."""
    shutil.copytree(folder, out)
    for name, changes in documents.items():
        path = out / f"{name}.json"
        document = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**document, **changes}))
    return out


def test_pickled_weights_are_refused_unread(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"pytorch_model.bin, a pickle") as refused:
        read_folder(folder)
    assert "save_pretrained" in refused.value.hint
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_shards_and_of_half_the_bits_are_read(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    folder = copied(llama, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    name = "blk.1.attn_q.weight"
    np.testing.assert_allclose(read_folder(folder).weights.get(name), read_folder(llama).weights.get(name), atol=5e-3)
    # A shard that is not there is named when its tensor is read.
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    with pytest.raises(ModelError, match=r"model-0000\d-of-.* cannot be read"):
        read_folder(folder).weights.get(name)


def test_an_index_leads_to_no_file_outside_the_folder(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "model.safetensors", tmp_path / "secret.safetensors")
    folder = copied(llama, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    names = dict.fromkeys(safetensors.numpy.load_file(llama / "model.safetensors"), "../secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError, match=r"folder/secret.safetensors cannot be read"):
        read_folder(folder).weights.get("output_norm.weight")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        read_folder(folder)


WORDS = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"the": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}


@pytest.mark.parametrize(
    ("tokenizer", "template", "reason"),
    [
        (WORDS, "", "does not give every text back"),
        ({"model": {"type": "BPE"}}, "", "tokenizer cannot be read"),
        ({"added_tokens": None}, "", "tokenizer cannot be read"),
        (None, "{% for m in messages %}{{ m.content }}", "chat template cannot be read"),
        (None, "x" * (2**17 + 1), "a chat template of 131073 characters"),
    ],
)
def test_texts_that_no_function_could_read_are_refused_at_import(
    tokenizer: Any, template: str, reason: str, llama: Path, tmp_path: Path
) -> None:
    folder = copied(llama, tmp_path / "text")
    (folder / "chat_template.jinja").write_text(template)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=reason):
        bundler.build_decoder(read_folder(folder), "tiny", tmp_path / "out")


def test_tokens_beyond_the_embedding_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "beyond", config={"eos_token_id": [0, 300]})
    with pytest.raises(ModelError, match="names the token 300"):
        bundler.build_decoder(read_folder(folder), "tiny", tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer.json"):
        read_folder(folder)


def test_the_ends_of_a_turn_and_the_beginning_of_a_text_are_read(llama: Path, tmp_path: Path) -> None:
    folder = copied(
        llama,
        tmp_path / "ends",
        generation_config={"eos_token_id": [7, 0]},
        tokenizer_config={"add_bos_token": True},
        config={"bos_token_id": 5},
    )
    decoder = read_folder(folder)
    assert (decoder.bos, decoder.eos) == (5, (0, 7))


def test_a_gguf_file_of_an_unknown_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    for name, (change, reason) in {
        "spm": ({"tokenizer.ggml.model": "llama"}, "kind 'llama'; byte-level BPE"),
        "split": ({"tokenizer.ggml.pre": "viking"}, "splits text as 'viking'"),
    }.items():
        path = write_gguf(llama, tmp_path / f"{name}.gguf", change)
        with pytest.raises(ModelError, match=reason):
            read_gguf(path)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_known_splits_of_text_give_it_back(pre: str, llama: Path, tmp_path: Path) -> None:
    decoder = read_gguf(write_gguf(llama, tmp_path / "split.gguf", {"tokenizer.ggml.pre": pre}))
    bundle, _ = bundler.build_decoder(decoder, "tiny", tmp_path / "out")
    assert bundle.text is not None


def test_gguf_itself_would_read_what_the_header_check_refuses(tmp_path: Path) -> None:
    # The reason for the check: the package counts by the file's claims.
    (path := tmp_path / "deep.gguf").write_bytes(
        header(text(b"a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000)
    )
    with pytest.raises(RecursionError):
        gguf.GGUFReader(path)
