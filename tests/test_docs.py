"""What the README and the pages of docs/ tell a reader to type works, on fewer tokens, and prints what the README says;
every page has its entry, and every named file is there."""

import contextlib
import doctest
import re
import shlex
import shutil
import sys
import textwrap
from itertools import pairwise, takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.comparison import report
from lightning_prune.demo import demo_model_path, demo_text
from lightning_prune.runs.settings import read_settings
from tests.methods.running import run_method, save_base
from tests.tiny import make_moe, make_tiny, tiny_tokens

ROOT = Path(__file__).parent.parent
DOCS, README = ROOT / "docs", ROOT / "README.md"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
YOURS = {  # what stands for something of the reader's, or would take minutes
    "path/to/wikitext2/validation.txt": "my_text.txt",
    "path/to/wikitext2/test.txt": "my_text.txt",
    "path/to/ptb/validation.txt": "my_text.txt",
    "path/to/ptb/test.txt": "my_text.txt",
    "~/.cache/lightning-prune/smollm2-135m": "demo",
    "~/.cache/lightning-prune/gemma3-270m": "demo",
    "--config targets/smollm2-135m": "--model.pretrained demo",
    "/tmp/benchmark/llama-16-layers": "demo",
    "/tmp/benchmark/tokens.npy": "windows.npy",
    "/tmp/benchmark/held_out.npy": "windows.npy",
    "/tmp/": "",
    "path/or/hub-id": "demo",
    "path/to/model": "demo",
    "MODEL": "experts",
    "path/to/llama": "demo",
    "wikitext2": "demo",
    "00:00:10:00": "00:00:00:01",
    "--ratios 0.2 0.3 0.5 --seeds 0 1 2": "--ratios 0.2 --seeds 0 1",
    "--config gisp": "--config gisp --model.steps 2",
    'tokenizer="demo"': 'tokenizer="demo", num_samples=8',
}
ELSEWHERE = {  # commands that are not run here, and why
    "compare --config compare --ratios 0.2 0.5 --systems wanda hgsp_taylor --model path/to/llama --data.dataset "
    "wikitext2 --trainer.precision bf16-true --root logs/llama": "the tutorial's, on a model of one's own",
    "compare --config compare --seeds 0 1 2": "tests/comparison repeats an experiment",
    "compare --runs logs/*/version_* --zero-shot piqa boolq": "tasks of the hub; tests/comparison has one of its own",
    "check --config hgsp_taylor --model.pretrained path/or/hub-id --trainer.precision bf16-true --memory 24GiB": (
        "the tutorial's, with priors"
    ),
    "fit --config hgsp_taylor --model.pretrained path/or/hub-id --trainer.precision bf16-true --model.onload layer "
    "--resume": "tests/runs kills a run first",
    "fit --config heapr --config calibration/512x2048 --model.pretrained MODEL --data.dataset my_text.jsonl": (
        "on a million tokens; tests/runs/test_shipped_configs.py reads the overlay"
    ),
}
MADE = ("wanda", "hgsp_taylor")  # runs that several pages make, or take for granted; here they are made once
BEFORE = {"python.md": "wanda", "quality.md": "hgsp_taylor", "serving.md": "wanda", "README.md": "wanda"}
READ = ("magnitude", "slimgpt", "hgsp_kfac_refit_kind")  # systems of experiments that a page reads afterwards
PAGES = [
    *sorted((DOCS / "tutorials").glob("*.md")),
    *sorted((DOCS / "methods").glob("*.md")),
    *(DOCS / "notes" / f"{name}.md" for name in ("quality", "results")),
    *(DOCS / f"{name}.md" for name in ("comparison", "experts", "large_models", "python", "quality", "recover")),
    *(DOCS / f"{name}.md" for name in ("results", "serving")),
    README,
]
ADDED = {  # behind a command of the reader's, so that it takes seconds
    # In float32, which a processor without bf16 instructions calculates ten times as fast.
    "fit": "--data.num_samples 4 --data.eval_datasets [windows.npy] --trainer.enable_progress_bar false "
    "--trainer.precision 32-true --data.continuations 0",
    "compare": "--data.num_samples 4 --data.eval_datasets [windows.npy] --data.continuations 0",
    "evaluate": "--batch-sizes 1 --repeats 1 --prompt-length 8 --decode-length 4",
    "check": "--data.num_samples 8 --model.refit none --model.onload layer",
    "recover": "--data.num_samples 32 --data.eval_datasets [windows.npy] --trainer.max_steps 2 "
    "--trainer.enable_progress_bar false",
    "tune": "--data.num_samples 8 --trials 2 --model.temperature 0",
    "test": "--data.eval_datasets [windows.npy]",
}


