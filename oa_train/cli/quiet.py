"""Silencing what other libraries say that a user of a command can do nothing about; one entry and one reason each."""

import logging
import warnings

from transformers.utils.logging import disable_progress_bar

_WARNINGS = (
    # Our command line hands its own words to Lightning's.
    r"LightningCLI's args parameter is intended to run from within Python",
    # Evaluation loads a checkpoint and has no use for the callbacks that wrote it.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    # The frozen model is in evaluation mode on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # The run folder is new; it holds the configuration already when the loggers open it.
    r"Experiment logs directory .* exists and is not empty",
    # Lightning's own use of a deprecated function of torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def silence_libraries() -> None:
    """Keep notices about devices, tips and known harmless warnings off the terminal."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
