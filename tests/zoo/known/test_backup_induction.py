import pytest
import torch

from oa_train.zoo.known.backup_induction import BACKUP, PRIMARY
from tests.known import known_case


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["zero", "mean", "counterfactual", "counterfactual_mean"])
def test_either_head_can_go_and_both_cannot(seed: int, kind: str) -> None:
    case = known_case("backup_induction", seed)
    masks = torch.stack([case.without_source(*heads) for heads in ((PRIMARY,), (BACKUP,), (PRIMARY, BACKUP))])
    primary, backup, both = case.kl(masks, kind).tolist()
    assert abs(primary) < 1e-4
    assert abs(backup) < 1e-4
    assert both > 2


def test_another_prompt_s_value_keeps_the_backup_silent() -> None:
    case = known_case("backup_induction")
    masks = torch.stack([case.without_source(head) for head in (PRIMARY, BACKUP)])
    primary, backup = case.kl(masks, "resample").tolist()
    assert primary > 2
    assert abs(backup) < 1e-4


def test_the_prompts_are_those_of_case_induction() -> None:
    task, other = known_case("backup_induction").task, known_case("case_induction").task
    prompt = task.prompt("test", 3)
    assert prompt.text.split()[-1].lower() in prompt.text.lower().split()[:-1]
    assert set(prompt.spans) == set(other.prompt("test", 3).spans)
