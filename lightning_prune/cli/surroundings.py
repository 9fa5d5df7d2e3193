"""What a process finds around it, looked at before libraries are imported that would stumble over it."""

import os
from collections.abc import Mapping, MutableMapping

from lightning_prune.support.errors import UserError

# Lightning reads them as numbers, some when it is imported.
NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
SCHEDULER = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")

# How many compiled matrix products oneDNN and torch's own layer above it keep. Both keep 1024, one for every shape they
# met, and layers of a pruned model differ in shape: 5 MB a layer that are never used again.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def keep_few_kernels(environment: MutableMapping[str, str]) -> None:
    """Let the libraries forget compiled kernels of layers that are done; what is set already stays."""
    for name, value in KERNEL_CACHES.items():
        environment.setdefault(name, value)


def check_surroundings(environment: Mapping[str, str]) -> None:
    """Refuse a working folder that is gone, and a launcher's variables that are no numbers.

    Raises:
        UserError: one of them.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the working folder cannot be used ({error.strerror}). Change to one that exists.") from None
    for name in (*NUMBERS, *SCHEDULER):
        value = environment.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise UserError(
                f"the environment variable {name} is {value!r}; a launcher sets it to a whole number, 0 or more. "
                f"Unset it: unset {name}"
            )
