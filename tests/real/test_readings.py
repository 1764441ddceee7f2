"""Causal tracing and lenses of a pretrained model."""

from pathlib import Path

import pytest

from oa_train.cli.main import main
from oa_train.engine.tail import read_out, run_tail, scored_stream
from oa_train.metrics.divergence import kl_divergence
from oa_train.models.frozen import CausalLM
from oa_train.models.spec import LMSpec
from oa_train.studies.compare_lenses import CompareLenses, CompareLensesSettings
from oa_train.studies.trace import Trace
from oa_train.studies.trace_settings import TraceSettings
from oa_train.tasks import Facts, Text

pytestmark = pytest.mark.real

RELATIONS = ["capital", "language"]


def test_blocks_run_on_single_tokens_are_the_model(real: CausalLM, real_lm: LMSpec) -> None:
    batch = Facts(lm=real_lm, relations=RELATIONS).batch_of("test", range(4))
    stream = scored_stream(real, batch, attention=True)
    assert stream.attention is not None
    residuals, attention = stream.residuals.flatten(1, 2), stream.attention.flatten(1, 2)
    starts = [0, 11, 29, 30]
    final = run_tail(real, residuals[starts], starts, lambda layer, live: attention[layer].unsqueeze(0))
    for tail in final:
        assert float(kl_divergence(stream.logits[:, 0], read_out(real, tail)).abs().max()) < 1e-5


def test_facts_are_read_at_the_subject_early_and_reach_the_end_late(real: CausalLM, real_lm: LMSpec) -> None:
    task = Facts(lm=real_lm, relations=RELATIONS, n_test=8, n_means=16)
    settings = TraceSettings(layers=[2, 12, 22], draws=1, prompt=None)
    findings = Trace(real, task, settings=settings).run()

    def recovered(kind: str, at: str, layer: int) -> float:
        (row,) = findings.where(restored=kind, at=at, layer=layer)
        return row["recovered"].mean

    assert findings.facts["n_known"] >= 4
    assert recovered("mlp", "subject_last", 2) > 0.5 > recovered("mlp", "subject_last", 22)
    assert recovered("attention", "-1", 22) > 0.3 > recovered("attention", "-1", 2)


def test_constants_for_attention_predict_better_than_nothing_or_another_prompts(
    real: CausalLM, real_lm: LMSpec
) -> None:
    sentences = [
        f"The {thing} that we saw last year in {place} was larger than the one in the old book about {place}."
        for thing in ("house", "ship", "garden", "bridge", "market")
        for place in ("France", "Japan", "Canada", "Brazil")
    ]
    documents = [" ".join(sentences[n:] + sentences[:n]) for n in range(0, 20, 2)]
    task = Text(lm=real_lm, documents=documents, context_length=32, n_test=12, n_means=12, n_validation=2)
    layers = CompareLensesSettings(layers=[8, 28])
    findings = CompareLenses(real, task, settings=layers).run()
    for layer in (8, 28):
        kl = {name: findings.where(lens=name, layer=layer)[0]["kl"].mean for name in ("logit", "mean", "resample")}
        assert kl["mean"] < kl["resample"] < kl["logit"]


def test_a_prompt_is_read_from_the_command_line(
    real_lm: LMSpec, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "Facts", "--lens.prompt", "The capital of France is the city of", "--lens.layers", "[20,29]"]
    assert main(["lens", "--lm.name", real_lm.name, *words]) == 0
    assert "' Paris'" in capsys.readouterr().out
