"""The manual says what the code does: its tables of options are whole, its links lead somewhere, its code compiles."""

import inspect
import re
import textwrap
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import oa_train
from oa_train.ablations.fitting import RefitSettings
from oa_train.ablations.registry import ABLATION_KINDS
from oa_train.cli.main import COMMANDS
from oa_train.cli.messages import RENAMED
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.metrics.measures import LOSS_SIGNS, MEASURES
from oa_train.models.dictionaries import DictionarySpec
from oa_train.models.dictionary_layouts import DICTIONARY_READERS
from oa_train.models.families import FAMILIES, Family
from oa_train.models.parts import Dimensions
from oa_train.models.sites import SITE_KINDS
from oa_train.models.spec import LMSpec
from oa_train.studies.compare import CompareSettings
from oa_train.studies.compare_lenses import CompareLensesSettings
from oa_train.studies.curve import CurveSettings
from oa_train.studies.faithfulness import FaithfulnessSettings
from oa_train.studies.finish_circuits import FinishSettings
from oa_train.studies.interact import InteractSettings
from oa_train.studies.lens import LensSettings
from oa_train.studies.minimal import MinimalSettings
from oa_train.studies.robustness import RobustnessSettings
from oa_train.studies.scan import ScanSettings
from oa_train.studies.sufficient import SufficientSettings
from oa_train.studies.trace_settings import TraceSettings
from oa_train.tasks.facts import Facts
from oa_train.tasks.grammar import GrammarTask
from oa_train.tasks.greater_than import GreaterThan
from oa_train.tasks.induction import Induction
from oa_train.tasks.ioi import IOI
from oa_train.tasks.records import Records
from oa_train.tasks.task import Task
from oa_train.tasks.text import Text
from oa_train.training.circuit_module import CircuitModule
from oa_train.training.constants_module import ConstantsModule
from oa_train.training.lens_module import LensModule
from oa_train.training.tracing_module import TracingModule

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGURATION = ROOT / "docs" / "configuration.md"
COMPONENTS = ROOT / "docs" / "components.md"

# Heading of docs/configuration.md, the class whose options its table lists, and the columns with its defaults.
TABLES: list[tuple[str, type, tuple[Any, ...]]] = [
    ("lm", LMSpec, (LMSpec(),)),
    ("CircuitModule", CircuitModule, ()),
    ("ConstantsModule", ConstantsModule, ()),
    ("LensModule", LensModule, ()),
    ("TracingModule", TracingModule, ()),
    ("UniformGradientSampling", UniformGradientSampling, ()),
    ("HardConcrete", HardConcrete, ()),
    ("Every task", Task, ()),
    ("Every task that draws its prompts", GrammarTask, ()),
    ("IOI", IOI, ()),
    ("Induction", Induction, ()),
    ("Records", Records, ()),
    ("Text", Text, ()),
    ("Facts", Facts, ()),
    ("finish", FinishSettings, (FinishSettings(),)),
    ("compare", CompareSettings, (CompareSettings(),)),
    ("scan", ScanSettings, (ScanSettings(),)),
    ("curve", CurveSettings, (CurveSettings(),)),
    ("interact", InteractSettings, (InteractSettings(),)),
    ("sufficient", SufficientSettings, (SufficientSettings(),)),
    ("minimal", MinimalSettings, (MinimalSettings(),)),
    ("robustness", RobustnessSettings, (RobustnessSettings(),)),
    ("trace", TraceSettings, (TraceSettings(),)),
    ("compare_lenses", CompareLensesSettings, (CompareLensesSettings(),)),
    ("lens", LensSettings, (LensSettings(),)),
    ("faithfulness", FaithfulnessSettings, (FaithfulnessSettings(),)),
    ("Training constants for fixed circuits", RefitSettings, (FinishSettings().refit, CompareSettings().fit)),
]

# Given once at the top of a configuration, or filled in by the module.
FILLED_IN = {"lm", "seed", "n_entries", "options"}

