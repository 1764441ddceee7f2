"""Settings of `trace`."""

from dataclasses import dataclass

from oa_train.ablations.registry import check_kind
from oa_train.checks import check_positive
from oa_train.engine.chunks import ROWS_PER_RUN

OPTIMAL, GAUSSIAN, RESAMPLE = "optimal", "gaussian", "resample"

# Corruptions that draw random numbers, whose results are averaged over `draws`.
DRAWN = (GAUSSIAN, RESAMPLE)


@dataclass(frozen=True)
class TraceSettings:
    """Settings of `trace`.

    Attributes:
        restore: what is restored: `attention`, `mlp`, `residual`; by default as the run's constants were trained, or
            `attention` and `mlp`.
        at: spans at which it is restored; by default as the run's constants were trained, or the last token of the
            prompt and that of the subject.
        windows: odd numbers of neighbouring layers that are restored together; by default as the run's constants were
            trained, or 5.
        layers: blocks in the middle of the windows; by default as the run's constants were trained, or all.
        subject: span whose tokens are corrupted; by default as the run's constants were trained, or `subject`.
        corruptions: `optimal` (the constants of a run of TracingModule), `gaussian` (noise added to the subject's
            embeddings), or kinds of ablation of them, such as `resample`; by default the first two, or `gaussian`
            alone without a run.
        noise: standard deviation of the Gaussian noise, in those of the numbers in the subjects' embeddings.
        draws: random draws whose results are averaged; a prompt's draws are the same in all runs.
        prompt: number, among the known prompts, of one that is traced token by token; none if omitted.
        prompts_at_once: prompts of a piece, which is written when it is done.
        rows_per_run: most rows (runs times prompts) of one model run; bounds memory, changes no result.
    """

    restore: list[str] | None = None
    at: list[str] | None = None
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
