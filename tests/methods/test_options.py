"""Options that cannot be meant, and ratios that a model cannot reach: refused by name before any text is read."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.calibration.passes import Pass
from lightning_prune.methods import FLAP, HGSP, REAP, HEAPr, ShortGPT, SlimGPT, Wanda
from lightning_prune.support.errors import UserError
from tests.methods.running import run_method, save_base
from tests.tiny import SIDE_BY_SIDE, WHOLE_ATTENTION, make_moe, make_tiny, tiny_tokens

SENSELESS: list[tuple[Any, dict[str, Any], str]] = [
    (HGSP, {"temperature": -1.0}, "--model.temperature"),
    (HGSP, {"temperature": math.inf}, "--model.temperature"),
    (HGSP, {"temperature": math.nan}, "--model.temperature"),
    (HGSP, {"tau": -0.1}, "--model.tau"),
    (HGSP, {"collapse_epsilon": 1.0}, "--model.collapse_epsilon"),
    (HGSP, {"prior_num_samples": 0}, "--model.prior_num_samples"),
    (HGSP, {"prior": "gradient", "prior_num_samples": 16}, r"--model\.prior_num_samples: found 16"),
    (HGSP, {"importance": "wanda", "prior": "gradient"}, r"--model\.prior gradient .* --model\.importance taylor"),
    (HGSP, {"importance": "taylor", "gradient_samples": 8}, r"gradient_samples: found 8 with importance taylor"),
    (HGSP, {"importance": "kfac", "gradient_samples": 0}, r"gradient_samples: found 0 with importance kfac"),
    *((HGSP, {"refit": "residual", "refit_damping": one}, "refit_damping") for one in (0.0, -1.0, 101.0, math.nan)),
    (HGSP, {"steps": 0}, r"--model\.steps"),
    (SlimGPT, {"damping": -0.1}, "--model.damping"),
    (SlimGPT, {"max_tokens": 0}, "--model.max_tokens"),
    (SlimGPT, {"ffn_group_size": 0}, "--model.ffn_group_size"),
    (SlimGPT, {"first_ratio": 1.0}, "--model.first_ratio"),
    (ShortGPT, {"n_remove_layers": 1, "at_most": True}, r"--model.at_most rounds"),
    (Wanda, {"structure": "2:4", "round_to": 8}, r"--model.round_to"),
    (Wanda, {"structure": "2:4", "refit": "residual"}, r"--model\.refit residual"),
    (Wanda, {"structure": "2:4", "steps": 2}, r"--model\.steps"),
    *(
        (Wanda, {"structure": text}, r"--model\.structure.*group, unstructured, or n:m")
        for text in ("", "4:2", "4:4", "0:4", "2:4:8", "rows", "2-4", "-2:4")
    ),
    (Wanda, {"target_parameters": "lots"}, r"--model\.target_parameters: found 'lots'; give a size such as 4\.5B"),
    (Wanda, {"target_memory": "0GiB"}, r"--model\.target_memory: found '0GiB'"),
    (Wanda, {"target_parameters": "1B", "target_memory": "1GiB"}, "give one of them"),
    (Wanda, {"target_memory": "1GiB", "context": 0}, r"--model\.context: found 0"),
    (Wanda, {"target_parameters": "1B", "steps": 2}, r"--model\.steps 2"),
    (Wanda, {"target_parameters": "1B", "structure": "2:4"}, r"--model\.structure 2:4"),
]


@pytest.mark.parametrize(("make", "options", "says"), SENSELESS, ids=str)
def test_what_cannot_be_meant(make: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make("demo", **options)


MODELS = {family: partial(make_tiny, family) for family in ("llama", *WHOLE_ATTENTION, *SIDE_BY_SIDE)}
MODELS |= {"42 channels": partial(make_tiny, channels=42), "moe": partial(make_moe, width=32, layers=3)}
STAY = r"cannot be reached.*GQA groups of this family are not removed"
UNREACHABLE: list[tuple[str, Any, dict[str, Any], str]] = [
    ("llama", SlimGPT, {"pruning_ratio": 0.95}, r"largest reachable ratio is at most 0\.\d+"),
    ("llama", ShortGPT, {"pruning_ratio": 0.01}, "nearest to removing 0"),
    ("llama", ShortGPT, {"pruning_ratio": 0.95}, "nearest to removing 4"),
    ("llama", ShortGPT, {"n_remove_layers": 4}, "at most 3"),
    ("llama", ShortGPT, {"pruning_ratio": 0.05, "at_most": True}, "allows removing 0 of 4 layers"),
    ("42 channels", Wanda, {"structure": "2:4"}, "divisible by 4"),
    *(
        (family, make, {"pruning_ratio": 0.6, **options}, STAY)
        for family in (*WHOLE_ATTENTION, *SIDE_BY_SIDE)
        for make, options in ((Wanda, {}), (Wanda, {"allocation": "uniform"}), (SlimGPT, {}))
        if make is not SlimGPT or family in ("olmo2", "phi")
    ),
    ("llama", REAP, {}, "has no experts, and reap prunes only experts. Give a mixture of experts, or choose another"),
    ("llama", HEAPr, {}, "has no experts"),
    ("llama", Wanda, {"units": "expert"}, "with --model.units expert prunes only experts. Leave that option out"),
    ("moe", SlimGPT, {}, "slimgpt does not prune"),
    ("moe", FLAP, {}, "flap does not prune"),
    ("moe", Wanda, {"structure": "2:4"}, "Use --model.structure group"),
    ("moe", Wanda, {"freeze_first_n_layers": 1}, "all layers keep equally many"),
    ("moe", HGSP, {"steps": 2}, "one step"),
    ("moe", HEAPr, {"units": "all"}, "prunes experts alone"),
    ("moe", REAP, {"pruning_ratio": 0.9}, "largest reachable ratio"),
    ("moe", REAP, {"pruning_ratio": 0.01}, "smallest step"),
    ("moe", REAP, {"target_active_parameters": "1K"}, "or prune channels inside experts, with --model.units expert_ch"),
    ("moe", Wanda, {"target_active_parameters": "1K"}, "or freeze and protect less"),
]


@pytest.mark.parametrize(("model", "make", "options", "says"), UNREACHABLE, ids=str)
def test_what_the_model_cannot_be(model: str, make: Any, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    base = save_base(MODELS[model](), tmp_path / "base")
    with pytest.raises(UserError, match=says):
        make(base, **({"pruning_ratio": 0.3} | options)).check_model()


def test_a_pass_of_another_name_is_missed_by_name(tmp_path: Path) -> None:
    class Misnamed(Wanda):
        def passes(self) -> list[Pass]:
            (own,) = super().passes()
            own.name = "variance"
            return [own]

    method = Misnamed(save_base(make_tiny(), tmp_path / "base"), 0.2)
    with pytest.raises(UserError, match=r"Misnamed: none of its passes is named 'importance'; they are variance\."):
        run_method(method, tiny_tokens(4, 8), tmp_path / "run")