on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def options(kind: type) -> dict[str, Any]:
    """Names and defaults of what can be configured."""
    if is_dataclass(kind):
        return {field.name: field.default for field in fields(kind)}
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.name not in FILLED_IN}


def table(heading: str) -> dict[str, list[str]]:
    """The other cells of each row under a heading, by the name in the first."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^##)", CONFIGURATION.read_text(), re.MULTILINE | re.DOTALL)
    assert section, f"docs/configuration.md has no heading {heading!r}"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section[1], re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    return {name: cells.split(" | ") for name, cells in rows}


def shown(value: Any) -> str:
    """How the manual writes a default."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return value.__name__ if inspect.isclass(value) else str(value).lower() if isinstance(value, bool) else str(value)


def is_written(cell: str, default: Any) -> bool:
    text = cell.strip("`")
    return float(text) == float(shown(default)) if isinstance(default, float) else text == shown(default)


@pytest.mark.parametrize(("heading", "kind", "given"), TABLES, ids=[heading for heading, _, _ in TABLES])
def test_the_table_of_a_class_has_its_options_and_no_others(heading: str, kind: type, given: tuple[Any, ...]) -> None:
    rows = table(heading)
    assert rows.keys() == options(kind).keys()
    for name, default in options(kind).items():
        values = [getattr(one, name) for one in given] or [default]
        for cell, value in zip(rows[name], values, strict=False):
            assert is_dataclass(value) or value is MISSING or is_written(cell, value), f"{heading}: {name} is {value}"


def test_options_that_share_a_column_have_the_same_defaults() -> None:
    assert CompareSettings().circuit_fit == FinishSettings().refit
    assert CompareSettings().fit == MinimalSettings().fit


def test_no_configurable_class_is_left_out() -> None:
    listed = {kind for _, kind, _ in TABLES}
    assert {CircuitModule, ConstantsModule, LensModule, TracingModule, UniformGradientSampling, HardConcrete} <= listed
    tasks = {kind for kind in GrammarTask.__subclasses__() if kind.__module__.startswith("oa_train.")}
    assert {kind for kind in tasks if options(kind)} <= listed
    assert not options(GreaterThan)


@pytest.mark.parametrize("page", ["configuration.md", "components.md"])
def test_every_kind_of_ablation_is_named(page: str) -> None:
    assert all(f"`{kind}`" in (ROOT / "docs" / page).read_text() for kind in ABLATION_KINDS)


def test_every_kind_of_ablation_has_a_section_and_says_whether_it_is_total() -> None:
    text = (ROOT / "docs" / "components.md").read_text()
    assert re.findall(r"^### `(\w+)`$", text, re.MULTILINE) == list(ABLATION_KINDS)
    for kind in ABLATION_KINDS.values():
        row = re.search(rf"^\| `{kind.name}` \|(.*\|){{5}}$", text, re.MULTILINE)
        assert row, kind.name
        assert row[0].split("|")[4].strip().startswith("yes" if kind.total else "**no**")


def test_every_loss_and_measure_is_named() -> None:
    for page in ("configuration.md", "tasks.md"):
        text = (ROOT / "docs" / page).read_text()
        assert all(f"`{name}`" in text for name in (*LOSS_SIGNS, *MEASURES))


def test_the_table_of_families_is_the_code_s() -> None:
    rows = re.findall(
        r"^\| (`\w+`.*?)" + r" \| `([\w.]+)`" * 3 + r" \| (`[\w.]+`|no neurons) \|$",
        COMPONENTS.read_text(),
        re.MULTILINE,
    )
    listed = {
        name: (*places, cell) for cell, *places in rows for name in re.findall(r"`(\w+)`", cell) if name in FAMILIES
    }
    assert listed.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        *places, cell = listed[name]
        neurons = f"`{family.down_projection}`" if family.down_projection else "no neurons"
        assert places == [family.blocks, family.attention_output, family.mlp, neurons], name
        assert ("post-norms" in cell) == family.post_norms
        choices = {attribute for attribute, changes in family.variants.items() if "parallel" in changes}
        assert bool(re.search(r"\bparallel\b", cell)) == (family.parallel or bool(choices)), name
        assert all(f"`{name.removeprefix('not ')}`" in cell for name in (*choices, *family.refuses)), name


