"""Names of tensor dimensions, the same in every signature of the package.

    batch      prompts in a batch
    row        rows of a model run: prompts times mask samples, or prompts times circuits
    sample     mask samples drawn for each prompt
    position   token columns of a padded batch
    layer      decoder blocks, counted from 0
    head       attention (query) heads of a layer
    scored     positions of a prompt at which its prediction is scored
    component  entries of a node mask, in the order of `models.selection.Components`
    source     what writes to the residual stream, in the order of `models.graph.Graph.sources`
    reader     what reads it, in the order of `models.graph.Graph.readers`
    edge       pairs of the two, in the order of `models.graph.Graph.edge_readers`
    d_head     width of one head's value
    d_model    width of the residual stream
    vocabulary logits
    feature    entries of a sparse dictionary's code
    entry      entries of a mask, whatever they stand for

Annotations are checked against the tensors that arrive when the test-suite runs (jaxtyping with beartype); at
any other time they cost nothing.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor"]
