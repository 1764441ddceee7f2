"""The benchmarks run; what they measure is no test's business."""

from argparse import Namespace

from benchmarks.scan import contestants, model_of


def test_the_scan_s_contestants_run():
    for run in contestants(model_of(Namespace(model=None, quick=True))).values():
        run()
