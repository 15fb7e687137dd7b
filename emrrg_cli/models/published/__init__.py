"""Published checkpoints of MambaXray-VL and EMRRG: read into our formats, and written back."""
