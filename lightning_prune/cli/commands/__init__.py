"""One module per command, with ``main(argv)``."""
