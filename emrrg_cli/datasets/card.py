"""The dataset card: a README whose header tells `datasets` which files belong to which split."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from emrrg_cli.console import printable
from emrrg_cli.datasets.directory import Column
from emrrg_cli.datasets.manifest import MANIFEST

CARD = "README.md"

# Characters that Markdown and its tables use as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~-])")


def card(manifest: dict[str, Any], columns: Mapping[str, Column], about: str | None) -> str:
    """Writes the dataset card. Its YAML header tells `datasets` which files belong to which split.

    `load_dataset(directory)` names its Arrow copy only by the directory's last name and this header. Without the
    fingerprint, a second directory of the same name, or an overwritten one, would show the rows of the first.
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

Written by `emrrg preprocess`; `{MANIFEST}` lists the source, the options and the skipped items.

```python
from datasets import load_dataset

studies = load_dataset("path/to/this/directory")
```

| split | studies | images |
|---|---|---|
{table}

| column | content |
|---|---|
| `study_id`, `patient_id` | as in the source; `patient_id` is null if unknown |
| `images` | the views of the study, 8-bit grey |
| `views` | projection of each image, or `unknown` |
| `findings`, `impression`, `report` | raw text, null if absent; cleaned when read, by the recipe's rule |
| `source` | data set |{extra}

{about or "The terms of the source apply to these images and reports."}
"""


def _plain(text: str) -> str:
    """Makes foreign text safe for Markdown: no markup, no HTML, one line."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(text), quote=False))
