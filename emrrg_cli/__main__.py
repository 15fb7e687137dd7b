"""`python -m emrrg_cli` runs `emrrg`; `accelerate launch -m` and torchrun start it this way."""

from __future__ import annotations

from emrrg_cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
