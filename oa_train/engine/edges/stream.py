"""What stands in for the residual stream where edges are cut: a stream of which every reader reads its own mix.

It has two implementations: `engine.edges.run` leaves all gradients to autograd, `engine.edges.operations` is fast.
"""

from abc import ABC, abstractmethod

from oa_train.shapes import Float, Tensor


class Stream(ABC):
    """One run of a model. Its parts write and read in the order of the graph.

    `own` is the model's own residual stream, which is read at tokens that are never ablated. Positions are columns of
    the batch.
    """

    @abstractmethod
    def write_input(self, embedded: Float[Tensor, "row position d_model"]) -> None:
        """The embedding writes; before anything else happens."""

    @abstractmethod
    def read_attention(self, layer: int, own: Float[Tensor, "row position d_model"]) -> tuple[Tensor, ...]:
        """What a layer's projections to queries, keys and values return: [row, position, width] for each module."""

    @abstractmethod
    def write_heads(
        self,
        layer: int,
        values: Float[Tensor, "row position head d_head"],
        scale: Float[Tensor, "row position d_model"] | None,
    ) -> None:
        """A layer's heads write.

        Args:
            layer: of the block.
            values: of its heads, the input of the attention output projection.
            scale: what comes out of that projection is multiplied with, by a norm; carries gradients.
        """

    @abstractmethod
    def read_mlp(
        self, layer: int, own: Float[Tensor, "row position d_model"]
    ) -> Float[Tensor, "row position d_model"]:
        """What the MLP of a layer reads, before its norm."""

    @abstractmethod
    def write_mlp(self, layer: int, output: Float[Tensor, "row position d_model"]) -> None:
        """The MLP of a layer writes."""

    @abstractmethod
    def read_last(self, own: Float[Tensor, "row position d_model"]) -> Float[Tensor, "row position d_model"]:
        """What the logits read, before the final norm."""
