"""What a base model's own files say about its licence and its home on the hub, for the card of the pruned one."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from lightning_prune.support.escape import hub_id_of, is_hub_id, plain

LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
LONGEST = 2**18  # bytes read of any file; front matter and a licence's title are at its beginning


def base_facts(pretrained: str, path: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Front matter for a model derived from ``pretrained``, whose files are at ``path`` (a folder, or a hub id whose
    cached files are read), with ``config.json`` as ``config`` where it is open: ``license``, with ``license_name`` and
    ``license_link``, and ``base_model``, each only where the files say it. Nothing is downloaded or guessed."""
    if pretrained == "demo":
        return {"license": "apache-2.0"}  # as this package
    if config is None:
        try:
            content = json.loads(_read(path, "config.json"))
        except (ValueError, RecursionError):
            content = None
        config = content if isinstance(content, dict) else {}
    text, card = _read(path, "README.md"), {}
    try:
        if text.lstrip().startswith("---"):  # without front matter ModelCard warns
            card = ModelCard(text, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    home = _home(pretrained, card, config)
    license = _license(card.get("license")) or _license(config.get("license")) or _license_of_file(path)
    name, link = card.get("license_name"), card.get("license_link")
    if isinstance(link, str) and isinstance(home, str) and re.fullmatch(r"[\w.-]+", link):
        link = f"https://huggingface.co/{home}/blob/main/{link}"
    facts: dict[str, Any] = {"license": license, "base_model": home}
    if license:
        facts["license_name"] = plain(name) if isinstance(name, str) else None
        facts["license_link"] = plain(link) if isinstance(link, str) and re.fullmatch(r"https?://\S+", link) else None
    return {key: value for key, value in facts.items() if value}


def history(path: str) -> str:
    """Earlier steps of a checkpoint that this package wrote, from its card: the first base model, every method,
    recoveries. Empty for a dense model."""
    card = _read(path, "README.md")
    cells: dict[str, str] = dict(re.findall(r"^\| (Base model|Before|Method) \| (.+) \|$", card, re.MULTILINE))
    if "lightning-prune" not in card or not {"Base model", "Method"} <= cells.keys():
        return ""
    steps = [cells.get("Before", cells["Base model"]), cells["Method"]]
    return re.sub(r"[`\\]", "", " → ".join([*steps, "recovered"] if "\n## Recovery\n" in card else steps))


def _home(pretrained: str, card: dict[str, Any], config: dict[str, Any]) -> str | list[str] | None:
    """The hub id; of a local folder the one it was made from, where its config or card names one."""
    for name in (pretrained, config.get("_name_or_path")):
        if isinstance(name, str) and (hub_id := hub_id_of(name)):
            return hub_id
    listed = card.get("base_model")
    listed = listed if isinstance(listed, list) else [listed]
    names = [name for name in listed if isinstance(name, str) and is_hub_id(name)]
    return names[0] if len(names) == 1 else names or None


def _license(value: Any) -> str | list[str] | None:
    """An identifier or a list of them, as the hub takes it."""
    if isinstance(value, list):
        names = [item for item in map(_license, value) if isinstance(item, str)]
        return names if names and len(names) == len(value) else None
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", value, re.ASCII) else None


def _license_of_file(path: str) -> str | None:
    """Identifier of a licence file, for the two licences that name themselves on their first lines."""
    text = next((text for name in LICENSE_FILES if (text := _read(path, name))), "")
    head = " ".join(text[:200].split())
    if re.match(r"Apache License,? Version 2\.0", head):
        return "apache-2.0"
    return "mit" if re.match(r"(The )?MIT License", head) else None


def _read(path: str, name: str) -> str:
    """The beginning of a file of the model, of a hub model in the cache; empty where there is none."""
    try:
        file: Any = try_to_load_from_cache(path, name) if is_hub_id(path) else Path(path) / name
        if not isinstance(file, str | Path) or not Path(file).is_file():
            return ""
        with Path(file).open("rb") as stream:
            return stream.read(LONGEST).decode("utf-8", errors="replace").removeprefix("\ufeff")
    except (OSError, ValueError):
        return ""
