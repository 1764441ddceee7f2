"""Two fixtures make tiny random models: of the four archetypes, and of every supported family."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from oa_train.models.families import FAMILIES
from oa_train.models.frozen import CausalLM
from tests.builders import tiny_model
from tests.precision import WithoutSinglePrecision

# The models are so small that a second thread costs more than it saves, above all where tests run side by side.
torch.set_num_threads(1)
# Of the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), *os.environ.get("PYTHONPATH", "").split()]
)


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


@pytest.fixture(
    scope="session",
    params=[name if name in ARCHETYPES else pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES)],
)
def shared_common_model(request: pytest.FixtureRequest) -> CausalLM:
    """A float64 model of each archetype in turn, of the other families in the long tests."""
    return tiny_model(request.param)


@pytest.fixture
def common_model(shared_common_model: CausalLM) -> Iterator[CausalLM]:
    """A float64 model of each archetype in turn, of the other families in the long tests."""
    with WithoutSinglePrecision():
        yield shared_common_model


@pytest.fixture(scope="session", params=ARCHETYPES)
def shared_archetype(request: pytest.FixtureRequest) -> CausalLM:
    """A float64 model of each archetype in turn; shared, so a test that changes it fails the next one."""
    return tiny_model(request.param)


@pytest.fixture
def archetype(shared_archetype: CausalLM) -> Iterator[CausalLM]:
    """A float64 model of each archetype in turn, which computes in float64 throughout."""
    with WithoutSinglePrecision():
        yield shared_archetype


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Lets values past the type checker of the tests, as they are let past in use."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Files that take longest, the longest first. With one process for each core a file that comes late ends alone.
SLOWEST = (
    "test_recorded_circuits.py",
    "test_demo.py",
    "test_interruption.py",
    "test_faults.py",
    "test_compare.py",
    "test_distributed.py",
    "test_selfcheck.py",
    "test_context.py",
    "test_slurm.py",
    "test_bad_input.py",
    "test_circuit_module.py",
    "test_constants_module.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first."""
    order = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
