"""The append-only record of a run: JSON lines, each on the disk before what follows from it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..storage.concurrency import InUse, flock
from ..storage.files import DataError, sync_folder


class Ledger:
    """Keeps what a run has done so far, and notes what it does.

    A process killed while it writes leaves a torn last line, which is cut off when the file is opened again: what it spoke of
    is done again. Nothing else is ever removed or changed.

    Attributes:
        records: every line so far, in order.

    Raises:
        DataError: a line before the last is damaged. ValueError: another process has the ledger open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b")
        if not flock(self._file.fileno()):
            self._file.close()
            raise InUse(f"{path} is in use: another process works on this run; give it its own --shard")
        sync_folder(path.parent)
        try:
            self.records = self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        *lines, tail = self._file.read().split(b"\n")
        if tail:
            self._file.truncate(sum(len(line) + 1 for line in lines))
            os.fsync(self._file.fileno())
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("no JSON object")
            except ValueError as error:
                raise DataError(f"{self.path}:{number} is damaged: {error}") from None
            records.append(record)
        return records

    def append(self, record: dict[str, Any]) -> None:
        """One line, on the disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        self._file.close()
