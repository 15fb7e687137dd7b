"""What a recipe will need on this machine: parameters, memory, time, disk."""

from emrrg_cli.planning.prediction import plan
from emrrg_cli.planning.result import Plan

__all__ = ["Plan", "plan"]
