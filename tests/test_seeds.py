"""Derived seeds: one for each key, and no effect on anything global."""

import subprocess
import sys
from itertools import product

import torch

from oa_train.seeds import derive_seed, python_generator, torch_generator

GLOBAL_STATES = """
import random
import numpy
import torch
from oa_train.seeds import derive_seed, python_generator, torch_generator

def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

before = states()
derive_seed(1, "masks")
python_generator(1, "masks").random()
torch.rand(5, generator=torch_generator(1, "masks"))
assert states() == before
random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
after = python_generator(1, "masks").random(), torch.rand(5, generator=torch_generator(1, "masks")).tolist()
random.seed(6), numpy.random.seed(6), torch.manual_seed(6)
assert after == (python_generator(1, "masks").random(), torch.rand(5, generator=torch_generator(1, "masks")).tolist())
"""


def test_every_part_of_a_key_matters():
    keys = list(product(range(6), ["train", "test"], range(4), range(50)))
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_parts_do_not_run_together_and_are_ordered():
    keys = [("a", "bc"), ("ab", "c"), ("abc",), ("a", "b", "c"), ("bc", "a"), (1, 23), (12, 3), (123,), ()]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_seeds_fill_63_bits():
    seeds = [derive_seed("range", index) for index in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    ones = [sum(seed >> bit & 1 for seed in seeds) for bit in range(63)]
    # Four standard deviations of a binomial and a little, since there are 63 of them.
    assert all(abs(count - 1000) < 100 for count in ones)


def test_the_same_key_draws_the_same():
    key = (3, "masks", 0, 17)
    assert torch.equal(torch.rand(9, generator=torch_generator(*key)), torch.rand(9, generator=torch_generator(*key)))
    assert python_generator(*key).random() == python_generator(*key).random()
    other = (3, "masks", 0, 18)
    assert (torch.rand(9, generator=torch_generator(*key)) != torch.rand(9, generator=torch_generator(*other))).all()
    assert python_generator(*key).random() != python_generator(*other).random()


def test_seeds_do_not_depend_on_the_process():
    # A hash that python salts would differ here.
    code = "from oa_train.seeds import derive_seed; print(derive_seed(0, 'masks', 7))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == derive_seed(0, "masks", 7)


def test_global_generators_are_neither_read_nor_moved():
    # In a process of its own, because beartype itself draws from python's generator.
    subprocess.run([sys.executable, "-c", GLOBAL_STATES], check=True)
