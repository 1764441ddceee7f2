"""Folders of known models: what is in them, and that everyone can use them."""

import json
import stat
from pathlib import Path

import pytest
import torch

from oa_train.models.graph import Graph
from oa_train.models.loading import load_model
from oa_train.models.spec import LMSpec
from oa_train.zoo.known.__main__ import main
from oa_train.zoo.known.registry import EDGES_FILE, KNOWN_MODELS, KNOWN_TASKS, write_known


def test_every_model_has_a_task() -> None:
    assert KNOWN_TASKS.keys() == KNOWN_MODELS.keys()
    assert all(build(0).task is KNOWN_TASKS[name] for name, build in KNOWN_MODELS.items())
    assert all(task.name == name for name, task in KNOWN_TASKS.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("known")
    main(["--output", str(path), "--seed", "3"])
    return path


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_folder_holds_the_model_its_edges_and_a_card(folder: Path, name: str) -> None:
    built = KNOWN_MODELS[name](3)
    read = load_model(LMSpec(str(folder / name)))
    assert all(map(torch.equal, read.parameters(), built.model.parameters()))
    edges = json.loads((folder / name / EDGES_FILE).read_text())
    assert tuple(edges) == built.edges
    assert Graph.of(read.config).mask(edges).sum() == len(edges)
    card = (folder / name / "README.md").read_text()
    assert all(f"`{edge}`" in card for edge in edges)
    assert all(part in card for part in built.roles)
    assert "--seed 3" in card
    assert sum(file.stat().st_size for file in (folder / name).iterdir()) < 1_500_000
    assert all(file.stat().st_mode & stat.S_IROTH for file in (folder / name).iterdir())


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_tokenizer_knows_the_words_and_gives_them_back(folder: Path, name: str) -> None:
    task = KNOWN_TASKS[name](lm=LMSpec(str(folder / name)))
    words = task.words
    assert task.encoder.encode([" ".join(words)]) == [[0, *range(3, 3 + len(words))]]
    assert task.tokenizer.decode(range(3, 3 + len(words))) == " ".join(words)
    assert len(task.tokenizer) == load_model(task.lm).config.vocab_size


def test_writing_twice_gives_the_same(tmp_path: Path) -> None:
    for place in ("one", "two"):
        write_known("digit_sum", tmp_path / place, 5)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_the_command_line_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "--output" in capsys.readouterr().err
