"""Names inside a run folder that several rooms read or write."""

PRUNED = "pruned"  # the checkpoint
LAYER_RESULTS = "layer_results"  # what an unfinished run has measured, layer by layer
TRAINING = "training"  # states of a recovery that is under way
