"""Reads published checkpoints of MambaXray-VL and EMRRG into our formats and writes them back."""
