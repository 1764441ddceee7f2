"""Options of the study `trace`."""

from dataclasses import dataclass

from oa_train.ablations.registry import check_kind
from oa_train.checks import check_positive
from oa_train.engine.chunks import ROWS_PER_RUN

OPTIMAL, GAUSSIAN, RESAMPLE = "optimal", "gaussian", "resample"

# Random corruptions, whose results are averaged over `draws`.
DRAWN = (GAUSSIAN, RESAMPLE)


@dataclass(frozen=True)
class TraceSettings:
    """Settings of `trace`.

    Attributes:
        restore: what is restored: `attention`, `mlp` or `residual`; by default what the run's constants were trained
            for, or `attention` and `mlp`.
        at: spans at which it is restored; by default those that the run's constants were trained for, or the last
            token of the prompt and the last token of the subject.
        windows: odd numbers of neighbouring layers that are restored together; by default those that the run's
            constants were trained for, or 5.
        layers: blocks in the middle of the windows; by default those that the run's constants were trained for, or
            all.
        subject: span whose tokens are corrupted; by default the one that the run's constants were trained for, or
            `subject`.
        corruptions: `optimal` (the constants of a run of TracingModule), `gaussian` (noise added to the subject's
            embeddings), or kinds of ablation of these embeddings, such as `resample`; by default the first two, or
            only `gaussian` without a run.
        noise: standard deviation of the Gaussian noise, as a multiple of that of the subjects' embeddings.
        draws: number of random draws over which results are averaged; a prompt's draws are the same in all runs.
        prompt: index, among the prompts answered correctly, of one that is traced token by token; none if null.
        prompts_at_once: number of prompts in a piece; each piece is written when it is done.
        rows_per_run: maximum number of rows (runs times prompts) in one model run; limits memory without changing
            results.
    """

    restore: list[str] | None = None
    at: list[str | int] | None = None
    windows: list[int] | None = None
    layers: list[int] | None = None
    subject: str | None = None
    corruptions: list[str] | None = None
    noise: float = 3.0
    draws: int = 5
    prompt: int | None = 0
    prompts_at_once: int = 16
    rows_per_run: int = ROWS_PER_RUN

    def __post_init__(self) -> None:
        check_positive(noise=self.noise, draws=self.draws)
        check_positive(prompts_at_once=self.prompts_at_once, rows_per_run=self.rows_per_run)
        for name in self.corruptions or ():
            if name not in (OPTIMAL, GAUSSIAN):
                check_kind("trace.corruptions", name)
