"""Names of tensor dimensions, the same in every signature of the package.

    batch      prompts in a batch
    row        rows of a model run: prompts times mask samples, or prompts times circuits
    position   token columns of a padded batch
    scored     positions of a prompt at which its prediction is scored
    entry      entries of a mask, of any level
    source     sources, which write to the residual stream, in the order of `models.graph.Graph.sources`
    reader     readers of the residual stream, in the order of `models.graph.Graph.readers`
    edge       pairs of a source and a reader, in the order of `models.edge_layout.EdgeLayout.edge_readers`
    unit       units of a site
    d_head     width of one head's value
    d_model    width of the residual stream
    vocabulary logits
    feature    entries of a sparse dictionary's code

The test suite checks annotations against the actual tensors (jaxtyping with beartype); otherwise they cost nothing.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor"]
