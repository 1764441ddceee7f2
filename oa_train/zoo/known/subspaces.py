"""Names for stretches of a vector space: what each dimension of a hand-written residual stream stands for."""

from collections.abc import Iterator, Mapping


class Subspaces(Mapping[str, slice]):
    """Cuts the dimensions of a space into named stretches, one behind the other.

    What is left over goes to a last stretch, `rest`, so that a space can be wider than what is put into it.

    Args:
        width: dimensions of the whole space.
        **widths: dimensions of each stretch, in order.

    Raises:
        ValueError: the stretches are together wider than the space.
    """

    def __init__(self, width: int, **widths: int) -> None:
        left = width - sum(widths.values())
        if left < 0:
            raise ValueError(f"{sum(widths.values())} dimensions do not fit into a space of {width}.")
        self.width = width
        self._slices: dict[str, slice] = {}
        start = 0
        for name, size in {**widths, "rest": left}.items():
            self._slices[name] = slice(start, start + size)
            start += size

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def join(self, name: str, first: str, last: str) -> None:
        """Give a further name to neighbouring stretches.

        Args:
            name: the new name.
            first: stretch with which it begins.
            last: stretch with which it ends.
        """
        self._slices[name] = slice(self[first].start, self[last].stop)

    def size(self, name: str) -> int:
        """Dimensions of a stretch."""
        return len(range(self.width)[self[name]])

    def first(self, name: str) -> int:
        """Number of a stretch's first dimension."""
        return range(self.width)[self[name]][0]
