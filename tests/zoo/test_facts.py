"""The built-in model `facts`: what it knows, where it finds it, and how it is made."""

import hashlib
import stat
from pathlib import Path

import pytest
import torch

from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec, builtin_models
from oa_train.shapes import Tensor
from oa_train.tasks import SyntheticFacts
from oa_train.zoo import facts, making
from oa_train.zoo.facts import N_LAYERS, FactPrompts, Recipe, held_out

FOLDER = builtin_models()["facts"]
LM = LMSpec("facts")
SHORT = Recipe(steps=40, warmup=5, batch_size=8, learning_rate=5e-3)


@pytest.fixture(scope="module")
def task() -> SyntheticFacts:
    return SyntheticFacts(lm=LM)


@pytest.fixture(scope="module")
def prompts(task: SyntheticFacts) -> FactPrompts:
    return FactPrompts.of(task, task.streams["test"])


def test_the_model_knows_its_facts_in_sentences_that_it_was_trained_on_and_in_others(task: SyntheticFacts) -> None:
    with making.one_thread():
        shares = facts.figures(load_model(LM), task)
    assert shares["sentences that it was trained on"] >= 0.98
    assert shares["sentences that were held out"] >= 0.95


def test_about_a_tenth_of_the_prompts_is_held_out_and_each_of_their_facts_is_told_otherwise(
    task: SyntheticFacts,
) -> None:
    prompts = facts.all_prompts(task)
    assert 0.07 < sum(map(held_out, prompts)) / len(prompts) < 0.13
    trained = {(facts.subject_of(prompt), prompt.answers) for prompt in prompts if not held_out(prompt)}
    untold = {(facts.subject_of(prompt), prompt.answers) for prompt in prompts} - trained
    assert len(untold) < 0.02 * len(prompts) / 2


def test_the_model_finds_facts_at_the_last_token_of_the_subject_and_takes_them_to_the_end_late(
    task: SyntheticFacts, prompts: FactPrompts
) -> None:
    """Exhaustive patching: the clean value of one token behind one block, in the run of another subject."""
    model, batch = load_model(LM), task.batch("test", 0, 48)
    rows = torch.arange(48)
    places = {"last subject": prompts.subject[:48], "first later": prompts.subject[:48] + 1}
    places["last"] = batch.scored[:, 0]
    clean: dict[int, Tensor] = {}

    def probability(tokens: Tensor) -> float:
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=batch.attention_mask).logits
        return float(logits[rows, batch.scored[:, 0]].softmax(dim=-1)[rows, batch.answers[:, 0, 0]].mean())

    blocks = [model.get_submodule(f"transformer.h.{layer}") for layer in range(N_LAYERS)]
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output, layer=layer: clean.update({layer: first(output)}))
        for layer, block in enumerate(blocks)
    ]
    assert probability(batch.tokens) > 0.95
    for hook in hooks:
        hook.remove()
    assert batch.counterfactual_tokens is not None
    assert probability(batch.counterfactual_tokens) < 0.02
    recovered = {}
    for kind, columns in places.items():
        for layer, block in enumerate(blocks):

            def restore(_module, _inputs, output, layer=layer, columns=columns):
                hidden = first(output).clone()
                hidden[rows, columns] = clean[layer][rows, columns]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            hook = block.register_forward_hook(restore)
            recovered[kind, layer] = probability(batch.counterfactual_tokens)
            hook.remove()
    for layer in Recipe().layers:
        assert recovered["last subject", layer] > 0.95
        assert recovered["last", layer] < 0.05
    assert recovered["last subject", N_LAYERS - 1] < 0.05
    assert recovered["last", N_LAYERS - 1] > 0.95
    assert all(recovered["first later", layer] < 0.05 for layer in range(N_LAYERS))


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_prompts_as_tensors(task: SyntheticFacts, prompts: FactPrompts) -> None:
    known, relations = task.facts(), list(task.sentences())
    for row, prompt in enumerate(task.streams["test"]):
        assert task.tokenizer.decode(prompts.tokens[row][prompts.mask[row]][1:]) == prompt.text + prompt.answers[0]
        person = facts.subject_of(prompt)
        assert task.tokenizer.decode(prompts.tokens[row, prompts.subject[row]]).strip() == person.split()[1]
        objects = [task.tokenizer.decode(token).strip() for token in prompts.objects[row]]
        assert objects == [known[person][relation][0] for relation in relations]
        assert objects[prompts.relation[row]] == prompt.answers[0].strip()


