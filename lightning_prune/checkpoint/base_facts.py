"""What a base model's own files say about its licence and its home on the hub, for the card of the pruned one."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import cached_file

from lightning_prune.models.loading import resolve
from lightning_prune.support.errors import UserError
from lightning_prune.support.escape import is_hub_id, plain

LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
LONGEST = 2**18  # bytes read of any file; front matter and a licence's title stand at the beginning


def base_facts(pretrained: str) -> dict[str, Any]:
    """Front matter for a model derived from ``pretrained``: ``license`` (with ``license_name`` and ``license_link``)
    and ``base_model``, each only where the model's files say it. Nothing is downloaded or guessed.

    Args:
        pretrained: a folder, a hub id (its cached files are read) or ``demo``. One that is not there says nothing.
    """
    if pretrained == "demo":
        return {"license": "apache-2.0"}  # as this package
    card, config = _front_matter(_read(pretrained, "README.md")), _json(_read(pretrained, "config.json"))
    home = _home(pretrained, card, config)
    facts: dict[str, Any] = {}
    found = _license(card.get("license")) or _license(config.get("license")) or _license_of_file(pretrained)
    if found:
        facts["license"] = found
        if isinstance(card.get("license_name"), str):
            facts["license_name"] = plain(card["license_name"])
        link = card.get("license_link")
        if isinstance(link, str) and re.fullmatch(r"https?://\S+", link):
            facts["license_link"] = plain(link)
        elif isinstance(link, str) and isinstance(home, str) and re.fullmatch(r"[\w.-]+", link):
            facts["license_link"] = f"https://huggingface.co/{home}/blob/main/{link}"
    if home:
        facts["base_model"] = home
    return facts


def _home(pretrained: str, card: dict[str, Any], config: dict[str, Any]) -> str | list[str] | None:
    """The hub id; of a local folder the one it was made from, where its config or card names one."""
    if is_hub_id(pretrained):
        return pretrained
    name, listed = config.get("_name_or_path"), card.get("base_model")
    if isinstance(name, str) and is_hub_id(name):
        return name
    found = [item for item in (listed if isinstance(listed, list) else [listed]) if isinstance(item, str)]
    found = [item for item in found if is_hub_id(item)]
    return found[0] if len(found) == 1 else found or None


def _license(value: Any) -> str | list[str] | None:
    """An identifier or a list of them, as the hub takes it."""
    if isinstance(value, list):
        found = [item for item in map(_license, value) if isinstance(item, str)]
        return found if found and len(found) == len(value) else None
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w.+-]*", value, re.ASCII) else None


def _license_of_file(pretrained: str) -> str | None:
    """Of the two licences that name themselves on their first lines."""
    text = next((text for name in LICENSE_FILES if (text := _read(pretrained, name))), "")
    head = " ".join(text[:200].split())
    if re.match(r"Apache License,? Version 2\.0", head):
        return "apache-2.0"
    return "mit" if re.match(r"(The )?MIT License", head) else None


def _read(pretrained: str, name: str) -> str:
    """The beginning of a file of the model; empty where there is none."""
    try:
        path = resolve(pretrained)
        found: str | Path | None = Path(path) / name
        if is_hub_id(path):
            found = cached_file(
                path,
                name,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        if found is None or not Path(found).is_file():
            return ""
        with Path(found).open("rb") as file:
            return file.read(LONGEST).decode("utf-8", errors="replace")
    except (UserError, OSError, ValueError):
        return ""


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, flags=re.DOTALL)
    try:
        read = yaml.safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _json(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}
