"""A check that the Hugging Face Hub can be reached, made once."""

import os
import ssl
import warnings
from functools import cache
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants

# Seconds to wait for an answer.
PATIENCE = 5.0


@cache
def hub_answers() -> bool:
    """True if the Hub answers; warns if it does not.

    Offline, transformers tries every file of a model six times over half a minute, even if it was downloaded before.
    One request shows at once that only downloaded files can be used.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    if not endpoint.startswith(("http://", "https://")):
        return True  # left for the Hub's own client to judge
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=PATIENCE).close()  # noqa: S310 (the scheme was looked at)
    except HTTPError:
        return True  # an answer, whatever it is
    except OSError as problem:
        # The Hub's own client brings certificates of its own.
        if isinstance(getattr(problem, "reason", None), ssl.SSLError):
            return True
        warnings.warn(
            f"{constants.ENDPOINT} does not answer within {PATIENCE:g} s, so only models and datasets that were "
            "downloaded before can be loaded.",
            stacklevel=2,
        )
        return False
    return True
