"""`python -m emrrg_cli` is `emrrg`: what `accelerate launch -m` and torchrun start."""

from __future__ import annotations

from emrrg_cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