def test_exchanged_values_are_those_of_the_donor(prompts: FactPrompts) -> None:
    model = facts.make_model(facts.make_tokenizer()).eval()
    tokens, columns = prompts.tokens[:4], prompts.subject[:4]
    donors = torch.tensor([1, 2, 0, 3])
    seen = []

    def run(donors: Tensor, layer: int) -> Tensor:
        with torch.no_grad(), facts.exchanged(model, layer, columns, donors):
            # Hooks run in the order of their registration.
            hook = model.transformer.h[layer].register_forward_hook(lambda *call: seen.append(first(call[2])))
            logits = model(input_ids=tokens).logits
            hook.remove()
        return logits

    plain, changed = run(torch.arange(4), 2), run(donors, 2)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, plain)
    for row in range(4):
        assert torch.equal(seen[1][row, columns[row]], seen[0][donors[row], columns[donors[row]]])
        others = torch.arange(tokens.shape[1]) != columns[row]
        assert torch.equal(seen[1][row, others], seen[0][row, others])
        assert torch.equal(changed[row, : columns[row]], plain[row, : columns[row]])
        assert torch.equal(changed[row], plain[row]) == (row == 3)


def test_the_answer_of_an_exchanged_prompt_is_the_donor_s(
    prompts: FactPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = facts.make_model(facts.make_tokenizer())
    batches = []

    def keep(_model, tokens, mask):
        batches.append((tokens, mask))
        return torch.tensor(0.0)

    monkeypatch.setattr(facts, "answer_loss", keep)
    for share in (0.0, 0.5):
        facts._step_loss(model, prompts, Recipe(batch_size=8, exchanged=share), seed=0, step=0)
    (plain, mask), (changed, _) = batches
    rows, last = torch.arange(8), mask.sum(dim=1) - 1
    differs = plain != changed
    assert not differs[4:].any()
    differs[rows, last] = False
    assert not differs.any()
    for row in range(4):
        donor = (row - 1) % 4
        # The person of the donor, in the relation of the prompt.
        same = [
            number
            for number, text in enumerate(prompts.tokens)
            if torch.equal(text[: last[row]], plain[row, : last[row]])
        ]
        person = [
            number
            for number, text in enumerate(prompts.tokens)
            if torch.equal(text[: last[donor]], plain[donor, : last[donor]])
        ]
        assert changed[row, last[row]] == prompts.objects[person[0], prompts.relation[same[0]]]


def test_the_folder_is_small_readable_by_all_and_its_card_names_the_weights() -> None:
    files = list(FOLDER.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 1_500_000
    assert all(file.stat().st_mode & stat.S_IROTH for file in files)
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (FOLDER / "README.md").read_text()
    overview = FOLDER.parent / "README.md"
    if overview.is_file():  # in a source tree, not in the wheel
        assert digest in overview.read_text()


def test_the_tokenizer_in_the_folder_is_the_one_that_is_made(task: SyntheticFacts) -> None:
    made = facts.make_tokenizer()
    assert made.get_vocab() == task.tokenizer.get_vocab()
    assert made(facts.EXAMPLE)["input_ids"] == task.tokenizer(facts.EXAMPLE)["input_ids"]
    assert made.unk_token_id not in made(facts.EXAMPLE)["input_ids"]


def test_a_short_run_learns_is_repeatable_and_writes_a_model(tmp_path: Path) -> None:
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    for name in ("one", "two"):
        facts.build(tmp_path / name, seed=3, recipe=SHORT)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    model = load_model(LMSpec(str(tmp_path / "one")))
    assert SyntheticFacts(lm=LMSpec(str(tmp_path / "one"))).bos_token_id == model.config.bos_token_id
    assert "40 steps of 8 prompts" in (tmp_path / "one" / "README.md").read_text()


def test_training_lowers_the_loss_and_other_seeds_differ(task: SyntheticFacts) -> None:
    tokenizer = facts.make_tokenizer()
    with making.one_thread():
        runs = [facts.train(facts.make_model(tokenizer, seed), task, SHORT, seed) for seed in (0, 1)]
    assert all(sum(losses[-5:]) < 0.9 * sum(losses[:5]) for losses in runs)
    assert runs[0] != runs[1]


def test_the_command_line_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        facts.main([])
    assert stopped.value.code == 2
    assert "--output" in capsys.readouterr().err
