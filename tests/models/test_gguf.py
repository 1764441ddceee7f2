"""GGUF files: dequantised once, into a cache in which nothing unfinished is ever used."""

import re
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from oa_train.errors import ModelError
from oa_train.models import gguf as cache
from oa_train.models.loading import load_config, load_model
from oa_train.models.spec import LMSpec
from oa_train.tasks.encoding import load_tokenizer
from tests.builders import GROUPED, VOCABULARY, tiny_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a tiny Qwen2, its matrices as wide as a block of Q8_0 in that format and the rest in float32."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(GROUPED["num_hidden_layers"])
    writer.add_context_length(GROUPED["max_position_embeddings"])
    writer.add_embedding_length(GROUPED["hidden_size"])
    writer.add_feed_forward_length(GROUPED["intermediate_size"])
    writer.add_head_count(GROUPED["num_attention_heads"])
    writer.add_head_count_kv(GROUPED["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    words = ["<pad>", "<s>", "</s>", "\u0120", *"abcdefghijklmnopqrstuvwxyz", "ab", *"0123456"]
    writer.add_token_list(words[:VOCABULARY])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in tiny_model("qwen2", torch.float32).named_parameters():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = parameter.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            codes = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OA_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.mark.usefixtures("empty_cache")
def test_a_gguf_is_the_model_that_it_was_made_of_up_to_the_rounding_of_its_codes(written):
    model, original = load_model(LMSpec(gguf_file=str(written))), tiny_model("qwen2", torch.float32)
    for (name, parameter), expected in zip(model.named_parameters(), original.parameters(), strict=True):
        # Q8_0 has 127 steps for the largest value of 32.
        steps = expected.abs().max() / 127 if parameter.dim() == 2 and parameter.shape[1] % 32 == 0 else 0
        assert (parameter - expected).abs().max() <= 0.51 * steps, name
    tokenizer = load_tokenizer(LMSpec(gguf_file=str(written)))
    assert tokenizer.convert_ids_to_tokens(4) == "a"


def test_a_gguf_gives_the_logits_of_its_dequantised_folder_and_is_dequantised_once(
    written, empty_cache, monkeypatch, capsys
):
    tokens = torch.tensor([[1, 5, 6, 7]])
    model = load_model(LMSpec(str(written)))
    # One line before it, and no bars of transformers.
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"dequantising {written.name} \(\d+ MB\) into {empty_cache}; this happens once", line)
    (folder,) = filter(Path.is_dir, empty_cache.iterdir())
    assert torch.equal(model(input_ids=tokens).logits, load_model(LMSpec(str(folder)))(input_ids=tokens).logits)

    def twice(file):
        pytest.fail(f"{file} was dequantised again")

    monkeypatch.setattr(cache, "_read", twice)
    monkeypatch.setattr(cache, "find_spec", lambda name: None)  # the libraries are no longer needed
    assert torch.equal(model(input_ids=tokens).logits, load_model(LMSpec(str(written)))(input_ids=tokens).logits)


def test_a_gguf_is_named_by_its_path_from_anywhere(written, monkeypatch):
    monkeypatch.chdir(written.parent)
    specs = {LMSpec(gguf_file=written.name), LMSpec(written.name), LMSpec(".", gguf_file=written.name)}
    assert specs == {LMSpec(str(written))}


def test_what_was_left_unfinished_is_never_used(written, empty_cache):
    folder = cache.cache_folder() / "gguf" / cache._checksum(written, 0, 0)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{")
    (partial / "of another process").touch()
    load_config(LMSpec(str(written)))
    assert sorted(path.name for path in empty_cache.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert not (folder / "of another process").exists()


def test_a_second_process_waits_for_the_first(written, empty_cache):
    folder = cache.cache_folder() / "gguf" / cache._checksum(written, 0, 0)
    empty_cache.mkdir(parents=True)
    answers = []
    with FileLock(f"{folder}.lock"):
        waiting = threading.Thread(target=lambda: answers.append(cache.dequantised(written)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        folder.mkdir()
    waiting.join(10)
    assert answers == [folder]
    assert not list(folder.iterdir())  # it is the first one's


@pytest.mark.parametrize("share", [0.001, 0.1, 0.6, 0.999])
def test_a_truncated_gguf_is_told(written, empty_cache, tmp_path, share):
    file = tmp_path / "cut.gguf"
    content = written.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf' cannot be read: (.|\n)*truncated or damaged") as caught:
        load_model(LMSpec(str(file)))
    assert caught.value.exit_status == 2
    assert not any(map(Path.is_dir, empty_cache.iterdir()))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("content", [b"", b"GGU", b"version https://git-lfs"])
def test_a_file_that_is_no_gguf_is_told(tmp_path, content):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf' is not a GGUF file: it begins with b'"):
        load_model(LMSpec(str(file)))


@pytest.mark.usefixtures("empty_cache")
def test_missing_libraries_are_named(tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(cache, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs gguf and accelerate .* pip install 'oa_train\[gguf\]'"):
        load_model(LMSpec(str(file)))


def test_a_cache_that_cannot_be_written_names_the_variable(written, monkeypatch):
    monkeypatch.setenv("OA_TRAIN_CACHE", str(written / "cache"))
    with pytest.raises(ModelError, match=r"Not a directory(.|\n)*OA_TRAIN_CACHE names another folder"):
        load_model(LMSpec(str(written)))


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    for name in ("OA_TRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "oa_train"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.cache_folder() == tmp_path / "x" / "oa_train"
    monkeypatch.setenv("OA_TRAIN_CACHE", "~/here")
    assert cache.cache_folder() == tmp_path / "here"
