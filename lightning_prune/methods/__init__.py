"""One file per pruning method; importing the package makes their names known to the command line."""

from lightning_prune.methods.flap import FLAP
from lightning_prune.methods.heapr import HEAPr
from lightning_prune.methods.hgsp import HGSP
from lightning_prune.methods.magnitude import Magnitude
from lightning_prune.methods.reap import REAP
from lightning_prune.methods.shortgpt import ShortGPT
from lightning_prune.methods.slimgpt import SlimGPT
from lightning_prune.methods.wanda import Wanda

__all__ = ["FLAP", "HGSP", "REAP", "HEAPr", "Magnitude", "ShortGPT", "SlimGPT", "Wanda"]
