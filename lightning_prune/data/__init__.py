"""Text to token ids: corpora, tokenisation, sampling and the datamodule every method calibrates through."""
