"""``Checkpoint``, calibration set and passes → one ``LayerResult`` per layer."""
