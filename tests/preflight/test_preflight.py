"""What a run takes is told before it begins, from shapes alone."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_prune import methods
from lightning_prune.calibration.passes import Finding
from lightning_prune.cli import main
from lightning_prune.methods.kfac import KFACPass
from lightning_prune.models.families import LayerAnatomy
from lightning_prune.preflight import place as place_module
from lightning_prune.preflight.dry_run import DryRun, PhaseUse, Shapes, Solves, dry_run
from lightning_prune.preflight.estimate import KERNEL_BYTES, KERNELS_PER_LAYER, Estimate, _at, _polynomial
from lightning_prune.preflight.ledger import Ledger
from lightning_prune.preflight.workload import Workload
from tests.tiny import tiny_config

LAYERS, SAMPLES, LENGTH, BATCH, HIDDEN = 5, 12, 16, 4, 32
LOAD = Workload(SAMPLES, LENGTH, BATCH, 8, LENGTH, 4)


class _Trainer:
    """What ``check_before_loading`` and ``passes`` ask of a trainer."""

    world_size = 1
    max_epochs = 0
    fit_loop: "_Trainer"

    def __init__(self) -> None:
        self.fit_loop = self


def _dry(
    method: methods.HGSP | methods.Wanda | methods.SlimGPT, layers: int, family: str = "llama", free: int = 10**12
) -> DryRun:
    config = tiny_config(family, layers=LAYERS)
    method._trainer = _Trainer()  # type: ignore[assignment]
    method._fabric = None
    method.check_before_loading(config)
    wanted = Shapes(config, torch.float32, torch.float32, torch.float32, False, "layer")
    return dry_run(method, wanted, LOAD, layers, free, contextlib.nullcontext, Solves())


def test_live_bytes_are_those_of_the_tensors_that_are_alive() -> None:
    with Ledger() as ledger:
        a = torch.zeros(1000, dtype=torch.float32)
        b = a + 1
        del a
        c = b.double()
        assert ledger.live["work"] == 4000 + 8000
        del b, c
        assert ledger.live["work"] == 0
    assert ledger.peak["work"] == 12000


def test_no_memory_is_taken() -> None:
    with Ledger() as ledger:
        huge = torch.zeros(10**7, 10**5)
        assert ledger.live["work"] == 4 * 10**12
        del huge


def test_values_that_code_asks_for_are_those_of_real_tensors() -> None:
    with Ledger():
        weight = torch.ones(6)[2:]
        assert int((weight > 0).sum()) == 4
        alive = torch.ones(8, dtype=torch.bool)
        alive[torch.tensor([1, 5])] = False
        assert len(alive.nonzero()) == 6
        unknown = torch.empty(300, 300) @ torch.empty(300, 300)
        assert bool(torch.isfinite(unknown).all())
        assert int((~torch.isfinite(unknown)).sum()) == 0


def test_matrix_products_are_counted() -> None:
    with Ledger() as ledger:
        torch.empty(3, 5) @ torch.empty(5, 7)
    assert ledger.flops == 2 * 3 * 5 * 7


@pytest.mark.parametrize("layers", [3, 4])
def test_removal_priors_evaluate_and_keep_what_the_wavefront_needs(layers: int) -> None:
    run = _dry(methods.HGSP(importance="magnitude"), layers)
    batches = SAMPLES // BATCH
    assert run.evaluations == (2 * layers + 3 * layers * (layers - 1) // 2) * batches
    store = SAMPLES * LENGTH * HIDDEN * 4
    assert run.phases["prior, removal, last layer"].stores == {store: 1 + 3 * (layers - 1)}


@pytest.mark.parametrize(("samples", "batches"), [(3, 1), (4, 1), (6, 2), (9, 3), (100, 3)])
def test_priors_that_take_fewer_samples_evaluate_fewer_batches(samples: int, batches: int) -> None:
    run = _dry(methods.HGSP(importance="magnitude", prior_num_samples=samples), 3)
    assert run.evaluations == (2 * 3 + 3 * 3 * 2 // 2) * batches  # of 4 samples each, and there are 12


def test_taylor_keeps_a_boundary_per_layer_and_one_gradient() -> None:
    run = _dry(methods.HGSP(importance="taylor", temperature=0), 4)
    store = SAMPLES * LENGTH * HIDDEN * 4
    assert run.phases["importance, backward, last layer"].stores == {store: 4 + 1}
    assert run.evaluations == 2 * 4 * SAMPLES // BATCH
    assert run.flops > 0


def test_kfac_solves_in_the_precision_that_the_device_in_question_has_room_for() -> None:
    asked: list[int] = []
    method = methods.HGSP(importance="kfac", temperature=0)
    passes = method.passes

    def watched() -> list[KFACPass]:
        (one,) = passes()
        assert isinstance(one, KFACPass)
        conclude = one.conclude

        def ask(view: LayerAnatomy) -> Finding:
            asked.append(one.setting.free_bytes(torch.device("cpu")))
            return conclude(view)

        one.conclude = ask  # type: ignore[method-assign]
        return [one]

    method.passes = watched  # type: ignore[method-assign, assignment]
    for free in (10**12, 10**6):
        _dry(method, 3, free=free)
    assert all(0.9e12 < found < 10**12 for found in asked[:3])
    assert all(found < 10**6 for found in asked[3:])
    assert len(asked) == 6


def test_refitted_weights_of_every_layer_are_on_disk() -> None:
    run = _dry(methods.SlimGPT(), 3)
    output, down = 32 * 32, 32 * 40
    assert 3 * (output + down) * 4 <= run.disk < 3 * (output + down) * 4 + 3 * 2000


@pytest.mark.parametrize("make", [methods.HGSP, methods.SlimGPT])
@pytest.mark.parametrize("family", ["gemma2", "phi3", "olmo2"])
def test_families_of_other_layers_evaluate_as_many(family: str, make: type[methods.HGSP]) -> None:
    run, plain = _dry(make(), 2, family), _dry(make(), 2)
    assert (run.evaluations, run.flops > 0, run.phases.keys()) == (plain.evaluations, True, plain.phases.keys())


def test_a_few_layers_tell_about_many() -> None:
    runs = [_dry(methods.HGSP(importance="taylor"), layers) for layers in (2, 3, 4)]
    long = _dry(methods.HGSP(importance="taylor"), 5)
    assert _polynomial([(run.layers, run.evaluations) for run in runs], 5) == long.evaluations
    for phase, use in long.phases.items():
        found: PhaseUse = _at(runs, phase, 5)
        assert +found.stores == +use.stores, phase
        assert found.work == pytest.approx(use.work, rel=0.02), phase


def test_half_precision_kernels_count_once_where_all_layers_are_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")  # its own default, with which it keeps them all
    tiny_config(layers=LAYERS).save_pretrained(tmp_path)
    np.save(tmp_path / "tokens.npy", np.zeros((SAMPLES, LENGTH), dtype=np.int64))
    words = ["--model.pretrained", str(tmp_path), "--data.dataset", str(tmp_path / "tokens.npy"), "--json"]
    words += ["--data.eval_datasets", str([str(tmp_path / "tokens.npy")]), "--trainer.precision", "bf16-true"]
    host = {}
    for allocation in ("global", "uniform"):
        main(["check", "--config", "wanda", "--model.allocation", allocation, *words, "--trainer.accelerator", "cpu"])
        host[allocation] = json.loads(capsys.readouterr().out)[0]["host_bytes"]
    more = (LAYERS - 1) * KERNELS_PER_LAYER * KERNEL_BYTES
    assert host["global"] - host["uniform"] == pytest.approx(more, rel=0.1)  # elsewhere the uniform one is fuller


def test_check_needs_a_config_alone_and_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(layers=4).save_pretrained(tmp_path)
    words = ["check", "--config", "wanda", "--model.pretrained", str(tmp_path), "--json"]
    words += ["--data.eval_datasets", "[]", "--memory", "2GiB"]
    assert main(words) == 0
    layer, model = json.loads(capsys.readouterr().out)
    assert (layer["onload"], model["onload"]) == ("layer", "model")
    assert layer["fits"]
    assert model["fits"]
    assert 0 < layer["device_bytes"] <= model["device_bytes"]
    words[-1] = "1MiB"
    assert main(words) == 1
    assert not any(one["fits"] for one in json.loads(capsys.readouterr().out))


def test_token_arrays_say_how_much_text_there_is(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "tokens.npy", np.full((7, 16), 5))
    words = ["check", "--config", "shortgpt", "--model.pretrained", str(tiny_checkpoint()), "--json"]
    assert main([*words, "--data.dataset", str(tmp_path / "tokens.npy"), "--data.eval_datasets", "[]"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["layer_evaluations"] == 4 * 2  # 4 layers, batches of 4 and 3


@pytest.mark.parametrize("words", [["--memory", "much"], ["--memory"], ["--host-memory", "-3GiB"]])
def test_a_size_that_is_none_ends_in_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", "wanda", *words]) == 2
    assert words[0] in capsys.readouterr().err


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A host that has so many bytes more than this process holds, and no model that is too small to be estimated."""

    def leave(size: int) -> None:
        monkeypatch.setattr(place_module, "FIXED", 2**60)
        monkeypatch.setattr(place_module, "free_host_bytes", lambda: size)

    return leave


