"""A frozen model's weights shared out among processes (FSDP2)."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from oa_train.models.families import find_parts
from oa_train.models.loading import CausalLM


def shard(model: CausalLM, mesh: DeviceMesh) -> None:
    """Share a frozen model's weights out among the processes of a mesh, block by block; once done it stays so.

    The weights, which are the same in every process, move to the mesh's device as they are shared out. From then on
    all processes have to run the model together, as often as each other.
    """
    if isinstance(model, FSDPModule):
        return
    # The rest (embedding, final norm, unembedding) comes last, as the root: it also lets one block's weights travel
    # while another runs.
    for module in (*find_parts(model).blocks, model):
        fully_shard(module, mesh=mesh)