def test_every_field_of_a_family_is_explained() -> None:
    section = (ROOT / "docs" / "extending.md").read_text().partition("## A model family")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert rows == [field.name for field in fields(Family)]


def test_the_table_of_sites_is_the_code_s_in_its_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ([^|]+) \| (\w+) \|", COMPONENTS.read_text(), re.MULTILINE)
    assert [kind for kind, *_ in rows] == list(SITE_KINDS)
    sizes = Dimensions(n_layers=8, n_heads=6, d_head=4, d_model=20, d_mlp=50)
    numbers = {"1": 1, "d_model": 20, "d_head": 4, "d_mlp": 50, "query heads": 6}
    for kind, unit, n_units, width in rows:
        site = SITE_KINDS[kind]
        assert unit in site.unit_names(3, 1025), kind
        if kind != "features":
            assert site.shape(sizes) == (numbers[n_units], numbers[width]), kind


def test_kinds_of_site_that_the_pages_name_exist() -> None:
    named = re.search(r"^\| `sites` \|.*$", CONFIGURATION.read_text(), re.MULTILINE)
    assert named
    assert all(f"`{kind}`" in named[0] for kind in SITE_KINDS)


def test_options_of_a_dictionary_and_layouts_are_named() -> None:
    text = COMPONENTS.read_text()
    assert all(re.search(rf"^\| `{option}` \|", text, re.MULTILINE) for option in options(DictionarySpec))
    assert all(f"`{name}`" in text for name in DICTIONARY_READERS)


def test_renamed_options_are_listed() -> None:
    section = CONFIGURATION.read_text().partition("### Renamed options")[2].partition("\n## ")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", section, re.MULTILINE)) == RENAMED


def test_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    drawn = (
        (ROOT / "CONTRIBUTING.md").read_text().partition("## Layers")[2].partition("\n\n    ")[2].partition("\n\n")[0]
    )
    assert [line.strip() for line in drawn.splitlines()] == layers
    rows = re.findall(r"^\| \d+ \| (`.*`) \|$", (ROOT / "docs" / "extending.md").read_text(), re.MULTILINE)
    assert [row.replace("`", "").replace(", ", " | ") for row in rows] == layers


def test_folders_of_the_package_are_those_of_the_read_me() -> None:
    tree = (ROOT / "README.md").read_text().partition("    oa_train/\n")[2].partition("    checkpoints/")[0]
    folders = {path.parent.name for path in (ROOT / "oa_train").glob("*/__init__.py")}
    assert set(re.findall(r"^      (\w+)/ ", tree, re.MULTILINE)) == folders


def test_the_glossary_is_sorted_and_short() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\*.*? \| (.*) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for term, _ in rows]
    assert terms == sorted(terms, key=str.casefold)
    assert len(set(terms)) == len(terms)
    assert [term for term, meaning in rows if len(re.findall(r"[.](?= |$)", meaning)) > 2] == []


@on_every_page
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_every_page
def test_every_python_block_compiles(page: Path) -> None:
    for block in re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        code = textwrap.dedent(block)
        # An entry of a dictionary is shown without the dictionary.
        compile(f"{{{code}}}" if code.startswith('"') and code.rstrip().endswith("},") else code, page.name, "exec")


@on_every_page
def test_every_command_exists(page: Path) -> None:
    for command in re.findall(r"oa-train +([a-z][\w-]*)", page.read_text()):
        assert command in COMMANDS, f"{page.name} has oa-train {command}"


@on_every_page
def test_every_name_that_is_imported_from_the_package_exists(page: Path) -> None:
    for names in re.findall(r"^ *from oa_train import (\([^)]*\)|.*)$", page.read_text(), re.MULTILINE):
        for name in re.findall(r"\w+", names):
            assert name in oa_train.__all__, f"{page.name} imports {name}"


def test_every_command_is_listed() -> None:
    assert [name for name in COMMANDS if f"`oa-train {name} " not in CONFIGURATION.read_text()] == []
