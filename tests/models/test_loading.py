"""Loading real folders: what comes back, and what is said when it cannot."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from oa_train.errors import ConfigurationError, ModelError
from oa_train.models.frozen import freeze
from oa_train.models.loading import empty_model, load_config, load_model, model_of_config, with_dtype
from oa_train.models.parts import find_parts
from oa_train.models.spec import LMSpec, builtin_models
from oa_train.models.weights import check_finite, fingerprint
from tests.builders import tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def saved(request, tmp_path_factory) -> Path:
    """A folder with a float32 model; shared, so tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    tiny_model(request.param, torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(spec: LMSpec) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert caught.value.exit_status == 2
    return str(caught.value)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.usefixtures("unchecked")
def test_wrong_options_are_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"lm\.dtype is 'float31'; expected one of .*Did you mean .*float32"):
        LMSpec(dtype="float31")
    with pytest.raises(ConfigurationError, match=r"lm\.bos is 'never'; expected one of auto, none"):
        LMSpec(bos="never")


def test_the_built_in_model_is_loaded_frozen():
    assert "tiny" in builtin_models()
    model = load_model(LMSpec())
    assert model.config.model_type == "gpt2"
    assert (model.config.n_layer, model.config.n_head) == (3, 4)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_local_folder_is_loaded_in_the_type_that_is_asked_for(saved, dtype):
    model = load_model(LMSpec(str(saved), dtype=dtype))
    wanted = getattr(torch, dtype)
    original = dict(tiny_model(model.config.model_type, torch.float32).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == original.keys()
    for name, parameter in found.items():
        assert parameter.dtype == wanted
        assert torch.equal(parameter, original[name].to(wanted))
        assert not parameter.requires_grad
    assert not any(module.training for module in model.modules())
    tokens = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_relative_folder_is_loaded(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert load_model(LMSpec("./model")).config.model_type == load_config(LMSpec("model")).model_type


def test_the_attention_back_end_is_the_one_that_is_asked_for(saved):
    assert load_model(LMSpec(str(saved), attn_implementation="eager")).config._attn_implementation == "eager"
    assert "nonsense" in refused(LMSpec(str(saved), attn_implementation="nonsense"))


@pytest.mark.parametrize("back_end", [None, "eager", "flash_attention_2"])
def test_an_empty_model_has_the_shapes_of_the_loaded_one_and_needs_no_weights(damaged, back_end):
    whole = load_model(LMSpec(str(damaged)))
    (damaged / "model.safetensors").unlink()
    before = torch.get_rng_state()
    empty = empty_model(LMSpec(str(damaged), dtype="bfloat16", attn_implementation=back_end))
    assert torch.equal(torch.get_rng_state(), before)
    assert not empty.training
    for (name, given), (expected_name, expected) in zip(
        empty.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert (name, given.shape) == (expected_name, expected.shape)
        assert given.is_meta
        assert given.dtype is torch.bfloat16
        assert not given.requires_grad


def test_freeze_stops_dropout_and_gradients():
    model = tiny_model("gpt2")
    model.train().requires_grad_(True)
    assert freeze(model) is model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_fingerprint_is_of_the_weights_and_not_of_their_type(saved):
    found = {dtype: fingerprint(load_model(LMSpec(str(saved), dtype=dtype))) for dtype in ("float32", "bfloat16")}
    assert found["float32"] == found["bfloat16"]
    assert len(found["float32"]) == 16
    int(found["float32"], 16)


def test_a_fingerprint_changes_with_any_tensor():
    model = tiny_model("llama")
    seen = {fingerprint(model), fingerprint(tiny_model("llama", seed=1)), fingerprint(tiny_model("gpt2"))}
    assert len(seen) == 3
    assert fingerprint(tiny_model("llama")) in seen
    for _, parameter in model.named_parameters():
        first = parameter.view(-1)[0].clone()
        parameter.view(-1)[0] += 1
        assert fingerprint(model) not in seen
        parameter.view(-1)[0] = first
    assert fingerprint(model) in seen


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    message = refused(LMSpec(str(tmp_path / "nothing")))
    assert str(tmp_path / "nothing") in message
    assert "does not exist" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("name", ["nothing.gguf", "./nothing", "../nothing", "~/nothing-here", "a/b/c"])
def test_what_looks_like_a_path_is_never_sought_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refused(LMSpec(name))


def test_a_folder_without_a_configuration_is_named(damaged):
    (damaged / "config.json").unlink()
    assert "has no config.json" in refused(LMSpec(str(damaged)))
    (damaged / "small model.gguf").touch()
    assert f"--lm.gguf_file '{damaged}/small model.gguf'" in refused(LMSpec(str(damaged)))


def test_a_file_is_told_from_a_folder(saved):
    message = refused(LMSpec(str(saved / WEIGHTS)))
    assert re.search(r"model\.safetensors', a file\.\nExpected the directory that holds it", message)


def test_local_paths_are_found_from_another_directory(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved.parent)
    relative = LMSpec("model"), LMSpec("./model"), LMSpec(str(saved)), LMSpec("model", adapter="model")
    monkeypatch.chdir(tmp_path)
    assert {spec.name for spec in relative} == {str(saved)}
    assert relative[-1].adapter == str(saved)
    assert load_config(relative[0]).model_type == load_config(relative[1]).model_type
    assert (LMSpec().name, LMSpec("nobody/model").name) == ("tiny", "nobody/model")


@pytest.mark.parametrize("stored", ["bfloat16", "float64"])
def test_the_data_type_auto_is_the_configurations(tmp_path, stored):
    tiny_model("llama", getattr(torch, stored)).save_pretrained(tmp_path)
    spec = LMSpec(str(tmp_path), dtype="auto")
    assert {load_model(spec).dtype, empty_model(spec).dtype} == {getattr(torch, stored)}
    assert with_dtype(spec) == LMSpec(str(tmp_path), dtype=stored)
    assert with_dtype(LMSpec("nothing/at-all")) == LMSpec("nothing/at-all")


TEXT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "vocab_size": 64,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("family", "text", "part"),
    [("gemma3", {}, "gemma3_text"), ("llava", {"model_type": "llama"}, "llama"), ("mistral3", {}, "mistral")],
)
def test_of_a_vision_language_model_the_language_model_is_loaded(tmp_path, family, text, part):
    sizes = VISION | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(family, text_config=TEXT | text, vision_config=sizes)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path)
    model, tokens = load_model(LMSpec(str(tmp_path))), torch.tensor([[1, 5, 6, 7]])
    assert (model.config.model_type, find_parts(model).dimensions.n_layers) == (part, 2)
    assert torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
    edit(tmp_path, lambda tensors: tensors.pop(next(name for name in tensors if "layers.1.mlp" in name)))
    assert "lack 1 tensor (model.layers.1.mlp" in refused(LMSpec(str(tmp_path)))


def test_a_vision_language_model_whose_language_model_is_unknown_is_named(tmp_path):
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path)
    assert "language model of 'qwen2_5_vl' is not supported: Models of the family" in refused(LMSpec(str(tmp_path)))


