"""`emrrg preprocess SOURCE ROOT OUT`: writes raw data or synthetic studies to a dataset directory.

Each source has its own file.
"""

from __future__ import annotations

import typer

from emrrg_cli.commands.preprocess.chexpert_plus import chexpert_plus
from emrrg_cli.commands.preprocess.combined import combined
from emrrg_cli.commands.preprocess.common import with_options
from emrrg_cli.commands.preprocess.folder import folder
from emrrg_cli.commands.preprocess.iu_xray import iu_xray
from emrrg_cli.commands.preprocess.mimic_cxr import mimic_cxr
from emrrg_cli.commands.preprocess.phantom import phantom
from emrrg_cli.commands.preprocess.r2gen import r2gen

app = typer.Typer(help="Turn raw data into a dataset directory.", no_args_is_help=True)


@app.callback()
def preprocess() -> None:
    """Turn raw data into a dataset directory."""


app.command("r2gen", no_args_is_help=True)(with_options(r2gen))
app.command("folder", no_args_is_help=True)(with_options(folder))
app.command("iu_xray", no_args_is_help=True)(with_options(iu_xray))
app.command("mimic_cxr", no_args_is_help=True)(with_options(mimic_cxr))
app.command("chexpert_plus", no_args_is_help=True)(with_options(chexpert_plus))
app.command("combined", no_args_is_help=True)(with_options(combined))
app.command("phantom", no_args_is_help=True)(with_options(phantom))
