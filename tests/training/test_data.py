"""The loader: stateless batches, epochs that go on, resumes in the middle, ranks that share nothing."""

from types import SimpleNamespace

import pytest
import torch

from oa_train.errors import ConfigurationError
from oa_train.training.data import PromptLoader, TaskData
from tests.builders import small_ioi


def ids(batches) -> list[list[int]]:
    return [batch.example_ids.tolist() for batch in batches]


def test_epochs_go_on_where_the_one_before_ended():
    loader = PromptLoader(small_ioi(batch_size=2, batches_per_epoch=3))
    assert ids(loader) == [[0, 1], [2, 3], [4, 5]]
    assert ids(loader) == [[6, 7], [8, 9], [10, 11]]


def test_a_resume_in_the_middle_of_an_epoch_gives_the_rest_of_it():
    task = small_ioi(batch_size=2, batches_per_epoch=4)
    first = PromptLoader(task)
    list(first)
    iterator = iter(first)
    next(iterator)
    resumed = PromptLoader(task)
    resumed.load_state_dict(first.state_dict())
    rest = list(iterator)
    assert ids(rest) == ids(resumed)
    assert ids(first) == ids(resumed)
    again = PromptLoader(task)
    again.load_state_dict(first.state_dict())
    assert len(ids(again)) == 4


def test_a_shorter_epoch_skips_nothing():
    loader = PromptLoader(small_ioi(batch_size=1, batches_per_epoch=5))
    seen = []
    for _ in range(4):
        for number, batch in enumerate(loader, 1):
            seen += batch.example_ids.tolist()
            if number == 2:
                break
    assert seen == list(range(8))


def test_ranks_share_no_prompt_and_leave_none_out():
    task = small_ioi(batch_size=2, batches_per_epoch=3)
    seen = [number for rank in range(3) for row in ids(PromptLoader(task, rank, 3)) for number in row]
    assert sorted(seen) == list(range(18))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 3)])
def test_another_number_of_processes_sees_no_prompt_twice(before, after):
    task = small_ioi(batch_size=1, batches_per_epoch=5)
    loaders = [PromptLoader(task, rank, before) for rank in range(before)]
    seen = [number for loader in loaders for row in ids(loader) for number in row]
    more = [PromptLoader(task, rank, after) for rank in range(after)]
    for loader in more:
        loader.load_state_dict(loaders[0].state_dict())
    further = sorted(number for loader in more for row in ids(loader) for number in row)
    assert not set(seen) & set(further)
    # None but the few that do not share out evenly is left out.
    assert further[0] - max(seen) <= after


def test_the_same_number_gives_the_same_prompts():
    loaders = [PromptLoader(small_ioi()) for _ in range(2)]
    for first, second in zip(*loaders, strict=True):
        assert torch.equal(first.tokens, second.tokens)


def test_validation_and_test_have_the_promised_prompts():
    data = TaskData(small_ioi(n_validation=130, n_test=5))
    assert [len(batch) for batch in data.val_dataloader()] == [65, 65]
    assert [len(batch) for batch in data.test_dataloader()] == [5]
    assert len(data.val_dataloader()) == 2


def test_every_process_gets_evaluation_prompts():
    def share(rank: int, world_size: int, n_prompts: int, size: int = 128) -> list[list[int]]:
        data = TaskData(small_ioi(n_validation=n_prompts, evaluation_batch_size=size))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        return ids(data.val_dataloader())

    for world_size, n_prompts, size in ((2, 16, 128), (3, 64, 32), (5, 40, 8), (2, 7, 3), (2, 3, 1), (4, 4, 1)):
        shares = [share(rank, world_size, n_prompts, size) for rank in range(world_size)]
        # A model that is shared out is run by all processes together, so none may have a batch more.
        assert len({len(batches) for batches in shares}) == 1
        assert all(1 <= len(batch) <= size + 1 for batches in shares for batch in batches)
        assert sorted(number for batches in shares for batch in batches for number in batch) == list(range(n_prompts))
    with pytest.raises(ConfigurationError, match="2 validation prompts cannot be split among 3 processes"):
        share(0, 3, 2)
