"""Ranges of options: declared in a type annotation, checked in one place.

An option declares its range where it declares its type, `expectile: OpenUnitInterval = 0.7`, in a constructor or in a
dataclass of options that a constructor has as a parameter. `check_arguments` checks every argument of a constructor;
the decorator `checked` does so whenever the constructor is called, from the command line or from Python.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_offrl.errors import UserError, did_you_mean, require

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have: finite ones between two ends.

    Attributes:
        low: Lower end.
        high: Upper end.
        without_low: Whether the lower end itself is excluded.
        without_high: Whether the upper end itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.without_low else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.without_high else 'at most'} {self.high:.15g}")
        return " and ".join(parts) or "finite"


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, without_low=True)]
NonNegative = Annotated[float, Range(0)]
UnitInterval = Annotated[float, Range(0, 1)]  # [0, 1]
OpenUnitInterval = Annotated[float, Range(0, 1, without_low=True, without_high=True)]  # (0, 1)
Fraction = Annotated[float, Range(0, 1, without_low=True)]  # (0, 1]
ProperFraction = Annotated[float, Range(0, 1, without_high=True)]  # [0, 1)
Count = Annotated[int, Range(1, 2**31 - 1)]
Steps = Annotated[int, Range(0, 2**53)]
Width = Annotated[int, Range(1, 2**16)]  # units of a layer: two layers of 65,536 would take 17 GB
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what `seed_everything` accepts


def check(hint: Any, value: Any, option: str) -> None:
    """Check a value against the annotation of its option, inside groups and lists too.

    Args:
        hint: The annotation. `Range`s in it are checked, and the choices of a `Literal`; other types are the parser's.
        value: The value.
        option: Name of the option, as a user types it.

    Raises:
        UserError: The value is outside.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        _, *metadata = get_args(hint)
        for each in metadata:
            if isinstance(each, Range):
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                require(is_number and value in each, option, str(each), value)
    elif origin is Literal:
        if value not in get_args(hint):
            choices = ", ".join(str(each) for each in get_args(hint))
            raise UserError(f"{option}: must be one of {choices}, not {value}")
    elif origin in (Union, types.UnionType):
        if value is not None:
            (inner, *others) = [each for each in get_args(hint) if each is not type(None)]
            if not others:
                check(inner, value, option)
    elif origin is tuple and Ellipsis not in get_args(hint):
        for each_hint, each in zip(get_args(hint), value, strict=False):
            check(each_hint, each, option)
    elif isinstance(origin, type) and issubclass(origin, Sequence) and not isinstance(value, str):
        for each in value:
            check(get_args(hint)[0], each, option)
    elif dataclasses.is_dataclass(hint):
        for name, each_hint in get_type_hints(hint, include_extras=True).items():
            check(each_hint, getattr(value, name), f"{option}.{name}")


def check_arguments(hints: Mapping[str, Any], arguments: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Check the arguments of a constructor; make dataclasses of the groups that are given as dictionaries.

    Args:
        hints: Annotations by the names of the parameters.
        arguments: Values by the same names.
        prefix: What stands before the names when a user types them, e.g. `model.init_args`.

    Returns:
        The arguments.

    Raises:
        UserError: A value is outside of its range, or a group has no such option.
    """
    checked_arguments = dict(arguments)
    for name, value in arguments.items():
        hint, option = hints.get(name), f"{prefix}.{name}"
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            known = [each.name for each in dataclasses.fields(hint)]
            for key in value:
                if key not in known:
                    raise UserError(f"no option '{option}.{key}'{did_you_mean(key, known)}")
            value = checked_arguments[name] = hint(**value)  # type: ignore[operator]
        check(hint, value, option)
    return checked_arguments


def checked(prefix: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a constructor so that its arguments are checked, see `check_arguments`, before it runs."""

    def decorate(constructor: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(constructor)
        def construct(*args: P.args, **kwargs: P.kwargs) -> T:
            bound = bind(constructor, args, kwargs, prefix)
            return constructor(*bound.args, **bound.kwargs)

        return construct

    return decorate


def store_options(cls: type, prefix: str, attribute: str) -> None:
    """Let the constructor that a class defines check its arguments and store them, as plain values, before it runs.

    Args:
        cls: The class; nothing happens where it defines no constructor.
        prefix: See `check_arguments`.
        attribute: Name of the instance's attribute that receives them. Of a class and its parents only the
            constructor of the instance's own class stores arguments.
    """
    if "__init__" not in vars(cls):
        return
    constructor = vars(cls)["__init__"]

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = bind(constructor, (self, *args), kwargs, prefix)
        # The parent of a class without a constructor of its own stores them, too.
        if type(self).__init__ is construct:
            vars(self)[attribute] = plain(_without_kwargs(bound))
        constructor(*bound.args, **bound.kwargs)

    cls.__init__ = construct  # type: ignore[misc]


def _without_kwargs(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments without `self`, with those of `**options` beside the others."""
    _, *parameters = bound.signature.parameters.values()
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        value = bound.arguments[parameter.name]
        arguments.update(value if parameter.kind is parameter.VAR_KEYWORD else {parameter.name: value})
    return arguments


def bind(
    constructor: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], prefix: str
) -> inspect.BoundArguments:
    """Return the arguments of a call, with `self` and defaults, after `check_arguments`."""
    bound = inspect.signature(constructor).bind(*args, **kwargs)
    bound.apply_defaults()
    bound.arguments.update(check_arguments(type_hints(constructor), bound.arguments, prefix))
    return bound


@functools.cache
def type_hints(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a constructor; none where one refers to what its module does not know at run time."""
    try:
        return get_type_hints(constructor, include_extras=True)
    except NameError:
        return {}


def plain(value: Any) -> Any:
    """Return an option's value as plain Python values: dataclasses become dictionaries, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options with dotted names: `{"critic": {"expectile": 0.9}}` becomes `{"critic.expectile": 0.9}`."""
    result: dict[str, Any] = {}
    for name, value in options.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result
