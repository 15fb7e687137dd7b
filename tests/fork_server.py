"""Runs Python code in forks of this process, which has imported what takes seconds, or the modules of its arguments.

Each line of standard input is a JSON list of processes that run at the same time: `code`, `arguments`, `environment`,
`stdout` and `stderr` (files). The answer is a line with the JSON list of their return codes. No process waits for the
disk or draws pictures.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

TIMEOUT = 900  # seconds; on a busy machine a start takes minutes
IMPORTED = (
    "emrrg_cli.app",
    "emrrg_cli.decoding.processes",
    "emrrg_cli.evaluation.run",
    "emrrg_cli.reporting.evaluation_page",
    "emrrg_cli.training.align",
    "emrrg_cli.training.finetune",
    "emrrg_cli.training.pretrain",
    # What these import when it is first needed.
    "emrrg_cli.models.scan.numba_kernels",
    "matplotlib.backends.backend_agg",
    "peft",
    "pycocoevalcap.cider.cider",
    "torch._dynamo",
    "torch.distributed.run",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
DRAWING = (("emrrg_cli.training.run_setup", "plot_curves"), ("emrrg_cli.training.pretrain", "draw_predictions"))


def no_picture(*arguments: Any, **more: Any) -> None:
    path = Path(more.get("path", arguments[-1]))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a picture")


def run(process: dict[str, Any]) -> None:
    signal.alarm(TIMEOUT)  # ends the process
    os.environ.clear()
    os.environ.update(process["environment"])
    for number, name in ((0, os.devnull), (1, process["stdout"]), (2, process["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv[1:] = process["arguments"]
    exec(compile(process["code"], "<fork>", "exec"), {"__name__": "__main__"})


def main() -> None:
    for name in sys.argv[1:] or IMPORTED:
        import_module(name)
    for module, function in DRAWING:
        if module in sys.modules:
            setattr(sys.modules[module], function, no_picture)
    if figure := sys.modules.get("matplotlib.figure"):
        figure.Figure.savefig = lambda figure, file, **options: file.write(b"a plot")
    os.fsync = lambda file: None
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries report leaks
    while line := sys.stdin.readline():
        children = []
        for process in json.loads(line):
            child = os.fork()
            if child == 0:
                return run(process)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    return None


if __name__ == "__main__":
    main()
