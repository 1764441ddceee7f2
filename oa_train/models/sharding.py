"""Sharding of a frozen model's weights across processes (FSDP2)."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from oa_train.models.frozen import CausalLM
from oa_train.models.parts import find_parts


def shard(model: CausalLM, mesh: DeviceMesh) -> None:
    """Shard a frozen model's weights across the processes of a mesh, block by block, unless already done.

    The weights, which are the same in every process, move to the mesh's device. From then on all processes must run
    the model together, the same number of times.
    """
    if isinstance(model, FSDPModule):
        return
    # The model itself, with all other weights (embedding, final norm, unembedding), comes last; as the root it
    # prefetches the weights of a block while another block runs.
    for module in (*find_parts(model).blocks, model):
        fully_shard(module, mesh=mesh)
