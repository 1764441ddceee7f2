"""A frozen model's weights shared out among processes (FSDP2)."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from oa_train.models.families import find_parts
from oa_train.models.loading import CausalLM


def shard(model: CausalLM, mesh: DeviceMesh) -> None:
    """Share a frozen model's weights out among processes, block by block; once done it stays so.

    From then on all processes have to run the model together, as often as each other.

    Args:
        model: the same in every process; its weights are moved to the mesh's device as they are shared out.
        mesh: the processes.
    """
    if isinstance(model, FSDPModule):
        return
    for block in find_parts(model).blocks:
        fully_shard(block, mesh=mesh)
    # Embedding, final norm and unembedding; as the root of all it also lets one block's weights travel while another
    # runs.
    fully_shard(model, mesh=mesh)
