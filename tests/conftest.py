"""Two fixtures make tiny random models: of the four archetypes, and of every supported family."""

import os
from collections.abc import Iterator

import pytest
import torch

from oa_train.models.families import FAMILIES
from oa_train.models.loading import CausalLM
from tests.builders import tiny_model
from tests.precision import WithoutSinglePrecision

# The models are so small that a second thread costs more than it saves, above all where tests run side by side.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


# Fused projections and learned positions; separate projections and a window; grouped keys and values; post-norms.
# What holds of all models is shown on these; the laws that an entry of the table must obey run on every family.
ARCHETYPES = ("gpt2", "gpt_neo", "llama", "gemma2")


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def shared_model(request: pytest.FixtureRequest) -> CausalLM:
    """A float64 model of each family in turn; shared, so a test that changes it fails the next one."""
    return tiny_model(request.param)


@pytest.fixture
def any_model(shared_model: CausalLM) -> Iterator[CausalLM]:
    """A float64 model of each family in turn, which computes in float64 throughout."""
    with WithoutSinglePrecision():
        yield shared_model


@pytest.fixture(scope="session", params=ARCHETYPES)
def shared_archetype(request: pytest.FixtureRequest) -> CausalLM:
    """A float64 model of each archetype in turn; shared, so a test that changes it fails the next one."""
    return tiny_model(request.param)


@pytest.fixture
def archetype(shared_archetype: CausalLM) -> Iterator[CausalLM]:
    """A float64 model of each archetype in turn, which computes in float64 throughout."""
    with WithoutSinglePrecision():
        yield shared_archetype


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that with several processes none is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_recorded_circuits.py"))
