"""Sections made from components: the arguments of a constructor are the keys, its docstring describes them."""

import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from veomni.config.base import PathText, Section
from veomni.config.problems import Problem, explain, raise_problems
from veomni.errors import ConfigError

S = TypeVar("S", bound=Section)
_SCALARS = (int, float, str, bool, type(None))
_BLOCK = re.compile(r"^(?:Args|Attributes):\n((?:(?: .*)?\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+)(?: \([^)]*\))?:", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


class ComponentSection(Section):
    """The options of one component."""

    component: ClassVar[Callable[..., Any]]
    chosen: ClassVar[str] = ""
    """The name that a configuration chooses the component by."""

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the component."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}

    def build(self, *args: Any, **given: Any) -> Any:
        """Return the component of ``args``, of those arguments of ``given`` that it takes, and of these options."""
        component = type(self).component
        taken = inspect.signature(component).parameters.keys() & given.keys()
        return component(*args, **{key: given[key] for key in taken}, **self.arguments())

    def problems(self, config: Any, world: int | None) -> Iterator[Problem]:
        """Yield what the component cannot do in this configuration; see :meth:`Section.problems`."""
        check = getattr(type(self).component, "config_problems", None)
        return iter(()) if check is None else check(self, config, world)


@functools.cache
def section_of(
    component: Callable[..., Any],
    *,
    name: str | None = None,
    supplied: frozenset[str] = frozenset(),
    base: type[ComponentSection] = ComponentSection,
) -> type[ComponentSection]:
    """Return the section whose keys are the keyword arguments of ``component``, described by its docstring.

    Args:
        component: A class or a function, with annotations of plain values and a docstring in Google style.
        name: What a configuration chooses it by; None where nothing is chosen.
        supplied: Arguments that are not keys, as the run gives them.
        base: Section whose keys and methods it shares with others.
    """
    given: dict[str, Any] = dict(_fields(component, supplied))
    if name is not None:
        given = {"name": (Literal[name], Field(default=name, description="Which one it is.")), **given}
    summary = (inspect.getdoc(component) or component.__name__).partition("\n")[0]
    made = create_model(f"{component.__name__}Section", __base__=base, __doc__=summary, **given)
    made.component, made.chosen, made.configures = component, name or "", (component.__name__, *base.configures)
    return made


def checked(section: type[S], options: Mapping[str, Any]) -> S:
    """Return the section that holds ``options``, which were given in Python; ConfigError where one does not fit."""
    try:
        return section.model_validate({key: list(v) if isinstance(v, tuple) else v for key, v in options.items()})
    except ValidationError as error:
        owner = section.configures[0] if section.configures else section.__name__
        found = explain(error, section, {})
        raise_problems((each._replace(problem=f"{owner}.{each.problem}") for each in found), owner)
        raise


class Validated:
    """A dataclass whose values must have the types and ranges of their annotations, else it raises a ConfigError."""

    def __post_init__(self) -> None:
        component: Any = type(self)
        section = section_of(component)
        checked(section, {name: getattr(self, name) for name in section.model_fields})


def options_of(
    *components: Callable[..., Any], supplied: Collection[str] = (), renames: Mapping[str, str] | None = None
) -> type[Section]:
    """Return a section whose keys are the keyword arguments of several components; :meth:`Section.make` calls them.

    Of arguments with one name, the first decides default and description; ``supplied`` ones are not keys.
    """
    renames, fields = renames or {}, dict[str, Any]()
    for component in components:
        for name, field in _fields(component, supplied):
            fields.setdefault(renames.get(f"{component.__name__}.{name}", name), field)
    made = create_model("Options", __base__=Section, **fields)
    made.configures, made.renames = tuple(component.__name__ for component in components), renames
    return made


def _fields(component: Callable[..., Any], supplied: Iterable[str]) -> Iterator[tuple[str, tuple[Any, FieldInfo]]]:
    described = describe_arguments(component)
    scope = {**vars(typing), **vars(sys.modules[component.__module__])}
    for parameter in inspect.signature(component).parameters.values():
        if parameter.name in supplied or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = _plain(_evaluated(parameter.annotation, scope))
        if kind is not None:
            text = described.get(parameter.name, "")
            yield parameter.name, (kind, Field(default=_default(parameter), description=text))
        elif parameter.default is parameter.empty:
            problem = f"argument {parameter.name!r} of {component.__name__} cannot be given in a configuration"
            raise ConfigError(problem, "give it a default, or annotate it with plain values (int, str, list[str], ...)")


def _default(parameter: inspect.Parameter) -> Any:
    default = ... if parameter.default is parameter.empty else parameter.default
    if isinstance(default, Path):
        return str(default)
    return list(default) if isinstance(default, (tuple, frozenset)) else default


def _evaluated(annotation: Any, scope: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(scope))  # noqa: S307 - an annotation of an installed component
    except NameError:  # imported for type checkers only: no plain value
        return None


def _plain(annotation: Any) -> Any:
    """Return the type of YAML value that an annotation allows, or None."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS or origin is Literal:
        return annotation
    if annotation is Path:
        return PathText
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in map(_plain, parts) if kind is not None]
        return typing.Union[tuple(kinds)] if any(kind is not type(None) for kind in kinds) else None  # noqa: UP007
    mapping = origin in (dict, Mapping)
    inner = _plain(parts[mapping]) if mapping or origin in (Annotated, list, Sequence, tuple) else None
    if inner is None:
        return None
    if origin is Annotated:
        return Annotated[(inner, *parts[1:])]
    if mapping:
        return types.GenericAlias(dict, (str, inner))
    items = types.GenericAlias(list, inner)
    if origin is tuple and Ellipsis not in parts:
        return Annotated[items, Field(min_length=len(parts), max_length=len(parts))]
    return items


def describe_arguments(component: Callable[..., Any]) -> dict[str, str]:
    """Return what Google-style docstrings say of each argument, as plain text."""
    found: dict[str, str] = {}
    for documented in (component, getattr(component, "__init__", None)):
        for block in _BLOCK.findall(f"{inspect.getdoc(documented) or ''}\n"):
            _, *parts = _ENTRY.split(block)
            for name, text in zip(parts[::2], parts[1::2], strict=True):
                found.setdefault(name, _ROLE.sub(r"\1", " ".join(text.split())).replace("``", ""))
    return found
