"""One comparison of hand-written runs, and its report folder; nobody changes either."""

from pathlib import Path

import pytest

from lightning_prune.comparison.audit import Audit, audit
from lightning_prune.comparison.records import load_run
from lightning_prune.comparison.report import write_report
from lightning_prune.runs.records import Failure
from tests.comparison.fake_run import write_run

SECOND = {"fingerprint": "7" * 64, "seq_len": 512}


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    tmp_path = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(tmp_path, "magnitude", 0.2, no_data=True, seed=1),
        write_run(tmp_path, "magnitude", 0.5, no_data=True, seed=1, perplexity=100.0, version=1),
        write_run(tmp_path, "hgsp_taylor", 0.2, seed=2, perplexity=11.25),
        write_run(tmp_path, "hgsp_taylor", 0.5, seed=2, perplexity=31.0, version=1),  # below √(dense × unigram)
        write_run(tmp_path, "wanda <b>&", 0.2, seed=4),
        write_run(tmp_path, "shortgpt", 0.2, 0.25, whole_layers=True, seed=3),
        write_run(tmp_path, "shortgpt", 0.5, perplexity=None, whole_layers=True, seed=3, version=1),
        write_run(tmp_path, "shortgpt_512", 0.2, 0.25, whole_layers=True, calibration=SECOND),
    ]
    return audit([load_run(folder) for folder in folders])


@pytest.fixture(scope="session")
def report(result: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    write_report(result, [Failure("slimgpt", 0.3, "RuntimeError: broken")], folder)
    return folder
