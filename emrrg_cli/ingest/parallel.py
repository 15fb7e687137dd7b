"""Prepares studies in worker processes through joblib. Results keep their order, and only a few are in memory."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import joblib
from joblib.parallel import get_active_backend

from emrrg_cli.errors import RunError, UsageError
from emrrg_cli.ingest.prepare import PreparedImages, prepare_studies
from emrrg_cli.ingest.study import Study
from emrrg_cli.recipe.preprocessing import PreprocessRecipe

DEFAULT_BACKEND = "loky"

# joblib returns results in order but continues dispatching while they wait. Blocks limit the number of studies in
# memory. Two blocks run at a time: the workers continue with the second while the first is written.
_TASKS_PER_WORKER = 8
_BLOCKS = 2
# A task has as many studies as take about this long, which is much longer than their transfer between processes.
_SECONDS_PER_TASK = 0.1
_MAX_STUDIES_PER_TASK = 32

_LOKY_THREAD = "ExecutorManagerThread"


@dataclass(frozen=True)
class Pool:
    """A pool of workers. `options` are passed to joblib's backend."""

    backend: str
    workers: int
    options: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def open_pool(backend: str | None, workers: int | None, studies: int, scheduler: str | None = None) -> Iterator[Pool]:
    """Opens the pool of processes for a run.

    Args:
        backend: Name of a joblib backend; None: processes on this machine (loky).
        workers: Largest number of workers; None: one per core, or all workers of a Dask cluster.
        studies: Number of studies to prepare. A process takes about half a second to start, so without `backend`, a
            few studies are prepared in this process.
        scheduler: Address of a Dask scheduler, such as `tcp://10.0.0.1:8786`. None: the Dask client open in this
            process, or else a new cluster of `workers` processes on this machine for this run.

    Raises:
        UsageError: The backend does not exist, or a scheduler is given for a backend other than Dask.
        RunError: The scheduler cannot be reached.
    """
    if scheduler is not None and backend not in (None, "dask"):
        raise UsageError(f"--scheduler is for --backend dask, not {backend}")
    if backend == "dask" or scheduler is not None:
        with _dask_client(scheduler, workers) as client:
            threads = sum(client.nthreads().values()) or 1
            yield Pool("dask", min(threads, workers or threads), {"client": client})
        return
    if backend == "multiprocessing":
        raise UsageError(
            "--backend multiprocessing forks a process that has threads, which can deadlock",
            hint="Use loky, which starts new processes.",
        )
    try:
        with joblib.parallel_config(backend or DEFAULT_BACKEND):
            pass
    except ValueError:
        raise UsageError(
            f"no joblib backend is named {backend!r}",
            hint="Choose loky, threading, sequential, dask, or a backend registered with joblib.",
        ) from None
    cores = workers or joblib.cpu_count()
    yield Pool(backend or DEFAULT_BACKEND, cores if backend else max(1, min(cores, studies // 32)))


def prepare_all(
    studies: Iterator[Study], root: Path | None, recipe: PreprocessRecipe, pool: Pool
) -> Iterator[tuple[Study, PreparedImages]]:
    """Yields every study with its prepared images, in order.

    Raises:
        RunError: A worker process died.
    """
    under_way: deque[tuple[list[Study], Any]] = deque()
    size = 1
    hook = threading.excepthook

    def ignore_loky(args: threading.ExceptHookArgs) -> None:
        """Hides the traceback of a KeyError that cancelled work may leave in loky's own thread."""
        if args.thread is None or args.thread.name != _LOKY_THREAD:
            hook(args)

    threading.excepthook = ignore_loky
    try:
        while True:
            while len(under_way) < _BLOCKS and (
                block := list(islice(studies, pool.workers * _TASKS_PER_WORKER * size))
            ):
                under_way.append((block, _start(block, size, root, recipe, pool)))
            if not under_way:
                return
            block, results = under_way[0]
            waiting, seconds = iter(block), 0.0
            for prepared, took in results:
                seconds += took
                for images in prepared:
                    yield next(waiting), images
            under_way.popleft()
            size = max(1, min(_MAX_STUDIES_PER_TASK, round(_SECONDS_PER_TASK * len(block) / max(seconds, 1e-6))))
    except Exception as error:
        if not isinstance(error, BrokenProcessPool) and type(error).__name__ != "KilledWorker":
            raise
        raise RunError(
            "the system ended a decoding process, most often because memory ran out",
            hint="Use fewer processes (--workers 1) or a lower max_pixels; the same command continues from here.",
        ) from None
    finally:
        if under_way:
            _give_up([results for _, results in under_way])
        threading.excepthook = hook


def _give_up(blocks: list[Any]) -> None:
    """Stop running work without joblib's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for results in blocks:
            if isinstance(results, Generator):
                results.close()
    for thread in threading.enumerate():
        if thread.name == _LOKY_THREAD:
            thread.join(timeout=5)


def _start(block: list[Study], size: int, root: Path | None, recipe: PreprocessRecipe, pool: Pool) -> Any:
    """Start the work on a block. Returns an iterator over its results, in order."""
    task = joblib.delayed(prepare_studies)
    with joblib.parallel_config(pool.backend, **pool.options):
        # Some backends return all results at once; the blocks then run one after the other.
        lazy = getattr(get_active_backend()[0], "supports_return_generator", False)
        parallel = joblib.Parallel(
            n_jobs=pool.workers,
            return_as="generator" if lazy else "list",
            batch_size=1,
            pre_dispatch="all",
        )
        return iter(parallel(task(block[start : start + size], root, recipe) for start in range(0, len(block), size)))


@contextlib.contextmanager
def _dask_client(scheduler: str | None, workers: int | None) -> Iterator[Any]:
    try:
        import distributed
    except ImportError:
        raise UsageError(
            "--backend dask needs the package distributed, which is not installed",
            hint="Install it: pip install 'emrrg[dask]'",
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            client = None if scheduler else _open_client(distributed)
            if client is None and scheduler is None:
                cluster = distributed.LocalCluster(
                    n_workers=workers or joblib.cpu_count(), threads_per_worker=1, dashboard_address=None
                )
                stack.enter_context(cluster)
            if client is None:
                client = distributed.Client(scheduler or cluster, set_as_default=False, timeout="10s")
                stack.enter_context(client)
        except (OSError, ValueError) as error:
            where = f"no Dask scheduler answers at {scheduler}" if scheduler else "no Dask cluster could be started"
            raise RunError(f"{where}: {error}", hint="Give the address that `dask scheduler` prints.") from None
        yield client


def _open_client(distributed: Any) -> Any:
    try:
        return distributed.get_client()
    except ValueError:  # no client is open
        return None
