"""A run of an experiment that failed, as reports list it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A run of the experiment that ended in an error."""

    label: str
    requested: float
    message: str
