"""Bad samples of a run: each named once, with file and reason, and a limit past which everything stops.

The list is the same on every rank and the same for any number of ranks and workers, because a sample is counted at the step that was to
use it, not when some worker came across it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_collab.data.conversation import SampleError

logger = logging.getLogger(__name__)
TOLD = 10  # skips that are told one by one


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the limit allows; the message holds the table of reasons."""


@dataclass(frozen=True)
class Skip:
    """A bad sample: its place in the data, its id, the file to blame (its picture, or the data file), why."""

    index: int
    id: str
    file: str
    reason: str
    message: str

    @classmethod
    def of(cls, index: int, sample_id: str, file: str, error: SampleError) -> Skip:
        """`file` is the data file; the error may know a picture."""
        return cls(index, sample_id, error.file or file, error.reason, error.message)


class SkipList:
    """The bad samples among `samples` ones. The limit is `max_bad_fraction` of them; small sets may lose up to a tenth, at most five; 0
    means none at all.

    `path`: a JSONL file that lists them as they are found, with the step (0: before the first). `quiet`: another process does the telling.
    """

    def __init__(self, samples: int, max_bad_fraction: float = 0.01, path: Path | None = None, quiet: bool = False) -> None:
        self.samples = samples
        self.limit = max(int(max_bad_fraction * samples), min(5, samples // 10)) if max_bad_fraction > 0 else 0
        self._path = path
        self._quiet = quiet
        self._found: dict[int, tuple[int, Skip]] = {}
        if path is not None:
            path.unlink(missing_ok=True)  # of an earlier start, which may have gone further than what is resumed

    def __len__(self) -> int:
        return len(self._found)

    def get(self, index: int) -> Skip | None:
        """Why the sample at this place was skipped, or None."""
        return self._found[index][1] if index in self._found else None

    def add(self, skips: Iterable[Skip], step: int = 0) -> None:
        """Count those that are new. Raises TooManyBadSamples past the limit (they are in the list then)."""
        new = sorted({skip.index: skip for skip in skips if skip.index not in self._found}.values(), key=lambda skip: skip.index)
        for skip in new:
            self._found[skip.index] = (step, skip)
            if not self._quiet and len(self) <= TOLD:
                more = f"; more will be told at the end{f' and in {self._path}' if self._path else ''}" if len(self) == TOLD else ""
                logger.warning("skipped %s%s", SampleError(skip.id, skip.reason, skip.message), more)
        if new and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"step": step, **asdict(skip)}) + "\n" for skip in new)
        if len(self) > self.limit:
            raise TooManyBadSamples(self.text() + f"\nmore than {self.limit} are not allowed; repair the files, or raise max_bad_fraction")

    def state(self) -> list[dict[str, Any]]:
        """JSON-able rows, as in the file."""
        return [{"step": step, **asdict(skip)} for step, skip in self._found.values()]

    def load(self, rows: Sequence[dict[str, Any]]) -> None:
        """Remember what an earlier start found while training (what it found before the first step is found again anyway)."""
        for row in rows:
            if row["step"] > 0:
                self.add([Skip(**{key: value for key, value in row.items() if key != "step"})], row["step"])

    def by_reason(self) -> dict[str, list[str]]:
        """Ids by reason."""
        table: dict[str, list[str]] = {}
        for _, skip in self._found.values():
            table.setdefault(skip.reason, []).append(skip.id)
        return table

    def text(self) -> str:
        """The report for a person: how many, and each reason with a few samples and their files."""
        lines = [f"{len(self)} of {self.samples} samples are bad" + (f", all listed in {self._path}" if self._path and len(self) else "")]
        if not len(self):
            return lines[0]
        lines.append("  count  reason                 samples")
        for reason in self.by_reason():
            skips = [skip for _, skip in self._found.values() if skip.reason == reason]
            named = ", ".join(f"{skip.id} ({skip.file})" if skip.file else skip.id for skip in skips[:3])
            lines.append(f"{len(skips):>7}  {reason:<22} {named}{' ...' if len(skips) > 3 else ''}")
        return "\n".join(lines)
