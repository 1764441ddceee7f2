"""Silences messages of libraries about which a user can do nothing; every entry has its reason.

Warnings are silenced altogether. Notices are only kept off the terminal: they are in the log of the run.
"""

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

from oa_train.cli.run_log import LIBRARIES

_WARNINGS = (
    # Our command line passes its own words to Lightning's.
    r"LightningCLI's args parameter is intended to run from within Python",
    # Evaluation loads a checkpoint and does not need the callbacks that wrote it.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    # The frozen model is in evaluation mode on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # The run folder is new; it holds the configuration already when the loggers open it.
    r"Experiment logs directory .* exists and is not empty",
    r"Checkpoint directory .* exists and is not empty",
    # Lightning itself uses a deprecated function of torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # A run that ends before its first validation has no best checkpoint; `fit` says so itself.
    r"`ModelCheckpoint\(monitor='val/objective'\)` could not find the monitored key",
    # Batches are made from their indices in the process itself, without workers.
    r"The '\w+' does not have many workers",
    # Short epochs are logged at their end as well.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)


def silence_libraries() -> None:
    """Keep notices about devices, tips and known harmless warnings off the terminal."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in LIBRARIES:
        for handler in logging.getLogger(name).handlers:
            # Only the libraries' own handlers; a record takes everything.
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
                # They hold the stream of the time when they were imported, which may be closed by now; under --quiet
                # it is another one.
                handler.stream = sys.stderr
    if not sys.stderr.isatty():  # progress bars of downloads would fill a file
        disable_progress_bar()
