"""Agreement of trained circuits of edges with known ones.

    python -m benchmarks.known_circuits             every known model, five seeds, optimal ablation
    python -m benchmarks.known_circuits --quick     one model, one seed, a short training
    python -m benchmarks.known_circuits --ablation optimal --ablation mean --masks HardConcrete

A seed draws the parts of a model that are irrelevant to its task, the prompts, and the mask samples. The true circuit
is computed for each model, seed and kind of ablation (`oa_train.zoo.truth`). Each line of the output is one JSON
object: precision, recall and F1 of the discrete circuit, AUROC and average precision of the keep-probabilities, the
missing and superfluous edges, and KL divergence in nats with the trained constants.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import lightning
import torch

from oa_train import CircuitModule, LMSpec, TaskData
from oa_train.ablations.evaluation import circuit_behaviour
from oa_train.ablations.fitting import RefitSettings
from oa_train.cli.quiet import silence_libraries
from oa_train.masks.hard_concrete import HardConcrete
from oa_train.masks.uniform import UniformGradientSampling
from oa_train.models.graph import Graph
from oa_train.tasks.task import Task
from oa_train.zoo.known import KNOWN_MODELS, KNOWN_TASKS, KnownModel, write_known
from oa_train.zoo.truth import TruthSettings, find_truth

MASKS = {"UniformGradientSampling": UniformGradientSampling, "HardConcrete": HardConcrete}
QUICK = TruthSettings(n_prompts=64, fit=RefitSettings(steps=50, batch_size=16), n_starts=1, n_orders=1)


def trained(
    lm: LMSpec, task: Task, options: argparse.Namespace, ablation: str, masks: str, seed: int
) -> CircuitModule:
    """A module of edges after its training."""
    module = CircuitModule(
        lm=lm,
        seed=seed,
        level="edges",
        ablation=ablation,
        masks=MASKS[masks],
        penalty_weight=options.penalty_weight,
        samples_per_prompt=4,
    )
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=TaskData(task))
    return module


def row(
    known: KnownModel, lm: LMSpec, options: argparse.Namespace, ablation: str, masks: str, seed: int
) -> dict[str, object]:
    """Train on one model, and compare with the true circuit."""
    task = KNOWN_TASKS[known.name](lm=lm, seed=seed, batch_size=8, batches_per_epoch=options.steps)
    start = time.perf_counter()
    module = trained(lm, task, options, ablation, masks, seed)
    seconds = time.perf_counter() - start
    graph, circuit = Graph.of(known.model.config), module.masks.discrete()
    scores = module.masks.keep_probability()[0]
    truth = find_truth(module.frozen, task, known.edges, ablation, QUICK if options.quick else None)
    true = truth.sets[0]
    ablations = module.replacements.ablations()
    kl = circuit_behaviour(module.frozen, task.batches("test", 512), graph, circuit, ablations).kl.mean()
    return {
        "model": known.name,
        "family": known.model.config.model_type,
        "ablation": ablation,
        "masks": masks,
        "seed": seed,
        "edges_total": len(graph),
        "true": len(true),
        "found": int(circuit.sum()),
        **{name: round(value, 4) for name, value in truth.recovery(circuit[0], scores).as_json().items()},
        "missing": sorted(set(true) - set(graph.kept(circuit[0]))),
        "too_many": sorted(set(graph.kept(circuit[0])) - set(true)),
        "kl": round(float(kl), 5),
        "truth_margin": round(truth.margin, 3),
        "true_sets": len(truth.sets),
        "written": set(true) == set(known.edges),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Print a row for each model, kind of ablation, distribution and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one seed, a short training")
    parser.add_argument("--model", action="append", choices=[*KNOWN_MODELS], help="only these")
    parser.add_argument("--ablation", action="append", help="kinds of ablation; optimal by default")
    parser.add_argument("--masks", action="append", choices=[*MASKS], help="distributions; UGS by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--penalty_weight", type=float, default=0.04, help="price of an edge in nats")
    options = parser.parse_args()
    if options.quick:
        options.model, options.seeds, options.steps = options.model or ["case_induction"], 1, min(options.steps, 200)
    silence_libraries()
    torch.set_num_threads(1)
    for name in options.model or KNOWN_MODELS:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                known, lm = write_known(name, Path(folder), seed), LMSpec(folder)
                for ablation in options.ablation or ["optimal"]:
                    for masks in options.masks or ["UniformGradientSampling"]:
                        print(json.dumps(row(known, lm, options, ablation, masks, seed)), flush=True)


if __name__ == "__main__":
    main()
