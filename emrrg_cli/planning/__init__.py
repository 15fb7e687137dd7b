"""Predicts the parameters, memory, time and disk space of a recipe on this machine."""

from emrrg_cli.planning.prediction import plan
from emrrg_cli.planning.result import Plan

__all__ = ["Plan", "plan"]
