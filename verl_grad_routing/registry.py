"""Names to classes: one registry per kind of method, open to other packages, refusing duplicates."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from verl_grad_routing.errors import UserError

T = TypeVar("T")

METHODS_GROUP = "verl_grad_routing.methods"


def nearest(word: str, options: list[str]) -> str:
    """A readable "did you mean" over ``options``."""
    close = difflib.get_close_matches(word, options, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(options))}"


class Registry(Mapping[str, type[T]], Generic[T]):
    """A mapping from method name to class.

    A registered class has a frozen dataclass ``Config`` and is constructed as ``cls(config)``.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises ``UserError`` when the name is taken or ``Config`` is no frozen dataclass."""

        def decorate(cls: type[T]) -> type[T]:
            if name in self._classes and self._classes[name] is not cls:
                raise UserError(f"{self.kind} registry", name, f"already {self._classes[name]!r}; pick another name")
            config = getattr(cls, "Config", None)
            if not (dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
                raise UserError(f"{self.kind} {name}", cls, "give the class a frozen dataclass named Config")
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return decorate

    def build(self, settings: Mapping[str, Any], where: str) -> T:
        """Build the method that ``settings['name']`` names; the other entries are its ``Config``'s fields.

        Args:
            settings: Plain mapping, e.g. ``{"name": "quantile", "route": 0.75}``.
            where: Configuration key of ``settings``, for error messages.
        """
        values = dict(settings)
        name = values.pop("name", None)
        if name not in self._classes:
            raise UserError(f"{where}.name", name, nearest(str(name), list(self._classes)))
        cls = self._classes[name]
        return cls(build_config(cls.Config, values, where))  # type: ignore[attr-defined,call-arg]

    def __getitem__(self, name: str) -> type[T]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


def build_config(config_class: type, values: Mapping[str, Any], where: str) -> Any:
    """Construct a frozen dataclass from a plain mapping; nested dataclasses too. Unknown keys are refused."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        key = unknown[0]
        raise UserError(f"{where}.{key}", values[key], nearest(key, list(fields)))
    built = {}
    for key, value in values.items():
        nested = fields[key].metadata.get("config")
        built[key] = build_config(nested, value, f"{where}.{key}") if nested and isinstance(value, Mapping) else value
    try:
        return config_class(**built)
    except UserError as error:
        raise UserError(f"{where}.{error.key}", error.value, error.fix) from None


def load_external_methods() -> None:
    """Import the modules that other packages name in the entry-point group ``verl_grad_routing.methods``.

    Raises:
        UserError: A package's module fails when it is imported, e.g. because it registers a name that is taken.
    """
    for entry_point in entry_points(group=METHODS_GROUP):
        try:
            entry_point.load()
        except Exception as error:  # whatever another package's code may raise
            package = entry_point.dist.name if entry_point.dist is not None else "a package"
            fix = f"{package} cannot register its methods ({_in_one_line(error)}); mend or uninstall it"
            raise UserError(f"entry point {METHODS_GROUP}:{entry_point.name}", entry_point.value, fix) from error


def _in_one_line(error: Exception) -> str:
    return " ".join((str(error) if isinstance(error, UserError) else repr(error)).split())
