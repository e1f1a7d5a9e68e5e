"""PTX run on a CPU: what Triton's compiler makes of a kernel for a GPU that is not there, in its own words."""

from .machine import inline, launch
from .memory import Fault
from .source import read

__all__ = ["Fault", "inline", "launch", "read"]
