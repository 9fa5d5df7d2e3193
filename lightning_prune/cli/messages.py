"""jsonargparse's errors in one plain sentence: what was found, what is allowed, which option to change."""

import difflib
import re
from collections.abc import Sequence

from lightning_prune.runs.shipped_configs import shipped_names

GROUPS = ("model", "data", "trainer")


def plain(message: str, options: Sequence[str], methods: Sequence[str]) -> str:
    """Rewrite a parser error.

    Args:
        message: jsonargparse's, with its line breaks and its nested lists of everything that was tried.
        options: every option name without dashes, the methods' as ``model.<name>``.
        methods: class names of the methods.
    """
    key = ".".join(name for name in re.findall(r'Parser key "([\w.]+)"', message) if name != "config")
    unknown = re.search(r"Option '([\w.]+)' is not accepted", message)
    if unknown is not None:
        name = unknown.group(1) if key == "" or unknown.group(1).startswith(key) else f"{key}.{unknown.group(1)}"
        return f"unknown option --{name}.{_nearest(name, options)}"
    linked = re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message)
    if linked is not None:
        return f"--{linked[1]}: it follows --{linked[2].replace('init_args.', '')}. Leave it out."
    grouped = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if grouped is not None:
        name = ".".join(grouped.groups())
        return f"unknown option --{name}.{_nearest(name, options)}"
    unrecognized = re.search(r"unrecognized arguments: (\S+)", message)
    if unrecognized is not None:
        name = unrecognized.group(1).partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument '{name}': options are written --NAME VALUE. See --help."
        return f"unknown option {name}.{_nearest(name.lstrip('-'), options)}"
    if key.partition(".")[0] not in ("", "model"):
        return _value(key, message) or _fallback(message)
    known = f"Methods: {', '.join(sorted(methods))}."
    no_class = ("Not a valid subclass", "unhashable type", "does not correspond to a subclass")
    if (
        "required: model" in message
        or any(words in message for words in no_class)
        or "import path" in message
        or "has no attribute" in message
        or "No module named" in message
    ):
        found = re.search(r"(?:dot import path string: |given class_path '|Import path )([\w.]+)", message)
        start = f"--model: unknown method '{found.group(1)}'." if found else "--model: no method is chosen."
        return f"{start} {known} Shipped configurations go by name: --config wanda"
    missing = re.search(r"File does not exist: '?([^'\n]+)'?", message)
    if missing is not None:
        names = ", ".join(shipped_names())
        return f"--config: no file at '{missing.group(1)}'. Shipped configurations go by name: {names}."
    return _value(key, message) or _fallback(message)


def unusable_value(message: str) -> str:
    """Rewrite an error that the parser raises outside of parsing, where it does not say which option it means."""
    given = re.search(r"Given value: (.+)", message)  # the innermost comes first
    found = given.group(1) if given else message.strip().partition("\n")[0]
    return f"an option's value cannot be used: {found[:200]}. See --help for the options and what they take."


def _value(key: str, message: str) -> str | None:
    """What was found and what is allowed, where the message says both."""
    allowed = _allowed(message)
    value = re.search(
        r"(?:Got value|Given value):[ ]?(?:NestedArg\(key='[\w.]+', val=)?(.*?)\)?$", message, re.MULTILINE
    )
    if not (key and allowed and value is not None):
        return None
    needed = re.search(r"given class_path '([\w.]+)':\s+the following arguments are required: ([\w, ]+)", message)
    if needed is not None:
        return f"--{key}: {needed.group(1)} needs {needed.group(2)}: give them as {{class_path: …, init_args: {{…}}}}."
    found = value.group(1)
    return f"--{key}: found {found[:200] or 'nothing'}; allowed: {allowed}."


def _fallback(message: str) -> str:
    """All that the parser said, in one line."""
    return re.sub(r"\s+", " ", re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)).strip()


def _nearest(name: str, options: Sequence[str]) -> str:
    """The option that was probably meant: of the same group, or of that name in another group."""
    candidates = [option for option in options if option not in GROUPS]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    if not close:
        last = {option.rpartition(".")[2]: option for option in candidates}
        close = [last[found] for found in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.8)]
    return f" Did you mean --{close[0]}?" if close else " See --help for the options."


def _allowed(message: str) -> str:
    """What jsonargparse tried, as a list: types by name, literals by value."""
    found: list[str] = []
    for expected in re.findall(r"Expected a (.+?)(?:\. Got value|$)", message, re.MULTILINE):
        if expected.startswith(("path but", "dot import path")):
            if expected.startswith("dot"):
                found.append("the name of a class")
        elif expected.startswith("typing.Literal"):
            found += [part.strip(" '") for part in expected.removeprefix("typing.Literal")[1:-1].split(",")]
        else:
            found.append(re.sub(r"<class '([\w.]+)'>", r"\1", expected))
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true, false",
        "str": "text",
        "list": "a list such as '[a, b]'",
        "collections.abc.Iterable": "a list",
    }
    return ", ".join(dict.fromkeys(names.get(item, item) for item in found if item != "NoneType"))
