"""Writes reports in several processes of one machine, one per GPU. They send records to the process that saves them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import torch

from emrrg_cli.console import err
from emrrg_cli.decoding.cards import PageOptions, StudyCard
from emrrg_cli.decoding.reports import load_generator
from emrrg_cli.decoding.studies import StudyFiles
from emrrg_cli.decoding.study_records import StudyResult, StudyWriter, reading_processes
from emrrg_cli.errors import EmrrgError, RunError
from emrrg_cli.recipe.finetuning import FinetuneRecipe
from emrrg_cli.signals import stop_signals
from emrrg_cli.silence_libraries import silence_libraries

_AGAIN = "Written reports are kept. Run the same command again to continue."


def write_in_processes(
    studies: Sequence[StudyFiles], processes: int, run_dir: Path, recipe: FinetuneRecipe, device: str, page: PageOptions
) -> Iterator[list[StudyResult | StudyCard]]:
    """Yields results of `processes` processes as soon as they arrive; each process has a part of the studies.

    Args:
        device: for `auto` and `cuda`, process i uses GPU i if there are GPUs.
        page: options of the page.

    Raises:
        EmrrgError: a process failed; the message is its own.
        RunError: a process was killed.
    """
    share = replace(page, studies=-(-page.studies // processes))
    on_gpus = torch.cuda.is_available() and device in ("auto", "cuda")
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        with _environment(processes):
            for index in range(processes):
                own = f"cuda:{index}" if on_gpus else device
                connection, process = _start(index, processes, run_dir, recipe, own, share)
                running[connection] = index, process
        for connection, (index, process) in running.items():
            try:
                connection.send(studies[index::processes])  # waits until the process reads: they start together
            except OSError:
                process.join()
                raise _ended(index, processes, process.exitcode) from None
        while running:
            for ready in wait(list(running)):
                connection = cast("Connection", ready)
                index, process = running[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    raise _ended(index, processes, process.exitcode) from None
                if isinstance(message, EmrrgError):
                    raise message
                if message is None:
                    del running[connection]
                    process.join()
                else:
                    yield message
    finally:
        for _, process in running.values():
            process.kill()  # it ignores SIGINT and SIGTERM
            process.join()


def _start(
    index: int, processes: int, run_dir: Path, recipe: FinetuneRecipe, device: str, page: PageOptions
) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    ours, theirs = context.Pipe()
    arguments = (theirs, index, processes, run_dir, recipe, device, page)
    process = context.Process(target=_write, args=arguments)  # not a daemon, which could not start processes that read
    process.start()
    theirs.close()  # so that this process notices its end
    return ours, process


def _write(
    connection: Connection,
    index: int,
    processes: int,
    run_dir: Path,
    recipe: FinetuneRecipe,
    device: str,
    page: PageOptions,
) -> None:
    # Runs in each process. Ctrl-C reaches it too, but the parent process decides when it ends.
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    err.quiet = index > 0  # all processes have the same warnings
    silence_libraries()
    try:
        studies = connection.recv()
        if device.startswith("cuda"):
            torch.cuda.set_device(device)  # otherwise some memory of the first GPU is also taken
        generator = load_generator(run_dir, device=device, recipe=recipe)
        writer = StudyWriter(generator, recipe, page, workers=reading_processes(generator.device, processes))
        for results in writer.write(studies):
            connection.send(results)
        connection.send(None)
    except (BrokenPipeError, EOFError):  # the parent process has ended
        os._exit(1)
    except EmrrgError as error:
        connection.send(error)
    except Exception as error:
        what = f"unexpected {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        connection.send(EmrrgError(what, hint="Run again with --num-processes 1 --debug for the traceback."))


def _ended(index: int, processes: int, code: int | None) -> RunError:
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
    return RunError(f"process {index + 1} of {processes} ended {how}", hint=_AGAIN)


@contextmanager
def _environment(processes: int) -> Iterator[None]:
    # Processes share the cores. Signals are blocked until the processes can ignore them.
    from joblib import cpu_count

    chosen = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = chosen or str(max(1, cpu_count() // processes))
    masks = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals()) if masks else set()
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if chosen is None:
            del os.environ["OMP_NUM_THREADS"]