@pytest.fixture
def adapter(saved, tmp_path) -> tuple[Path, torch.Tensor]:
    """A LoRA of the saved model, and the logits of the two."""
    peft = pytest.importorskip("peft")
    target = "c_proj" if "gpt2" in str(saved) else "down_proj"
    options = {"target_modules": [target], "fan_in_fan_out": target == "c_proj"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        adapted = peft.get_peft_model(load_model(LMSpec(str(saved))), peft.LoraConfig(r=2, lora_alpha=8, **options))
    adapted.eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", adapted(input_ids=torch.tensor([[1, 5, 6, 7]])).logits


def test_an_adapter_is_merged_on_loading(saved, adapter):
    folder, expected = adapter
    model, plain = load_model(LMSpec(str(saved), adapter=str(folder))), load_model(LMSpec(str(saved)))
    logits = model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - plain(input_ids=torch.tensor([[1, 5, 6, 7]])).logits).abs().max() > 0.1
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert fingerprint(model) != fingerprint(plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_does_not_fit_is_refused(saved, adapter, tmp_path):
    folder, _ = adapter
    spec = LMSpec(str(saved), adapter=str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    gone = tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "1 tensors that it has and should have differ" in refused(spec)
    save_file(tensors | {sorted(tensors)[0]: gone[:, :1].contiguous()}, folder / "adapter_model.safetensors")
    assert re.search(rf"cannot be merged into .*\n.*trained on {saved}", refused(spec))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert re.search(r"has no adapter_model\.safetensors\.(.|\n)*can hold code", refused(spec))


def test_an_adapter_and_quantised_weights_exclude_each_other():
    with pytest.raises(ConfigurationError, match=r"lm\.adapter is merged .* lm\.quantization"):
        LMSpec(adapter="a/b", quantization="8bit")


def test_weights_in_several_files_are_loaded_and_a_missing_one_is_told(tmp_path):
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert fingerprint(load_model(LMSpec(str(tmp_path)))) == fingerprint(model)
    files[1].unlink()
    assert files[1].name in refused(LMSpec(str(tmp_path)))


def test_a_family_that_is_not_supported_is_named(damaged):
    (damaged / "config.json").write_text(json.dumps({"model_type": "rwkv"}))
    message = refused(LMSpec(str(damaged)))
    assert "'rwkv'" in message
    assert "gpt2" in message
    assert "llama" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no such family"}', ""])
def test_a_damaged_configuration_is_refused(damaged, content):
    (damaged / "config.json").write_text(content)
    message = refused(LMSpec(str(damaged)))
    assert str(damaged) in message or "family" in message


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.99])
def test_truncated_weights_are_refused(damaged, share):
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    assert str(damaged) in refused(LMSpec(str(damaged)))


