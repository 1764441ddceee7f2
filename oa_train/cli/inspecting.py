"""`oa-train inspect`: a model's parts, the memory of a training step, and the self-check of its family's entry."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from oa_train.checks import check_at_least
from oa_train.cli.bars import track
from oa_train.cli.output import print_table
from oa_train.cli.parser import ExplainingParser, add_config
from oa_train.cli.quiet import silence_libraries
from oa_train.diagnostics.memory import StepSettings, Strategy
from oa_train.diagnostics.model_facts import DEFAULT_TOKENS, model_facts
from oa_train.diagnostics.model_facts_table import facts_rows
from oa_train.diagnostics.selfcheck import Check, self_check
from oa_train.errors import ConfigurationError, RunError
from oa_train.models.loading import load_config, load_model, with_dtype
from oa_train.models.spec import LMSpec
from oa_train.training.trainer_options import check_true_precision

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]

# Models with at most this many parameters are checked in float64, whatever their own type; larger ones would take
# minutes.
FLOAT64_BYTES = 2**28
# Attention back ends that compute in float64.
FLOAT64_ATTENTION = (None, "sdpa", "eager")

# Further options, with their types, defaults and meanings.
OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "batch_size": (int, 16, "number of prompts in a training batch of one process"),
    "n_tokens": (int | None, None, f"tokens per prompt; by default {DEFAULT_TOKENS}, or the model's maximum if less"),
    "samples_per_prompt": (int, 4, "number of masks drawn for each prompt"),
    "precision": (Precision, "32-true", "precision of the trainer"),
    "strategy": (Strategy, "auto", "strategy of the trainer"),
    "devices": (int, 1, "number of processes of the trainer, on all nodes together"),
    "recompute": (bool, False, "activation checkpointing of blocks"),
}


def inspect_command(words: Sequence[str]) -> dict[str, Any]:
    """Show facts about a model, and check it if asked to; returns the content that `--json` prints.

    Raises:
        RunError: a check has failed.
    """
    silence_libraries()
    parser = _parser()
    options = parser.parse_args(list(words))
    lm = with_dtype(parser.instantiate_classes(options).lm)
    settings = _step(lm, options)
    facts = model_facts(lm, settings)
    facts["step"]["precision"] = options.precision
    if not options.json:
        model = facts["model"]
        print_table(f"{model['name']}: {model['family']}, {model['dtype']}", facts_rows(facts))
    checks: tuple[Check, ...] = ()
    if options.check:
        lm = _sharpest(lm, facts["frozen"]["parameters"])
        checks = self_check(load_model(lm), lm=lm, full=options.check == "full", track=track)
        facts |= {"checked_in": lm.dtype, "checks": [_check_facts(check) for check in checks]}
    if options.json:
        print(json.dumps(facts, indent=2))
    elif options.check:
        print_table(f"self-check in {lm.dtype}", [_check_row(check) for check in checks])
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(checks)} checks of {lm.name!r} failed: {'; '.join(failed)}.\n"
            f"The entry of {facts['model']['family']!r} in oa_train/models/families.py does not fit this model; "
            "docs/extending.md explains each check."
        )
    return facts


def _step(lm: LMSpec, options: Any) -> StepSettings:
    check_at_least(1, **{name: options[name] for name in ("batch_size", "samples_per_prompt", "devices", "n_tokens")})
    check_true_precision("precision", options.precision, lm.dtype)
    if options.devices > 1 and options.strategy == "auto":
        raise ConfigurationError(f"devices is {options.devices}, which needs a strategy: ddp or fsdp.")
    longest = getattr(load_config(lm), "max_position_embeddings", None) or DEFAULT_TOKENS
    n_tokens = min(DEFAULT_TOKENS, longest) if options.n_tokens is None else options.n_tokens
    return StepSettings(
        options.batch_size,
        n_tokens,
        options.samples_per_prompt,
        autocast=options.precision.endswith("-mixed"),
        recompute=options.recompute,
        strategy=options.strategy,
        n_processes=options.devices,
    )


def _sharpest(lm: LMSpec, n_parameters: int) -> LMSpec:
    """The same model in float64 if that is feasible, else unchanged."""
    feasible = 8 * n_parameters <= FLOAT64_BYTES and lm.attn_implementation in FLOAT64_ATTENTION
    return replace(lm, dtype="float64") if feasible else lm


def _check_facts(check: Check) -> dict[str, Any]:
    # JSON has no NaN.
    figure = None if math.isnan(check.figure) else check.figure
    return {**asdict(check), "figure": figure, "passed": check.passed}


def _parser() -> ExplainingParser:
    parser = ExplainingParser(
        prog="oa-train inspect",
        description="Show parts, edges, trained parameters and memory of a model, from its configuration alone.",
    )
    add_config(parser)
    parser.add_class_arguments(LMSpec, "lm")
    for name, (kind, default, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    parser.add_argument(
        "--check",
        type=Literal["quick", "full"] | None,
        nargs="?",
        const="quick",
        default=None,
        help="load the weights and check that the interventions fit; `full`: the readers of every layer",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _check_row(check: Check) -> dict[str, Any]:
    return {
        "result": "passed" if check.passed else "failed",
        "figure": check.problem or f"{check.figure:.2g}",
        "at most": f"{check.tolerance:g}",
        "check": check.name,
    }
