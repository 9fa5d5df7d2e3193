"""One comparison of hand-written runs, and its report folder; nobody changes either."""

from pathlib import Path

import pytest

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.report import write_report
from lightning_prune.runs.records import Failure
from tests.comparison.fake_run import make_run


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    root, second = tmp_path_factory.mktemp("runs"), {"fingerprint": "7" * 64, "seq_len": 512}
    return audit(
        [
            make_run(root, "magnitude", 0.2, no_data=True, seed=1),
            make_run(root, "magnitude", 0.5, no_data=True, seed=1, perplexity=100.0),
            make_run(root, "hgsp_taylor", 0.2, seed=2, perplexity=11.25),
            make_run(root, "hgsp_taylor", 0.5, seed=2, perplexity=31.0),  # below √(dense × unigram)
            make_run(root, "wanda <b>&", 0.2, seed=4),
            make_run(root, "shortgpt", 0.2, 0.25, whole_layers=True, seed=3),
            make_run(root, "shortgpt", 0.5, perplexity=None, whole_layers=True, seed=3),
            make_run(root, "shortgpt_512", 0.2, 0.25, whole_layers=True, calibration=second),
        ]
    )


@pytest.fixture(scope="session")
def report(result: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    write_report(result, [Failure("slimgpt", 0.3, "RuntimeError: broken")], folder)
    return folder