def test_missing_weights_are_refused(damaged):
    (damaged / WEIGHTS).unlink()
    assert str(damaged) in refused(LMSpec(str(damaged)))


def test_weights_that_lack_a_tensor_are_refused(damaged):
    gone = next(name for name in sorted(load_file(damaged / WEIGHTS)) if ".1." in name)
    edit(damaged, lambda tensors: tensors.pop(gone))
    message = refused(LMSpec(str(damaged)))
    assert "lack 1 tensor" in message
    assert gone.rsplit(".", 1)[0] in message


def test_weights_of_another_shape_are_refused(damaged):
    tensors = load_file(damaged / WEIGHTS)
    name = next(name for name in sorted(tensors) if "mlp" in name and tensors[name].dim() == 2)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, damaged / WEIGHTS, metadata={"format": "pt"})
    assert str(damaged) in refused(LMSpec(str(damaged)))


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 518832\n"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (WEIGHTS, LFS_POINTER, r"\nmodel\.safetensors is a pointer of Git LFS .* `git lfs pull`"),
        ("pytorch_model.bin", LFS_POINTER, r"\npytorch_model\.bin is a pointer of Git LFS"),
        ("pytorch_model.bin", "no weights", r"cannot be loaded: Weights only load failed\."),
        ("config.json", LFS_POINTER, r"\nconfig\.json is a pointer of Git LFS"),
        (INDEX, "{", r"\nmodel\.safetensors\.index\.json is damaged: Expecting property name"),
        (INDEX, "{}", r"\nmodel\.safetensors\.index\.json is damaged: KeyError: 'weight_map'"),
        (INDEX, "[]", r"\nmodel\.safetensors\.index\.json is damaged: TypeError"),
        (INDEX, '{"weight_map": 3}', r"\nmodel\.safetensors\.index\.json is damaged: AttributeError"),
        (INDEX, '{"metadata": {}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}', r"model-1\.safetensors"),
    ],
)
def test_files_that_are_not_what_their_names_say_are_named(damaged, file, content, words):
    if file != "config.json":
        (damaged / WEIGHTS).unlink()
    (damaged / file).write_text(content)
    assert re.search(words, refused(LMSpec(str(damaged))))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_hidden_layers": "two"}, "Field '(n_layer|num_hidden_layers)' expected int, got str"),
        ({"num_attention_heads": 0}, "cannot be loaded: ZeroDivisionError"),
        ({"dtype": "float31"}, "cannot be loaded: AttributeError: .* 'float31'"),
    ],
)
def test_wrong_values_in_the_configuration_are_refused(damaged, wrong, words):
    config = json.loads((damaged / "config.json").read_text())
    names = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"} if "n_layer" in config else {}
    config |= {names.get(name, name): value for name, value in wrong.items()}
    (damaged / "config.json").write_text(json.dumps(config))
    assert re.search(words, refused(LMSpec(str(damaged))))


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_never_ignored(damaged, whole):
    (damaged / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (damaged / "config.json").unlink()
        (damaged / WEIGHTS).unlink()
    assert re.search(
        r"holds a LoRA or other peft adapter(.|\n)*the adapter as lm\.adapter", refused(LMSpec(str(damaged)))
    )


def test_an_adapter_on_the_hub_is_never_ignored(saved, tmp_path, monkeypatch):
    # The folder in which the Hub's client keeps what it has downloaded.
    snapshot = tmp_path / "models--somebody--adapter" / "snapshots" / "0"
    shutil.copytree(saved, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = LMSpec("somebody/adapter", local_files_only=True)
    load_config(spec)
    (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "The Hub's 'somebody/adapter' holds a LoRA or other peft adapter" in refused(spec)


def test_weights_without_a_place_in_the_model_are_refused(damaged):
    edit(damaged, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    assert re.search(r"hold 1 tensor \(score\.weight\) that (.|\n)*save_pretrained", refused(LMSpec(str(damaged))))


def test_weights_of_further_layers_are_refused(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] -= 1
    (damaged / "config.json").write_text(json.dumps(config | {"layer_types": None}))
    assert re.search(r"hold \d+ tensors \(\S+\.2\.\S+, .*, \.\.\.\) .* too few layers", refused(LMSpec(str(damaged))))


def test_buffers_that_older_versions_saved_are_no_mistake(damaged):
    names = ("h.0.attn.bias", "h.0.attn.masked_bias", "model.layers.0.self_attn.rotary_emb.inv_freq")
    edit(damaged, lambda tensors: tensors.update({name: torch.zeros(1) for name in names}))
    load_model(LMSpec(str(damaged)))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(damaged, value, dtype):
    edit(damaged, lambda tensors: tensors[sorted(tensors)[3]].view(-1)[-1:].fill_(float(value)))
    name = sorted(load_file(damaged / WEIGHTS))[3]
    message = refused(LMSpec(str(damaged), dtype=dtype))
    assert re.search(rf"weights hold NaN or infinity, in 1 tensor \({name}\)", message)


def test_weights_that_the_data_type_cannot_hold_are_named(damaged):
    edit(damaged, lambda tensors: tensors[sorted(tensors)[0]].view(-1)[-1:].fill_(1e6))
    load_model(LMSpec(str(damaged), dtype="bfloat16"))
    assert "too large for float16. Choose" in refused(LMSpec(str(damaged), dtype="float16"))


def test_weights_without_content_are_not_looked_at(saved):
    check_finite(empty_model(LMSpec(str(saved))))


def test_an_unknown_name_suggests_what_is_near(monkeypatch):
    def no_network(*_, **__):
        pytest.fail("the network was reached for")

    monkeypatch.setattr("socket.socket.connect", no_network)
    message = refused(LMSpec("tinny", local_files_only=True))
    assert "'tinny' cannot be loaded" in message
    assert "Did you mean tiny?" in message
    message = refused(LMSpec("nobody/there-is-no-such-model", local_files_only=True))
    assert "built-in name (" in message
    assert "tiny" in message
    assert "Did you mean" not in message


def test_a_model_is_made_of_settings_and_no_generator_moves():
    before = torch.random.get_rng_state()
    model = model_of_config("llama", vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (model.config.model_type, model.dtype, model.training) == ("llama", torch.float32, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ModelError, match="not supported"):
        model_of_config("bert")
