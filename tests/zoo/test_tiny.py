import hashlib
import re
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec, builtin_models
from oa_train.seeds import python_generator
from oa_train.tasks import IOI
from oa_train.tasks.vocabulary import read_words
from oa_train.zoo import making, tiny, tiny_training, training
from oa_train.zoo.tiny import EXAMPLE
from oa_train.zoo.tiny_prompts import HELD_OUT_TEMPLATES, SceneIOI, pair_held_out
from oa_train.zoo.tiny_training import Recipe

TINY = builtin_models()["tiny"]
SHORT = Recipe(steps=40, warmup=5, ioi=8, greater_than=1, induction=1, learning_rate=5e-3)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    with making.one_thread():
        return tiny.held_out_figures(load_model(LMSpec("tiny")), LMSpec("tiny"), 600)


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("indirect object, pairs of names that were held out", 0.995),
        ("indirect object, templates that were held out", 0.995),
        ("indirect object, both held out", 0.99),
        ("greater-than", 0.99),
        ("induction", 0.9),
    ],
)
def test_tiny_solves_what_it_was_not_trained_on(figures: dict[str, float], kind: str, least: float) -> None:
    assert figures[kind] >= least


def test_tiny_binds_names_and_does_not_count_them() -> None:
    (first, probability), *_ = making.next_words(load_model(LMSpec("tiny")), IOI(), EXAMPLE)
    assert first == " Anna"
    assert probability > 0.9


def test_tiny_has_no_answer_where_there_is_none() -> None:
    model, batch = load_model(LMSpec("tiny")), IOI().batch("test", 0, 200)
    rows = torch.arange(200)
    with torch.no_grad():
        clean, other = (
            model(input_ids=tokens, attention_mask=batch.attention_mask).logits[rows, batch.scored[:, 0]].softmax(-1)
            for tokens in (batch.tokens, batch.counterfactual_tokens)
        )
    assert clean[rows, batch.answers[:, 0, 0]].mean() > 0.95
    assert other[rows, batch.answers[:, 0, 0]].mean() < 0.02


def test_tiny_is_small_and_readable_by_all() -> None:
    files = list(TINY.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 1_500_000
    assert all(file.stat().st_mode & stat.S_IROTH for file in files)


def test_model_cards_name_these_weights() -> None:
    digest = hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (TINY / "README.md").read_text()
    overview = TINY.parent / "README.md"
    if overview.is_file():  # in a source tree, not in the wheel
        assert digest in overview.read_text()


def test_the_tokenizer_in_the_folder_is_the_one_that_is_made() -> None:
    made, kept = tiny.make_tokenizer(), IOI().tokenizer
    assert made.get_vocab() == kept.get_vocab()
    words = ["1732", EXAMPLE, "Words: river stone"]
    assert made(words)["input_ids"] == kept(words)["input_ids"]
    assert made.decode(made(EXAMPLE)["input_ids"]) == EXAMPLE


@pytest.mark.parametrize("name", ["names", "places", "objects", "nouns", "induction"])
def test_the_tokenizer_knows_every_word(name: str) -> None:
    assert all(IOI().encoder.is_single_token(word) for word in read_words(name))


def test_held_out_scenes_never_enter_training() -> None:
    tasks = tiny_training._training_tasks(LMSpec("tiny"), Recipe(), seed=0)
    task = tasks[0][0]
    assert isinstance(task, SceneIOI)
    seen = []
    task.accept, accept = lambda scene: accept(scene) and not seen.append(scene), task.accept
    for index in range(500):
        task.prompt("train", index)
    assert len(seen) >= 500
    assert not any(scene.template in HELD_OUT_TEMPLATES for scene in seen)
    assert not any(pair_held_out(scene) for scene in seen)
    assert len({scene.template for scene in seen}) == len(task.templates) - len(HELD_OUT_TEMPLATES)


def test_about_a_tenth_of_the_pairs_is_held_out_in_both_roles() -> None:
    task = SceneIOI(LMSpec("tiny"), lambda _: True)
    scenes = [task.draw_scene(python_generator("scene", index)) for index in range(2000)]
    share = sum(map(pair_held_out, scenes)) / len(scenes)
    assert 0.07 < share < 0.13


def test_words_of_held_out_templates_stand_in_others() -> None:
    kept = set(re.findall(r"\w+", " ".join(text for text in IOI().templates if text not in HELD_OUT_TEMPLATES)))
    assert set(re.findall(r"\w+", " ".join(HELD_OUT_TEMPLATES))) <= kept


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, warmup=10, final=0.05)
    rates = [training.rate(step, recipe) for step in range(100)]
    assert rates[9] == rates[10] == max(rates) == 1
    assert all(later > earlier for earlier, later in pairwise(rates[:10]))
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


def test_the_loss_is_half_of_all_tokens_and_half_of_the_answers() -> None:
    model = tiny.make_model(tiny.make_tokenizer())
    rows = [[0, 7, 8, 9], [0, 5, 6]]
    tokens = torch.tensor([rows[0], [*rows[1], 1]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    each = []
    with torch.no_grad():
        for row in rows:
            log_probabilities = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
            each.append([-log_probabilities[place, token].item() for place, token in enumerate(row[1:])])
        loss = training.answer_loss(model, tokens, mask).item()
    expected = 0.5 * sum(map(sum, each)) / 5 + 0.5 * (each[0][-1] + each[1][-1]) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_short_run_learns_is_repeatable_and_writes_a_model(tmp_path: Path) -> None:
    torch_before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    tiny.build(tmp_path / "one", seed=3, recipe=SHORT, n_prompts=50)
    tiny.build(tmp_path / "two", seed=3, recipe=SHORT, n_prompts=50)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert torch.get_num_threads() == threads
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    model = load_model(LMSpec(str(tmp_path / "one")))
    assert IOI(lm=LMSpec(str(tmp_path / "one"))).bos_token_id == model.config.bos_token_id
    assert "40 steps of 10 prompts" in (tmp_path / "one" / "README.md").read_text()


def test_training_lowers_the_loss_and_other_seeds_differ() -> None:
    tokenizer = tiny.make_tokenizer()
    with making.one_thread():
        runs = [tiny_training.train(tiny.make_model(tokenizer, seed), LMSpec("tiny"), SHORT, seed) for seed in (0, 1)]
    assert all(sum(losses[-5:]) < 0.9 * sum(losses[:5]) for losses in runs)
    assert runs[0] != runs[1]


def test_the_command_line_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tiny.main([])
    assert stopped.value.code == 2
    assert "--output" in capsys.readouterr().err
