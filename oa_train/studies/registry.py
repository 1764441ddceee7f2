"""The studies that have a command of their own. To add one, write its file and enter it here."""

# The class of each command, imported when it is used, and its line in the overview of commands.
STUDIES: dict[str, tuple[str, str]] = {
    "compare": ("oa_train.studies.compare.Compare", "learned ablation against all others, for one run or several"),
    "scan": ("oa_train.studies.scan.Scan", "every part ablated alone, under every ablation: which matter?"),
    "curve": ("oa_train.studies.curve.Curve", "units ablated in order of importance: where does behaviour break?"),
    "interact": ("oa_train.studies.interact.Interact", "units ablated together: which back each other up?"),
    "sufficient": (
        "oa_train.studies.sufficient.Sufficient",
        "which few units are enough? greedy search to a stated recovery",
    ),
    "trace": ("oa_train.studies.trace.Trace", "where is a fact recalled? clean values restored, subject corrupted"),
    "compare_lenses": (
        "oa_train.studies.compare_lenses.CompareLenses",
        "what do middle layers already know? lenses at every layer",
    ),
    "faithfulness": (
        "oa_train.studies.faithfulness.Faithfulness",
        "do lenses use the residual stream as the model does?",
    ),
    "lens": ("oa_train.studies.lens.ReadPrompt", "one prompt's predictions, layer by layer"),
    "minimal": ("oa_train.studies.minimal.Minimal", "is a circuit minimal, and is it complete?"),
    "robustness": (
        "oa_train.studies.robustness.Robustness",
        "are the parts outside a circuit irrelevant in every combination?",
    ),
}
