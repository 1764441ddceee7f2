"""A pretrained model, SmolLM2-135M, from the package index; see `make test-real`."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.real_model import real_model
from oa_train.models.frozen import CausalLM
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec


@pytest.fixture(scope="session")
def real_lm() -> LMSpec:
    torch.set_num_threads(os.cpu_count() or 1)
    return LMSpec(str(real_model()))


@pytest.fixture(scope="session")
def real(real_lm: LMSpec) -> CausalLM:
    return load_model(real_lm)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
