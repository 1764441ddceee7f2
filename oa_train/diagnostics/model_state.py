"""The state of a model that interventions must leave unchanged."""

from typing import Any

from oa_train.models.frozen import CausalLM
from oa_train.models.weights import fingerprint
from oa_train.shapes import Int, Tensor


def model_state(model: CausalLM, tokens: Int[Tensor, "row position"]) -> dict[str, Any]:
    """Everything that an intervention could change; `_version` counts in-place changes, so no copies are needed."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return {
        "hooks": [list(getattr(module, kind)) for module in model.modules() for kind in kinds],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "weights": [
            (name, id(weight), weight.data_ptr(), weight._version, weight.requires_grad, weight.grad is None)
            for name, weight in model.named_parameters()
        ],
        "fingerprint": fingerprint(model),
        "logits": logits.double().cpu().numpy().tobytes(),
    }
