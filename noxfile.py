"""Sessions for developers: `nox` runs tests and lint, `nox -s bench` the benchmarks.

Arguments after `--` go to pytest: `nox -s tests -- tests/recipe -x`. `nox -r` uses the environments again.
"""

from __future__ import annotations

import nox

# uv ignores pip's find-links, and so takes the multi-gigabyte CUDA build of torch where a CPU wheel is at hand.
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests", "lint"]

# Nothing in the tests may reach for a model hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@nox.session
def tests(session: nox.Session) -> None:
    """Install the package as a user would, and run the tests."""
    session.install(".[dev]")
    session.run("python", "-m", "pytest", *session.posargs, env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, import layers and types; mypy reads the types of the installed dependencies."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """The README's first command, in an environment that has nothing else."""
    session.install(".")
    session.run("emrrg", "demo", *session.posargs, env=OFFLINE)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the scripts in tests/benchmarks that need no data, or `-- NAME ARGUMENTS`; each prints its own table."""
    session.install(".[dev]")
    runs = [session.posargs] if session.posargs else [[name] for name in ("encoder", "phantom", "preprocess", "scan")]
    for name, *arguments in runs:
        session.run("python", f"tests/benchmarks/{name}.py", *arguments, env=OFFLINE)
