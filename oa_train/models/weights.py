"""Checks of a model's weights, and the fingerprint by which they identify a model."""

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch

from oa_train.artefacts import FLOATS
from oa_train.errors import ModelError
from oa_train.models.frozen import CausalLM

# Number of values of each parameter in the fingerprint: enough to distinguish two training runs of one architecture,
# few enough that a model of tens of gigabytes is fingerprinted in a second.
FINGERPRINT_VALUES = 1024

# Buffers that older versions of transformers saved with the weights, and that models now compute.
_COMPUTED_BUFFERS = re.compile(
    r"\.(inv_freq|(attn|attention)\.bias|masked_bias|embed_positions|position_ids|(cos|sin)_cached|version)$"
)


def check_complete(report: Mapping[str, Iterable[str]], model: str, within: str = "") -> None:
    """Check that a checkpoint holds the weights that its configuration asks for, and no others.

    Args:
        report: the loading info of `from_pretrained`.
        model: its name.
        within: prefix of the weights among which none may be superfluous; for a checkpoint with other parts (a vision
            tower), that of its language model's blocks.

    Raises:
        ModelError: weights are missing or superfluous; the message names them.
    """
    missing = sorted(report["missing_keys"])
    unused = sorted(
        name
        for name in report["unexpected_keys"]
        if name.startswith(within) and not _COMPUTED_BUFFERS.search(f".{name}")
    )
    if missing:
        raise ModelError(
            f"The weights of {model!r} lack {_listed(missing)} that its configuration asks for; transformers "
            "would fill them with random numbers."
        )
    if unused:
        raise ModelError(
            f"The weights of {model!r} hold {_listed(unused)} that a causal language model of its configuration "
            "does not have: config.json names too few layers, say, or the model has another head.\nCorrect "
            f"config.json. To do without them, save the rest with AutoModelForCausalLM.from_pretrained({model!r})"
            ".save_pretrained(FOLDER), the tokenizer too, and give FOLDER as lm.name."
        )


@torch.no_grad()
def check_finite(model: CausalLM) -> None:
    """Check that no weight is NaN or infinite; sharded weights and those on the meta device are skipped.

    Raises:
        ModelError: some are not finite; the message names their parameters.
    """
    wrong = []
    for name, parameter in model.named_parameters():
        if type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.dtype in FLOATS:
            # One pass without a copy; it also detects NaN.
            extremes = torch.stack(parameter.aminmax()) if parameter.numel() else parameter
            if not extremes.isfinite().all():
                wrong.append(name)
    if wrong:
        raise ModelError(
            f"The model's weights hold NaN or infinity, in {_listed(wrong)}: its training has diverged, the file is "
            f"damaged, or numbers are too large for {str(model.dtype).removeprefix('torch.')}. Choose another "
            "checkpoint of the model, or another lm.dtype."
        )


def fingerprint(model: CausalLM) -> str:
    """Sixteen hexadecimal digits that identify a model by its weights.

    Names, shapes and evenly spaced values of all parameters are hashed. Values are rounded to bfloat16 first, so that
    the same weights have the same fingerprint in float32 and in bfloat16.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        values = flat[::stride][:FINGERPRINT_VALUES].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _listed(names: list[str]) -> str:
    plural, more = "s" * (len(names) > 1), ", ..." * (len(names) > 3)
    return f"{len(names)} tensor{plural} ({', '.join(names[:3])}{more})"
