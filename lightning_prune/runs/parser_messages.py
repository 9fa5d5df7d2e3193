"""jsonargparse's errors in one sentence: what was found, what is allowed, which option to change."""

import difflib
import re
from collections.abc import Sequence

_UNKNOWN = r"unrecognized arguments: (\S+)|Group '([\w.]+)' does not accept option '([\w.]+)'|Option '([\w.]+)' is not"
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true, false", "str": "text", "list": "a list"}


def plain(message: str, options: Sequence[str], methods: Sequence[str]) -> str:
    """Rewrite a parser error, which has line breaks and nested lists of everything that was tried.

    ``options`` are all names without dashes, the methods' as ``model.<name>``; ``methods`` are class names.
    """
    keys = [name for name in re.findall(r'Parser key "([\w.]+)"', message) if name != "config"]
    key = keys[-1] if keys else ""
    if key not in options and f"model.{key}" in options:
        key = f"model.{key}"  # an error of the method's own parser
    if unknown := re.search(_UNKNOWN, message):
        word, group, member, option = unknown.groups()
        name = word.partition("=")[0] if word else f"--{group}.{member}" if group else f"--{option}"
        if not name.startswith("-"):
            return f"unexpected argument '{name}': options are written --NAME VALUE. See --help."
        return f"unknown option {name}.{_nearest(name.lstrip('-'), options)}"
    if linked := re.search(r'Linked "([\w.]+)" must be given via "([\w.]+)"', message):
        return f"--{linked[1]}: it follows --{linked[2].replace('init_args.', '')}. Leave it out."
    found = re.search(r"(?:Given|Got) value: (?:NestedArg\(key='[\w.]+', val=)?(.*?)\)?$", message, re.MULTILINE)
    if "required: model" in message or key == "model":
        value = re.sub(r"^\{'class_path': '?([^',}]*).*", r"\1", found[1]) if found else ""
        start = f"unknown method '{value[:200]}'" if value else "no method is chosen"
        return f"--model: {start}. Methods: {', '.join(methods)}; or by configuration: --config wanda."
    if key and (needed := re.search(r"arguments are required: ([\w, ]+)", message)):
        return f"--{key}: {needed[1]} must be given too, as {{class_path: …, init_args: {{…}}}}."
    allowed: list[str] = []
    for kind, literals in re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", message):
        allowed += [one.strip(" '") for one in literals.split(",")] if literals else [_WORDS.get(kind, kind)]
    allowed = [one for one in dict.fromkeys(allowed) if one != "NoneType"]
    if key and found and allowed:
        return f"--{key}: found {found[1][:200] or 'nothing'}; allowed: {', '.join(allowed)}."
    if refused := re.search(r"Not of type \w+: (\S+) does not conform to restriction v(.+)", message):
        return f"--{key}: found '{refused[1]}'; allowed: a number {refused[2]}."
    lines = " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    return re.sub(r'Parser key "([\w.]+)":', r"--\1:", lines)[:500]


def _nearest(name: str, options: Sequence[str]) -> str:
    """The option that was probably meant: of the same group, or of that name in another group."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    if not close:
        last = {option.rpartition(".")[2]: option for option in options}
        close = [last[found] for found in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.8)]
    return f" Did you mean --{close[0]}?" if close else " See --help for the options."