def all_blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every code block."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(block)) for language, block in found]


def blocks(page: Path, language: str) -> list[str]:
    return [block for kind, block in all_blocks(page) if kind == language]


def commands(page: Path) -> list[str]:
    """What follows ``lightning-prune`` on a page, in its order, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()[1:]) for line in lines if line.startswith("lightning-prune ")]


def with_demo(text: str) -> str:
    for theirs, ours in YOURS.items():
        text = text.replace(theirs, ours)
    return text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, with the runs that are made once."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        np.save("windows.npy", lp.calibration_set(demo_text("test"), "demo", num_samples=8).numpy())
        make_moe(vocab_size=1024, width=64).save_pretrained("experts")
        AutoTokenizer.from_pretrained(demo_model_path()).save_pretrained("experts")
        for name in ("my_text.txt", "part.txt", "ptb_part.txt"):
            Path(name).write_text(demo_text("train")[:100_000], encoding="utf-8")
        for name in MADE:
            run(f"fit --config {name}")
    return folder


def run(command: str) -> None:
    words = [word for text in shlex.split(command) for word in (sorted(map(str, Path().glob(text))) or [text])]
    added = ADDED.get(words[0], "").split()
    if words[0] == "compare":
        added = [] if "--runs" in words else [*added, *of_an_experiment(words)]
    assert main(words + added) == 0, command


def of_an_experiment(words: list[str]) -> list[str]:
    """One ratio, and of the systems, which all have to be there, the first, or those of ``READ`` that are named."""
    systems = words[words.index("--systems") + 1 :] if "--systems" in words else []
    systems = list(takewhile(lambda word: not word.startswith("--"), systems))
    known = list(read_settings(Path(words[words.index("--config") + 1]), systems=systems or None).systems)
    few = [name for name in systems if name in READ] or known[:1]
    return ["--systems", *few, *(["--ratios", "0.2"] if "--ratios" not in words else [])]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_snippets_of_a_page_run_in_their_order(
    page: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name != "compare.md":  # the tutorial draws them
        monkeypatch.setattr(report, "charts", lambda audit: [])
    found = commands(page)
    made = [name for name in MADE if BEFORE.get(page.name) == name or f"fit --config {name}" in found]
    shutil.copytree(runs, tmp_path, ignore=shutil.ignore_patterns(*{*MADE} - {*made}), dirs_exist_ok=True)
    for command in dict.fromkeys(found):
        if command not in ELSEWHERE and command.removeprefix("fit --config ") not in made:
            run(with_demo(command))
    names: dict[str, Any] = {}
    for snippet in blocks(page, "python"):
        if "torch.export" not in snippet:  # tests/engines
            exec(compile(with_demo(snippet), str(page), "exec"), names)
    assert found or names


def test_pages_with_commands_are_all_run_and_commands_that_are_not_are_still_there() -> None:
    assert {page for page in DOCS.rglob("*.md") if commands(page)} <= set(PAGES)
    assert set(ELSEWHERE) <= {command for page in PAGES for command in commands(page)}


def test_snippets_of_pages_are_python() -> None:
    for page in DOCS.rglob("*.md"):
        for snippet in blocks(page, "python"):
            compile(snippet, str(page), "exec")


def test_the_example_of_a_new_method_prunes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its files stand where their first lines say, the statistic before the method that imports it."""
    for snippet in reversed(blocks(DOCS / "add_a_method.md", "python")):
        name = snippet.partition("\n")[0].removeprefix("# ").removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(snippet, name, "exec"), module.__dict__)
    base = save_base(make_tiny(), tmp_path / "base")
    tokens = tiny_tokens(4, 8)
    method = run_method(module.MeanActivation(base, 0.3), tokens, tmp_path / "run")
    model = lp.load(base)
    seen: list[torch.Tensor] = []
    down, gate, up = (getattr(model.model.layers[2].mlp, f"{part}_proj") for part in ("down", "gate", "up"))
    for linear in (down, gate):
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten(0, 1).mean(0)))
    model(input_ids=tokens)
    narrow, wide = seen  # gate runs first
    expected = (gate.weight.abs() @ narrow) + (up.weight.abs() @ narrow) + down.weight.abs().sum(0) * wide
    found = torch.from_numpy(method.scores.importance[method.scores.of(2, "mlp")])
    torch.testing.assert_close(found.float(), expected.detach())


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page() -> None:
    """The site's strict build finds broken links, but says nothing of an entry without a page."""

    def pages(entry: Any) -> list[str]:
        inside = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for one in inside for page in pages(one)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def same(shown: str, printed: str) -> bool:
    """Numbers may differ by a hundredth, as on another processor they do."""
    values = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (shown, printed)]
    return NUMBER.sub("0", shown) == NUMBER.sub("0", printed) and values[0] == pytest.approx(values[1], rel=0.01)


