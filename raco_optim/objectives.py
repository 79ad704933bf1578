"""The objectives of a step: weights, names and losses, in one order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raco_optim._checks import checked_weights

if TYPE_CHECKING:
    from raco_optim.distributed.group import Group
    from raco_optim.wrapper.parameters import Parameters

Weights = Sequence[float] | Mapping[str, float]
Loss = Tensor | Callable[[], Tensor]
Losses = Iterable[Loss | None] | Mapping[str, Loss | None]
Gradient = list[Tensor | None]
Found = tuple[Tensor | None, Gradient]
"""Value and gradient of a loss; None for the value of an absent one."""


@dataclass(frozen=True)
class Pending:
    """Values and gradients of earlier micro-batches of a step."""

    names: tuple[str, ...]
    named: bool
    parameters: Parameters
    values: list[Tensor | None]
    rows: list[Gradient]

    def moved_to(self, parameters: Parameters) -> Pending:
        """Returns them for added or reordered parameters; raises if trained ones are gone."""
        if self.parameters.are(parameters):
            return self
        before = {id(p): j for j, p in enumerate(self.parameters.tensors)}
        places = [before.get(id(p)) for p in parameters.tensors]
        trained = {j for j, t in zip(places, parameters.trained, strict=True) if t}
        for row in self.rows:
            if any(g is not None and j not in trained for j, g in enumerate(row)):
                raise RuntimeError(
                    "parameters must not be frozen, removed or replaced between the micro-batches "
                    "of a step; some were. Call `zero_grad` and start the step again."
                )
        rows = [[None if j is None else row[j] for j in places] for row in self.rows]
        return replace(self, parameters=parameters, rows=rows)


@dataclass(frozen=True)
class Batch:
    """The input of one call of ``backward``, in the order of the weights, for all stages."""

    names: tuple[str, ...]
    losses: list[Loss | None]  # None for an absent loss
    weights: list[float]
    parameters: Parameters
    pending: Pending | None
    group: Group | None  # the processes that average their gradients; None for a single one
    through: Tensor | None  # the representation or the scalars per example, if the mode needs any
    retain_graph: bool

    @property
    def tensors(self) -> list[Tensor | None] | None:
        """The losses if none is a callable, else None."""
        found = [x for x in self.losses if x is None or isinstance(x, Tensor)]
        return found if len(found) == len(self.losses) else None

    @property
    def present(self) -> list[str | None]:
        """Names of the losses; None for the absent ones."""
        return [n if x is not None else None for n, x in zip(self.names, self.losses, strict=True)]


class Objectives:
    """Weights by position or by name, or none for any number of losses."""

    def __init__(self, weights: Weights | None) -> None:
        named = None if weights is None else _named(weights)
        self.names = None if named is None else tuple(named)
        values: Any = weights if named is None else named
        self.weights = None if weights is None else checked_weights(values)

    @property
    def number(self) -> int | None:
        """Number of losses; None if any is allowed."""
        return None if self.weights is None else len(self.weights)

    @property
    def given(self) -> Mapping[str, float] | tuple[float, ...] | None:
        """The weights, read-only: a mapping if given as one, else a tuple."""
        if self.weights is None or self.names is None:
            return None if self.weights is None else tuple(self.weights)
        return _ReadOnlyDict(zip(self.names, self.weights, strict=True))

    def replace(self, weights: Weights) -> None:
        """Replaces the weights of the same losses, or raises."""
        other = Objectives(weights)
        same = sorted(other.names or ()) == sorted(self.names or ())
        if not same or self.number not in (None, other.number):
            raise ValueError(
                f"`weights` must stay {_form(self.names, self.number)}; got {weights!r}."
            )
        given: Any = other.given
        self.weights = other.weights if self.names is None else [given[x] for x in self.names]

    def of(self, number: int) -> list[float]:
        """Returns the weights of `number` losses; uniform if none were given."""
        return self.weights or [1 / number] * number

    def order(self, losses: Losses, pending: Pending | None) -> tuple[tuple[str, ...], list[Any]]:
        """Returns names and losses in the order of the weights, as before, or raises."""
        names, number = self.names, self.number
        if pending is not None and number is None:
            names, number = pending.names if pending.named else None, len(pending.names)
        named = _named(losses)
        if named is not None and number is None:
            return tuple(named), list(named.values())
        if names is not None or named is not None:
            if names is None or named is None or set(named) != set(names):
                raise ValueError(
                    f"`losses` must be {_form(names, number)}, like the weights; got "
                    f"{type(losses).__name__ if named is None else f'the names {list(named)}'}."
                )
            return names, [named[name] for name in names]
        ordered = as_list(losses)
        if number is not None and number != len(ordered):
            few = len(ordered) < number
            raise ValueError(
                f"`losses` must hold one loss per weight, {number}; got {len(ordered)}. "
                f"{'Pass None for an absent loss' if few else 'Give each loss a weight'}."
            )
        return tuple(str(i) for i in range(len(ordered))), ordered

    def __str__(self) -> str:
        texts = [f"{x:.4g}" for x in self.weights or ()]
        if self.names is not None:
            pairs = zip(self.names, texts, strict=True)
            texts = [f"{shortened(name)!r}: {text}" for name, text in pairs]
        if len(texts) > 10:
            texts[3:] = [f"... {len(texts)} in all"]
        text = ", ".join(texts)
        return f"({text})" if self.names is None else f"{{{text}}}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"weights": self.weights, "names": None if self.names is None else list(self.names)}

    def loaded(self, state: Mapping[str, Any]) -> tuple[list[float] | None, list[int] | None]:
        """Returns weights, and the place of each loss in a state of the same losses; or raises."""
        weights, names = state["weights"], state["names"]
        try:
            same = sorted(names or ()) == sorted(self.names or ())
            same = same and (None if weights is None else len(weights)) == self.number
        except TypeError:
            same = False
        if not same:
            got = names or (len(weights) if isinstance(weights, list) else weights)
            raise ValueError(
                f"`state_dict` must be of the same losses, {self.names or self.number}; got {got}."
            )
        checked = None if weights is None else checked_weights(weights)
        if checked is None or self.names is None:
            return checked, None
        places = [names.index(name) for name in self.names]
        return [checked[place] for place in places], places


def is_mapping(values: Any) -> bool:  # noqa: ANN401  # checked here
    """Returns whether names lead to values, also in a TensorDict."""
    return hasattr(values, "keys") and hasattr(values, "__getitem__")


def is_single(losses: Any) -> bool:  # noqa: ANN401  # checked here
    """Returns whether this is a single loss."""
    several = is_mapping(losses) or isinstance(losses, Iterable)
    return not several or (isinstance(losses, Tensor) and losses.dim() == 0)


def as_list(losses: Any) -> list[Any]:  # noqa: ANN401  # checked here
    """Returns the losses as a list, or raises `TypeError`."""
    if is_single(losses):
        raise TypeError(
            f"`losses` must be a sequence or a mapping of losses; got a single "
            f"{type(losses).__name__}. Pass [loss]."
        )
    return list(losses.values() if is_mapping(losses) else losses)


def check_any_present(losses: Sequence[object]) -> None:
    """Raises `ValueError` if there is no loss or all are None."""
    if all(loss is None for loss in losses):
        got = "None for all of them" if losses else "none"
        raise ValueError(f"`losses` must hold at least one loss; got {got}.")


class _ReadOnlyDict(dict[str, float]):
    """Read-only weights by name; an attempt to change them says how to set them."""

    def _refuse(self, *_: object, **__: object) -> Any:  # noqa: ANN401
        raise TypeError(
            "`weights` is read-only. Set all weights at once, as in "
            "opt.weights = {**opt.weights, ...}, because they must sum to 1."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.load(weights_only=True) can read an OrderedDict. A copy may be changed.
        return OrderedDict, (), None, None, iter(self.items())


def shortened(name: str) -> str:
    """Returns a name for a table: on one line, at most 28 characters."""
    text = name if name.isprintable() and name.strip() else repr(name)
    return text if len(text) <= 28 else f"{text[:13]}...{text[-12:]}"


def _form(names: Sequence[str] | None, number: int | None) -> str:
    return f"a sequence of {number or 'any'}" if names is None else f"a mapping with {list(names)}"


def _named(values: Any) -> dict[str, Any] | None:  # noqa: ANN401  # a mapping or none
    """Returns a mapping with plain strings as names; None if `values` is not a mapping."""
    if not is_mapping(values):
        return None
    named: dict[str, Any] = {}
    for key in list(values.keys()):
        if not isinstance(key, str):
            raise TypeError(
                f"names of losses must be strings; got {key!r}, of type {type(key).__name__}. "
                f"Pass a sequence for losses without names."
            )
        name = str.__str__(key)  # not `str(key)`, which an enum overrides
        if name in named:
            raise ValueError(f"names of losses must differ; got {name!r} twice.")
        named[name] = values[key]
    return named
