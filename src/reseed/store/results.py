"""Stored results of evaluations, in the run's folder, and the declarations of what they hold.

Tables and figures read both: a result by its folder, a declaration by the evaluation's name.

<run>/evaluations/<name>-<digest of the signed settings>/
    result.json       evaluation, settings, metrics, and the SHA-256 of the other files and of the
                      weights that were evaluated; written last
    <table>.parquet   long tables          latents.parquet   a row per latent
    failed.json       if there is no result: the error that prevented it
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reseed.config import Config, digest
from reseed.errors import ConfigError, ReseedError
from reseed.system.environment import environment
from reseed.system.files import atomic_write, atomic_write_json
from reseed.system.integrity import (
    DamagedFileError,
    check_files,
    describe_files,
    is_there,
    read_record,
    write_record,
)

FORMAT = 1
FOLDER = "evaluations"
_LATENTS = "latents"
_REMEDY = "`reseed evaluate` makes it again"


class EvaluationError(ReseedError):
    """Error for results that cannot be read or written."""


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation measures for every SAE, or for every latent.

    Attributes:
        name: its name in the results. Its column in files has the name of the evaluation as prefix
            (`column`).
        heading: heading of its column in tables, with a line break where it may be wrapped. Empty:
            files have the column, tables do not.
        help: its definition: a phrase without a full stop, for footnotes and the documentation.
        interval: tables show its mean over runs with the interval; summary.csv has all intervals.
        count: tables show its mean over runs with one decimal.
        optional: results have it only with some settings or for some SAEs.
        formula, source, advice: definition in letters, literature, and when to use the metric, for
            the documentation.
    """

    name: str
    heading: str = ""
    help: str = ""
    interval: bool = False
    count: bool = False
    optional: bool = False
    formula: str = ""
    source: str = ""
    advice: str = ""

    @property
    def note(self) -> str:
        """Footnote that explains the column."""
        heading = self.heading.replace("\n", " ")
        return f"**{heading}**: {self.help}."


FVU = Metric("fvu", "FVU", "fraction of variance unexplained at the end of training")
L0 = Metric("l0", "L0", "active latents per token at the end of training", count=True)