def is_printed(shown: str, printed: str) -> bool:
    """Every line in its order, and others between them only where the README has a line "…"."""
    rest, gap = printed.strip().splitlines(), False
    for line in shown.splitlines():
        if line == "…":
            gap = True
            continue
        place = next((index for index, other in enumerate(rest) if same(line, other)), None)
        if place is None or (place and not gap):
            return False
        rest, gap = rest[place + 1 :], False
    return gap or not rest


@pytest.mark.parametrize(
    ("shown", "right"),
    [
        ("a 1.000\nb 2\nc", True),
        ("a 1.004\nb 2\nc", True),
        ("a 1.1\nb 2\nc", False),
        ("a 1\nc", False),
        ("a 1\n…\nc", True),
        ("…\nc\n…", True),
        ("…\nd", False),
        ("a 1\nb 2", False),
    ],
)
def test_output_is_compared_line_by_line(shown: str, right: bool) -> None:
    assert is_printed(shown, "\na 1\nb 2\nc\n") is right


def with_output(page: Path) -> list[tuple[str, str]]:
    """Commands of a page, and what it shows after them."""
    pairs = pairwise(all_blocks(page))
    return [(typed, shown) for (kind, typed), (shows, shown) in pairs if (kind, shows) == ("bash", "text")]


@pytest.mark.slow
def test_commands_of_the_readme_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = with_output(README)
    assert len(pairs) == 2
    (of_wanda,) = (shown for typed, shown in with_output(DOCS / "tutorials" / "first_run.md") if "fit" in typed)
    for number, (typed, shown) in enumerate(pairs):
        program, *words = shlex.split(typed.split("&&")[-1])
        assert program == "lightning-prune"
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert is_printed(shown, printed), printed
        assert number or is_printed(of_wanda, printed), printed


@pytest.mark.slow
def test_python_of_the_readme_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert blocks(README, "pycon")
    for text in blocks(README, "pycon"):
        example = doctest.DocTestParser().get_doctest(text, {}, "README", "README.md", 0)
        failed, tried = doctest.DocTestRunner().run(example)
        assert tried
        assert not failed


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_and_named_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\((?!http)([^)#]+)", text)
    named += re.findall(r"configs/[\w.]+|docs/[\w.]+|CONTRIBUTING\.md|CHANGELOG\.md", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_page_of_the_api_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: lightning_prune\.(\w+)$", page, re.MULTILINE)) == sorted(lp.__all__)
