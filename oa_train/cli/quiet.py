"""Silencing messages of libraries that a user can do nothing about; every entry has its reason.

Warnings are silenced for good. Notices are kept off the terminal only: they are in the record of the run.
"""

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

from oa_train.cli.record import LIBRARIES

_WARNINGS = (
    # Our command line hands its own words to Lightning's.
    r"LightningCLI's args parameter is intended to run from within Python",
    # Evaluation loads a checkpoint and has no use for the callbacks that wrote it.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    # The frozen model is in evaluation mode on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # The run folder is new; it holds the configuration already when the loggers open it.
    r"Experiment logs directory .* exists and is not empty",
    r"Checkpoint directory .* exists and is not empty",
    # Lightning's own use of a deprecated function of torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # A run that ends before its first validation has no best checkpoint; `fit` says so itself.
    r"`ModelCheckpoint\(monitor='val/objective'\)` could not find the monitored key",
    # Batches are made from their numbers in the process itself; there are no workers to be had.
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
            # Of the libraries' own, that is; a record takes everything.
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
                # They keep the stream of the moment when they were imported, which may be closed by now; under
                # --quiet it is another one.
                handler.stream = sys.stderr
    if not sys.stderr.isatty():  # the bars of downloads would fill a file
        disable_progress_bar()
