"""Records that come with the package, adapted to the model's tokenizer and split into streams like those of a file."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from oa_train.errors import TaskError
from oa_train.tasks.file_formats import Fields, Row, RowError, report
from oa_train.tasks.records import Records


class ShippedRecords(Records):
    """Task of a fixed set of prompts that comes with the package, with the options of `Task` and `max_prompts`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            path=None,
            layout="own",
            rows=[],
            subset=None,
            bad_rows="leave_out",
            leading_space="as_written",
            ignored_fields=(),
            **options,
        )

    @abstractmethod
    def rows(self) -> Iterator[Fields]:
        """Rows for this tokenizer, in the fields of `Records`.

        Raises:
            TaskError: the tokenizer splits the words that the task needs.
        """

    def _refuse(self, problems: list[tuple[str, RowError]], n_rows: int, *options: Any) -> None:
        if len(problems) == n_rows:
            raise TaskError(
                f"The task {self.name} cannot be posed to this tokenizer: none of its {n_rows} prompts can be used.\n"
                f"{report(problems)}\nChoose a model whose tokenizer knows their words, or another task."
            )
        super()._refuse(problems, n_rows, *options)

    def _content(self, path: str | None, subset: str | None, rows: Any) -> tuple[str, Iterable[Row]]:
        return self.name, (Row(f"row {number}", row) for number, row in enumerate(self.rows(), start=1))
