"""The self-check passes where the family table is right, and fails where it is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oa_train.diagnostics import selfcheck
from oa_train.diagnostics.selfcheck import COMPARISONS, COUNTS, self_check
from oa_train.errors import ModelError
from oa_train.models.families import FAMILIES
from oa_train.models.frozen import freeze
from oa_train.models.spec import LMSpec
from oa_train.tasks.encoding import load_tokenizer
from tests.builders import BOS, TINY_CONFIGS, VOCABULARY, tiny_model

UNTOUCHED = "the model is as before: hooks, modules, weights, logits"


def failures(model) -> list[str]:
    return [check.name for check in self_check(model) if not check.passed]


def test_every_family_passes_to_the_last_digits_and_draws_nothing_from_the_global_generators(any_model):
    # Python's own generator is left out: the type checker of the tests draws from it.
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    checks = self_check(any_model)
    assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    assert [check.name for check in checks] == [*COMPARISONS, *COUNTS, UNTOUCHED]
    assert all(check.passed and not check.problem and check.figure < 1e-12 for check in checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_tolerances_allow_for_the_data_type(family, dtype):
    assert not failures(tiny_model(family, dtype))


def test_a_sequential_model_of_a_family_that_can_be_either_passes():
    options = TINY_CONFIGS["gpt_neox"] | {"use_parallel_residual": False, "bos_token_id": BOS}
    config = AutoConfig.for_model("gpt_neox", vocab_size=VOCABULARY, **options)
    with torch.random.fork_rng():
        model = freeze(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    assert not failures(model)
    config.use_parallel_residual = True
    assert "every MLP reads what `parallel` says" in failures(model)


ADDED = "all ablated: blocks add their constants and nothing else"
HEADS = "heads at constants: attention adds the same at every token"
NEURONS = "neurons at constants: the MLP adds the same at every token"
EDGES = "every edge kept: the logits are the model's own"
READERS = "every query, key and value reads what its name says"


@pytest.mark.parametrize(
    ("family", "wrong", "failed"),
    [
        ("gpt2", {"mlp": "attn"}, ADDED),
        ("gpt2", {"mlp": "ln_2"}, ADDED),
        ("gpt2", {"mlp": "mlp.c_fc"}, ADDED),
        ("llama", {"mlp": "self_attn"}, ADDED),
        ("llama", {"mlp": "input_layernorm"}, ADDED),
        ("qwen2", {"attention_output": "self_attn.q_proj"}, ADDED),
        ("olmo2", {"mlp": "mlp"}, ADDED),
        ("gemma3_text", {"mlp": "pre_feedforward_layernorm"}, ADDED),
        ("gpt2", {"parallel": True}, "every MLP reads what `parallel` says"),
        ("gpt_neox", {"variants": {}}, "every MLP reads what `parallel` says"),
        ("llama", {"post_norms": True}, "every block adds what `post_norms` says"),
        ("gemma3_text", {"post_norms": False}, "every block adds what `post_norms` says"),
        ("llama", {"down_projection": "self_attn.o_proj"}, NEURONS),
        ("gemma3_text", {"attention_post_norm": "pre_feedforward_layernorm"}, HEADS),
        ("llama", {"projections": tuple(f"self_attn.{kind}_proj" for kind in "qvk")}, READERS),
        ("gpt_neo", {"projections": tuple(f"attn.attention.{kind}_proj" for kind in "kqv")}, READERS),
        ("gpt_neox", {"interleaved": False}, READERS),
        ("phi3", {"interleaved": True}, READERS),
        ("olmo2", {"joint_norms": False}, READERS),
        ("llama", {"attention_norm": ""}, EDGES),
        ("gpt2", {"mlp_input": "ln_1"}, EDGES),
        ("gemma3_text", {"attention_post_norm": ""}, EDGES),
        ("opt", {"attention_norm": "final_layer_norm"}, EDGES),
    ],
)
def test_a_wrong_entry_fails(monkeypatch, family, wrong, failed):
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **wrong))
    # The other checks would say nothing here and take their time.
    for checks in ("COMPARISONS", "COUNTS"):
        monkeypatch.setattr(selfcheck, checks, {n: c for n, c in getattr(selfcheck, checks).items() if n == failed})
    assert failures(tiny_model(family)) == [failed]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mlp": "mpl"},
        {"blocks": "transformer"},
        {"blocks": "h"},
        {"attention_output": "mlp.c_fc"},
        {"attention_output": "attn"},
        {"down_projection": "mlp.c_fc"},
        {"down_projection": "attn.c_proj"},
    ],
)
def test_a_path_that_leads_nowhere_is_refused(monkeypatch, wrong):
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], **wrong))
    with pytest.raises(ModelError, match=r"not built as its entry|(output|down) projections of this gpt2"):
        self_check(tiny_model("gpt2"))


def test_a_check_that_cannot_be_carried_out_has_failed_and_says_why(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], mlp="mlp.c_fc"))
    check = self_check(tiny_model("gpt2"))[0]
    assert not check.passed
    assert check.figure != check.figure
    assert "Error: " in check.problem


@pytest.mark.parametrize("change", ["a hook", "a weight", "a gradient", "the mode"])
def test_a_changed_model_is_noticed(monkeypatch, change):
    model = tiny_model("gpt2")
    first = next(model.parameters())

    def tamper(_: object) -> float:
        if change == "a hook":
            model.transformer.h[1].register_forward_hook(lambda *_: None)
        elif change == "a weight":
            first[-1, -1] += 1e-9
        elif change == "a gradient":
            first.requires_grad_(True)
        else:
            model.transformer.h[1].train()
        return 0.0

    monkeypatch.setattr(selfcheck, "COMPARISONS", {})
    monkeypatch.setattr(selfcheck, "COUNTS", {"tampering": tamper})
    assert failures(model) == [UNTOUCHED]


def test_weights_that_are_not_finite_are_named_before_the_table_is_blamed():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight[2, 3] = torch.nan
    with pytest.raises(ModelError, match=r"NaN or infinity, in 1 tensor \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        self_check(model)


@pytest.mark.parametrize(("rows", "fits"), [(None, True), (200, False)])
def test_the_tokenizer_is_checked_against_the_embedding(monkeypatch, tmp_path, rows, fits):
    for checks in ("COMPARISONS", "COUNTS"):
        monkeypatch.setattr(selfcheck, checks, {})
    load_tokenizer(LMSpec()).save_pretrained(tmp_path)
    AutoConfig.for_model("gpt2", vocab_size=rows or 1000).save_pretrained(tmp_path)
    *_, check = self_check(tiny_model("gpt2"), lm=LMSpec(str(tmp_path)))
    assert (check.name, check.passed) == ("the tokenizer fits the embedding", fits)
    assert fits or "ModelError: The tokenizer has" in check.problem
