"""A check, made once, that the Hugging Face Hub can be reached."""

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

    Offline, transformers tries every file of a model six times over half a minute, even if it was downloaded before. A
    single request shows at once that only downloaded files can be used.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    if not endpoint.startswith(("http://", "https://")):
        return True  # leave it to the Hub's own client
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=PATIENCE).close()  # noqa: S310 (the scheme was checked)
    except HTTPError:
        return True  # any answer will do
    except OSError as problem:
        # The Hub's own client has its own certificates.
        if isinstance(getattr(problem, "reason", None), ssl.SSLError):
            return True
        warnings.warn(
            f"{constants.ENDPOINT} does not answer within {PATIENCE:g} s, so only models and datasets that were "
            "downloaded before can be loaded.",
            stacklevel=2,
        )
        return False
    return True