@dataclass(frozen=True)
class EvaluationDeclaration(Config, family="evaluation"):
    """Declaration of the metrics of an evaluation and of the table that shows them.

    The base class of the evaluations' configurations; tables find them by their names.

    Attributes:
        title: the question that the table answers; by default the evaluation's name.
        metrics: the metrics of an SAE, in the order of the columns.
        latents: the values of a latent. Those with a heading, which are fractions or flags, are
            shown as means over latents that other runs share and over orphans.
        run_metrics: metrics from the end of training that the table shows after its own, for
            example `FVU` and `L0`.
        spare: names of metrics that a narrow window can leave out, the least useful first.
        footnotes: how to read the table; by default the help of every metric that it shows.
    """

    title: ClassVar[str] = ""
    metrics: ClassVar[tuple[Metric, ...]] = ()
    latents: ClassVar[tuple[Metric, ...]] = ()
    run_metrics: ClassVar[tuple[Metric, ...]] = ()
    spare: ClassVar[tuple[str, ...]] = ()
    footnotes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the declaration, before anything is computed.

        Raises:
            TypeError: two names or headings are equal, or `spare` names no column.
        """
        super().__init_subclass__(**kwargs)
        cls.title = cls.title or cls.name
        shown = [*cls.shown().values()]
        for kind, given in {
            "name": [column(cls.name, metric.name) for metric in cls.metrics],
            "name of latents": [column(cls.name, metric.name) for metric in cls.latents],
            "heading": [metric.heading for metric in shown],
        }.items():
            if twice := sorted({one for one in given if given.count(one) > 1}):
                raise TypeError(f"{cls.__name__}: several metrics have the {kind} {twice}")
        if unknown := sorted({*cls.spare} - {metric.name for metric in shown}):
            raise TypeError(f"{cls.__name__}.spare: the table has no metrics {unknown}")

    @classmethod
    def shown(cls) -> dict[str, Metric]:
        """Return column → metric of all metrics that the table shows."""
        own = {column(cls.name, m.name): m for m in cls.metrics if m.heading}
        return own | {m.name: m for m in cls.run_metrics}

    @classmethod
    def remark(cls, values: Mapping[str, float]) -> str:
        """Return why a row of the table is empty, for a footnote; "" if it is not.

        Args:
            values: column → value of the row.
        """
        return ""

    @classmethod
    def notes(cls) -> tuple[str, ...]:
        """Return the footnotes."""
        return cls.footnotes or tuple(m.note for m in cls.shown().values() if m.help)


def declaration(evaluation: str, columns: Iterable[str]) -> type[EvaluationDeclaration]:
    """Return what an evaluation declares.

    The evaluations must be imported already (`reseed.evaluate.load_all`).

    Args:
        columns: columns of its stored results. If the evaluation is not installed any more, all of
            them are shown, without explanation.
    """
    try:
        known = Config.registered(EvaluationDeclaration.family, evaluation)
    except ConfigError:
        names = [of.removeprefix(f"{evaluation}_") for of in columns]
        metrics = tuple(Metric(name, name.replace("_", " ")) for name in names)
        found = {"name": evaluation, "title": evaluation, "metrics": metrics}
        return type("NotInstalled", (EvaluationDeclaration,), found)
    assert issubclass(known, EvaluationDeclaration)
    return known


@dataclass(frozen=True, eq=False)
class RowGroups:
    """A table too large for memory, written and read one row group at a time.

    Attributes:
        schema: the columns.
        pieces: the rows, one row group per piece; they can be iterated only once.
    """

    schema: pa.Schema
    pieces: Iterable[pa.Table]

    def write(self, path: Path) -> None:
        with pq.ParquetWriter(path, self.schema, compression="zstd") as writer:
            for piece in self.pieces:
                writer.write_table(piece, row_group_size=len(piece))


Table = pd.DataFrame | RowGroups
"""A long table to write. It can be read back as a frame, or from its file by row groups."""


@dataclass(frozen=True, eq=False)
class StoredEvaluation:
    """The result of one evaluation of one SAE.

    Attributes:
        evaluation: name of the evaluation (``faithfulness``).
        settings: its settings, as `Config.to_dict` returns them.
        metrics: numbers by name; None if the metric cannot be evaluated.
        tables: long tables by name; a stored result reads each as a frame on access.
        latents: arrays [num_latents] by name.
    """

    evaluation: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float | int | None]
    tables: Mapping[str, Any] = field(default_factory=dict)
    latents: Mapping[str, np.ndarray] = field(default_factory=dict)

    def write(self, folder: Path, **entries: Any) -> None:
        """Write the result to ``folder``; result.json, written last, marks it as complete.

        Args:
            entries: further entries of result.json, such as the run, its weights and the duration.
        """
        if _LATENTS in self.tables:
            raise EvaluationError(f"no table may have the name `{_LATENTS}`, which is reserved")
        # An older result must not be read with the new tables.
        (folder / "result.json").unlink(missing_ok=True)
        for name, table in self.tables.items():
            _write_table(folder / f"{name}.parquet", table)
        names = [f"{name}.parquet" for name in self.tables]
        if self.latents:
            names.append(f"{_LATENTS}.parquet")
            _write_table(folder / names[-1], pd.DataFrame(dict(self.latents)))
        record = {
            "format": FORMAT,
            "evaluation": self.evaluation,
            "settings": dict(self.settings),
            "metrics": {name: _plain(value) for name, value in self.metrics.items()},
            "tables": sorted(self.tables),
            "latents": sorted(self.latents),
            "ended": _now(),
            "environment": environment(),
            **entries,
            "files": describe_files(folder, names),
        }
        write_record(folder / "result.json", record)
        (folder / "failed.json").unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, weights: str | None = None) -> StoredEvaluation:
        """Read a result that `write` wrote, after verifying its files.

        Args:
            weights: SHA-256 of the SAE's weights; None: unknown.

        Raises:
            FileNotFoundError: there is no result.
            EvaluationError: the result is damaged, of another format, or of other weights.
        """
        path = folder / "result.json"
        try:
            record = read_record(path)
            check_files(folder, record.get("files", {}))
            if weights is not None and record.get("weights") != weights:
                raise EvaluationError(
                    f"{path} is of earlier weights of this SAE, which has been trained again since"
                    f": {_REMEDY}"
                )
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']}; this version reads {FORMAT}")
            tables = _LazyTables(folder, record["tables"])
            latents: dict[str, np.ndarray] = {}
            if record["latents"]:
                frame = pd.read_parquet(folder / f"{_LATENTS}.parquet")
                latents = {name: frame[name].to_numpy() for name in record["latents"]}
            return cls(record["evaluation"], record["settings"], record["metrics"], tables, latents)
        except FileNotFoundError:
            if not path.exists():
                raise
            raise EvaluationError(f"{path}: a table beside it is missing: {_REMEDY}") from None
        except DamagedFileError as error:
            raise EvaluationError(f"{error}: {_REMEDY}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}): {_REMEDY}") from error


class _LazyTables(Mapping[str, pd.DataFrame]):
    """The tables in a folder, each read on access.

    Raises:
        OSError, ValueError: a file is missing or is not parquet. The check reads only metadata.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._paths = {name: folder / f"{name}.parquet" for name in names}
        for path in self._paths.values():
            pq.read_metadata(path)

    def __getitem__(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self._paths[name])

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def result_folder(run_folder: Path, evaluation: str, signed: Mapping[str, Any]) -> Path:
    """Return the folder of a result, named by the signed settings of the evaluation.

    Args:
        run_folder: the folder of a run, or of an SAE.
    """
    return run_folder / FOLDER / f"{evaluation}-{digest(dict(signed))}"


def is_finished(folder: Path) -> bool:
    """Return True if the folder holds a finished result, damaged or not."""
    return is_there(folder / "result.json")


def write_failure(folder: Path, error: BaseException) -> None:
    """Record the error that prevented a result."""
    described = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "ended": _now(),
    }
    atomic_write_json(folder / "failed.json", described)


def column(evaluation: str, name: str) -> str:
    """Return a metric's column name in the tables of a sweep, with the evaluation as prefix
    (``faithfulness_kl``) unless the name has it already (``absorption_fraction``)."""
    return name if name.startswith(f"{evaluation}_") else f"{evaluation}_{name}"


def _write_table(path: Path, table: Table) -> None:
    if isinstance(table, RowGroups):
        atomic_write(path, table.write)
    else:
        atomic_write(path, lambda part: table.to_parquet(part, index=False))


def _plain(value: Any) -> float | int | None:
    """Convert a numpy or torch number to a Python number."""
    return value.item() if hasattr(value, "item") else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