def _fit(checkpoint: Path, root: Path, *words: str) -> int:
    data = ["--data.dataset", str(root / "tokens.npy"), "--data.eval_datasets", "[]"]
    np.save(root / "tokens.npy", np.full((8, 16), 5))
    where = ["--model.pretrained", str(checkpoint), "--trainer.default_root_dir", str(root / "logs")]
    return main(["fit", "--config", "wanda", *where, *data, "--trainer.logger", "false", *words])


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    little_memory: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    little_memory(1000)
    assert _fit(tiny_checkpoint(), tmp_path) == 2
    message = capsys.readouterr().err
    assert "--model.onload layer takes" in message
    assert "of host memory" in message
    assert "bf16-true halves" in message
    assert not (tmp_path / "logs").exists()


def test_a_placement_that_does_not_fit_names_the_one_that_does(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    little_memory: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    little_memory(2**30)

    def fits(estimate: Estimate) -> float:
        return 2.0 if estimate.shapes.onload == "model" else 0.5

    monkeypatch.setattr(Estimate, "share", property(fits))
    assert _fit(tiny_checkpoint(), tmp_path, "--model.onload", "model") == 2
    assert "--model.onload layer fits." in capsys.readouterr().err
    assert _fit(tiny_checkpoint(), tmp_path) == 0
    details = json.loads(next(tmp_path.rglob("method.json")).read_text(encoding="utf-8"))
    assert details["onload"] == "layer"


def test_auto_keeps_the_whole_model_where_it_fits(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], little_memory: Callable[[int], None]
) -> None:
    little_memory(2**34)
    assert _fit(tiny_checkpoint(), tmp_path) == 0
    assert json.loads(next(tmp_path.rglob("method.json")).read_text(encoding="utf-8"))["onload"] == "model"
