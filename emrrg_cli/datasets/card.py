"""The dataset card: a README whose header tells `datasets` which files make which split."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.manifest import MANIFEST

CARD = "README.md"

# What Markdown and tables in it take as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~-])")


def card(manifest: dict[str, Any], columns: Mapping[str, Column], about: str | None) -> str:
    """The dataset card. Its YAML header tells `datasets` which files make which split.

    `load_dataset(directory)` keys its Arrow copy by the directory's last name and this header alone: without the
    fingerprint, two directories of the same name, or one that was overwritten, would show the rows of the first.
    """
    counts: dict[str, dict[str, int]] = manifest["splits"]
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in counts)
    extra = "".join(f"\n| `{name}` | {column.content} |" for name, column in columns.items())
    table = "\n".join(f"| {split} | {count['studies']:,} | {count['images']:,} |" for split, count in counts.items())
    return f"""---
configs:
- config_name: default
  description: fingerprint {manifest["fingerprint"]}
  data_files:
{files}
---

# Chest X-ray studies with reports ({_plain(str(manifest.get("source", "unknown source")))})

Written by `emrrg preprocess`; `{MANIFEST}` says from what, with which options, and what was left out.

```python
from datasets import load_dataset

studies = load_dataset("path/to/this/directory")
```

| split | studies | images |
|---|---|---|
{table}

| column | content |
|---|---|
| `study_id`, `patient_id` | as in the source; `patient_id` is null where it has none |
| `images` | the views of the study, 8-bit grey |
| `views` | projection of each image, `unknown` where the source does not say |
| `findings`, `impression`, `report` | raw text, null where absent; cleaned when read, by the recipe's rule |
| `source` | data set |{extra}

{about or "The terms of the source apply to these images and reports."}
"""


def _plain(text: str) -> str:
    """Text of others as Markdown shows it: no markup, no HTML, one line."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(text), quote=False))
