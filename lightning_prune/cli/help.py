"""``--help`` of the commands that Lightning parses: what a newcomer needs, on one page and without waiting for torch.

All that Lightning lists is behind ``--help-all``.
"""

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.cli.descriptions import DESCRIPTION, EXAMPLES, OWN, TRAINER
from lightning_prune.cli.signatures import Option, names_of, options_of
from lightning_prune.runs.config_files import check_file
from lightning_prune.runs.shipped_configs import described, with_config_files
from lightning_prune.support.errors import UserError

HELP = ("-h", "--help")
METHODS = "lightning_prune.methods"
BASE = "lightning_prune.methods.base.PruningMethod"
MODEL = {"test": "lightning_prune.evaluation.perplexity.Evaluation", "recover": "lightning_prune.recovery.Recovery"}
DATA = {"recover": "lightning_prune.recovery.RecoveryDataModule"}
CALIBRATION = "lightning_prune.data.datamodule.CalibrationDataModule"
LINKED = ("tokenizer",)  # follows the model
UNREAD = {
    "test": ("dataset", "num_samples", "seq_len", "batch_size", "sampling", "stride", "seed"),
    "recover": ("sampling", "stride", "eval_seq_len"),
}
WIDEST, MOST_LINES = 120, 2
BREAK = 12  # characters that a line may lose where it ends with a whole word


def help_of(command: str, argv: Sequence[str]) -> str:
    """The page for ``command``; the options of a method where ``argv`` names one, with what its configuration sets.

    Raises:
        UserError: a configuration or a method that is not there.
    """
    given = _configured(argv)
    data = [
        one for one in options_of(DATA.get(command, CALIBRATION)) if one.name not in (*LINKED, *UNREAD.get(command, ()))
    ]
    parts = [
        f"usage: lightning-prune {command} [--config NAME ...] [--model.OPTION VALUE] [--data.OPTION VALUE] "
        "[--trainer.OPTION VALUE]",
        _wrapped(DESCRIPTION[command]),
        "\n".join(f"  lightning-prune {command} {example}" for example in EXAMPLES[command]),
        *_model(command, given),
        _section("text", "data", data, given.get("data")),
        _section("trainer", "trainer", TRAINER[command], given.get("trainer")),
        _section("command", "", OWN[command], given),
        f"All other options of Lightning, and types: lightning-prune {command} --help-all"
        + ("" if command in MODEL else "; one method in full: --model.help=HGSP"),
    ]
    return "\n\n".join(parts) + "\n"


def _model(command: str, given: dict[str, Any]) -> list[str]:
    """How to choose a method, or the options of the one that is chosen."""
    model = given.get("model") or {}
    if command in MODEL:
        return [_section("model", "model", options_of(MODEL[command]), model)]
    chosen = model.get("class_path")
    if chosen is None:
        names = {name: text for name, text in described().items() if not name.endswith("_refit")}
        lines = _table([(f"--config {name}", text.removesuffix("."), "") for name, text in names.items()])
        more = "Those with a refit behind them: lightning-prune methods"
        return [
            f"method: one of these; --help behind it lists its own options\n{lines}\n  {more}",
            _section("of every method", "model", options_of(BASE), None),
        ]
    try:
        found = options_of(chosen)
    except LookupError:
        return [f"method {chosen}: --model.help={chosen} lists its options"]
    return [_section(f"method {chosen.rpartition('.')[2]}", "model", found, model.get("init_args"))]


def _configured(argv: Sequence[str]) -> dict[str, Any]:
    """What the configurations of a command line set, later ones over earlier ones, and the method it names."""
    words = with_config_files([word for word in argv if word not in HELP])
    found: dict[str, Any] = {"model": {}, "data": {}, "trainer": {}}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in ("--config", "-c") and value:
            _overlay(found, _read(Path(value).expanduser()))
        elif option in ("--model", "--model.class_path") and value:
            _overlay(found, {"model": {"class_path": _class_path(value)}})
    return found


def _read(path: Path) -> dict[str, Any]:
    check_file(path, "--config")
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config: '{path}' is no YAML ({' '.join(str(error).split())}).") from None


def _overlay(found: dict[str, Any], read: dict[str, Any]) -> None:
    for group in ("model", "data", "trainer"):
        values = read.get(group)
        if group == "model" and isinstance(values, str):
            values = {"class_path": values}
        if isinstance(values, dict):
            own = dict(values)
            if group == "model" and "class_path" in own:
                own["class_path"] = _class_path(str(own["class_path"]))
                own["init_args"] = {**found["model"].get("init_args", {}), **(own.get("init_args") or {})}
            found[group] |= own
    if "seed_everything" in read:
        found["seed_everything"] = read["seed_everything"]


def _class_path(name: str) -> str:
    """``Wanda`` is ``lightning_prune.methods.Wanda``."""
    if "." in name:
        return name
    known = names_of(METHODS)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"--model: unknown method '{name}'.{hint} Methods: {', '.join(sorted(known))}.")
    return f"{METHODS}.{name}"


def _section(title: str, group: str, options: Iterable[Option], given: Any) -> str:
    """A heading and a line or two per option; ``given`` are values that a configuration sets."""
    values = given if isinstance(given, dict) else {}
    rows = []
    for one in options:
        name = f"--{group}.{one.name}" if group else f"--{one.name}"
        default = _text(values[one.name.partition(" ")[0]]) if one.name in values else _default(one)
        rows.append((name, _beginning(one.text), f" [{default}]" if default else ""))
    return f"{title}:\n{_table(rows)}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default(option: Option) -> str:
    """The default, from the description where it depends on other things."""
    if option.default:
        return option.default
    said = re.search(r"(?:By default|Default:) (.+?)(?:;|\.?$|\. )", option.text)
    return said.group(1) if said else ""


def _beginning(text: str) -> str:
    """The first sentence, or two where the first only names a symbol."""
    first, _, rest = text.replace("``", "").partition(". ")
    if len(first) < len("T, exponent"):
        first = f"{first}. {rest.partition('. ')[0]}"
    return first.removesuffix(".").removesuffix(". ")


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Names, descriptions of at most ``MOST_LINES`` lines, and what must stand behind them in any case."""
    column = max(len(name) for name, _, _ in rows) + 4
    room = max(20, _width() - column)
    lines = []
    for name, text, behind in rows:
        wrapped = textwrap.wrap(text + behind, room)
        if len(wrapped) > MOST_LINES:
            left = max(room, MOST_LINES * room - len(behind) - BREAK)
            wrapped = textwrap.wrap(textwrap.shorten(text, left, placeholder=" …") + behind, room)
        first, *rest = wrapped
        lines += [f"  {name}".ljust(column) + first, *(" " * column + line for line in rest)]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _width())


def _width() -> int:
    return min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
