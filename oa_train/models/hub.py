"""Whether the Hugging Face Hub can be reached, asked once."""

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
    """Ask the Hub for a sign of life, and warn when there is none.

    Without the network transformers tries every file of a model six times over half a minute, also of one that was
    downloaded before. One question tells at once that only downloaded files are of use.
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
            f"{constants.ENDPOINT} does not answer within {PATIENCE:g} s, so only models that were downloaded before "
            "can be loaded.",
            stacklevel=2,
        )
        return False
    return True
