"""What a source must remember of every study: in a database on the disk, so that memory does not grow with them."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from emrrg_cli.errors import RunError
from emrrg_cli.ingest.study import Account
from emrrg_cli.vocabulary import SPLITS, Split

_CACHE_KIB = 8 * 1024


def scratch_database() -> sqlite3.Connection:
    """An empty database, for one iteration at a time.

    It holds 8 MiB in memory; what exceeds them goes to a file without a name in the folder for temporary files
    (`SQLITE_TMPDIR` or `TMPDIR`), which is gone when the process ends, however it ends.
    """
    # A worker pool may pull studies from a thread of its own, one at a time.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
        database.execute(f"PRAGMA {setting}")
    return database


@contextlib.contextmanager
def scratch_errors() -> Iterator[None]:
    """Says what to do when the disk under a scratch database fails.

    Raises:
        RunError: SQLite could not write or read.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise RunError(
            f"the temporary database failed: {error}", hint="Set TMPDIR to a folder on a disk with room."
        ) from None


class SeenIds:
    """The ids that were met so far, each with its split."""

    def __init__(self) -> None:
        self._database = scratch_database()
        self._database.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, split INTEGER) WITHOUT ROWID")

    def add(self, study_id: str, split: Split) -> Split | None:
        """Remembers an id; the split it was met in before, or None."""
        with scratch_errors():
            row = (study_id, SPLITS.index(split))
            if self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", row).rowcount:
                return None
            before: int = self._database.execute("SELECT split FROM seen WHERE id = ?", (study_id,)).fetchone()[0]
        return SPLITS[before]

    def skip(self, study_id: str, split: Split, account: Account) -> bool:
        """Whether the id was met before, which is then counted in `account`: the first is kept.

        Otherwise a study would be trained on twice, or trained on and tested on.
        """
        before = self.add(study_id, split)
        if before is not None:
            account.skip_study("id seen before", study_id, detail=f"in {split}, kept from {before}")
        return before is not None
