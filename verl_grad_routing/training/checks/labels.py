"""What label sources ask of the data."""

from __future__ import annotations

from pathlib import Path

from verl_grad_routing.errors import UserError
from verl_grad_routing.training.checks.run import Run
from verl_grad_routing.training.trusted import EXTRA, KEY, column_of


def trusted_column(run: Run) -> None:
    """The column that says which prompts are trusted clean is in every training file."""
    name = run.settings.trusted_column
    if name is None:
        return
    if not run.routed:
        raise UserError(KEY, name, "without blocks nothing is kept; unset it")
    import pyarrow
    import pyarrow.parquet

    files = run.get("data.train_files")
    for file in files if isinstance(files, list) else [files]:
        path = Path(str(file)).expanduser()
        if path.suffix != ".parquet" or not path.is_file():
            continue
        try:
            schema = pyarrow.parquet.read_schema(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError("data.train_files", str(path), f"not a parquet file: {error}") from None
        names = list(schema.names)
        if column_of(name) != name and EXTRA in names:
            inner = schema.field(EXTRA).type
            fields = [inner.field(i).name for i in range(inner.num_fields)] if pyarrow.types.is_struct(inner) else []
            names += [f"{EXTRA}.{field}" for field in fields]
        if name not in names:
            raise UserError(KEY, name, f"{path} has no such column, it has {', '.join(names)}")
