"""The model as it is loaded, and what it knows."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oa_train.cli.main import main
from oa_train.models.frozen import CausalLM
from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.model_files import locate
from oa_train.models.selection import Nodes
from oa_train.models.spec import LMSpec

pytestmark = pytest.mark.real


def test_a_gguf_file_has_the_logits_of_its_dequantised_folder_and_loads_quickly(real_lm: LMSpec) -> None:
    start = time.monotonic()
    model = load_model(real_lm)
    assert time.monotonic() - start < 10
    folder = Path(locate(real_lm)["pretrained_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Mary"
    assert logits[0, -1].softmax(0).max().item() == pytest.approx(0.923, abs=0.002)


def test_heads_mlps_and_edges(real: CausalLM) -> None:
    assert len(Nodes.of(real.config)) == 300
    assert len(Graph.of(real.config)) == 70_651


def test_the_check_takes_less_than_a_minute(real_lm: LMSpec, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert main(["inspect", "--lm.name", real_lm.name, "--check"]) == 0
    assert time.monotonic() - start < 60
    assert "70,651" in capsys.readouterr().out
