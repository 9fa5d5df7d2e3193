"""``python -m lightning_prune`` is the ``lightning-prune`` command."""

from lightning_prune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
