"""What a process finds around it, looked at before libraries are imported that would stumble over it."""

import os
from collections.abc import Mapping

from lightning_prune.errors import UserError

# Lightning reads them as numbers, some when it is imported.
NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
SCHEDULER = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS")


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
