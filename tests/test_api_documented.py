"""Every public function, class and method has a docstring, and every tensor that it takes or gives has its shape."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_args, get_origin

import numpy as np
import pytest
from torch import Tensor

import blockem_tl

TABLE = (Path(blockem_tl.__file__).parent / "__init__.pyi").read_text()
AXES = "batch|pos|tokens|rank|d_model|d_sae|d_vocab|n_latents|n_directions|n_prompts|n_seeds|in|out"
SHAPE = re.compile(rf"\[(?:\.\.\., )?(?:{AXES})(?:,? (?:{AXES}))*\]")  # [batch pos d_model], [..., d_model], [n_seeds, n_prompts]


def public() -> dict[str, Any]:
    """Every public name with what it stands for; the names of a public module instead of the module."""
    found: dict[str, Any] = {}
    for name in re.findall(r"^from \.[\w.]* import (\w+)", TABLE, re.MULTILINE):
        thing = getattr(blockem_tl, name)
        if isinstance(thing, ModuleType):
            own = getattr(
                thing, "__all__", [key for key, value in vars(thing).items() if getattr(value, "__module__", "") == thing.__name__]
            )
            found |= {f"{name}.{key}": getattr(thing, key) for key in own if not key.startswith("_")}
        else:
            found[name] = thing
    return {name: thing for name, thing in found.items() if inspect.isclass(thing) or inspect.isfunction(thing)}


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the library gives a class, as functions."""
    for base in cls.__mro__:
        if base.__module__.startswith("blockem_tl"):
            for name, value in vars(base).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(function, FunctionType) and not name.startswith("_"):
                    yield f"{base.__name__}.{name}", function


def described() -> dict[str, Any]:
    """Everything that needs a docstring, once each."""
    found: dict[str, Any] = {}
    for name, thing in public().items():
        found[name] = thing
        if inspect.isclass(thing):
            found |= dict(methods(thing))
    return found


def has_docstring(thing: Any) -> bool:
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return bool(doc and doc.strip()) and not doc.startswith(f"{thing.__name__}(")  # the last: what dataclass writes of itself


def bare(annotation: Any) -> bool:
    """Whether a type has a tensor in it whose shape it does not say; what a function argument takes and gives is that function's."""
    if (
        hasattr(annotation, "dim_str")
        or get_origin(annotation) is Callable
        or getattr(get_origin(annotation), "__name__", "") == "Callable"
    ):
        return False
    if inspect.isclass(annotation) and get_origin(annotation) is None:
        return issubclass(annotation, (Tensor, np.ndarray))
    return any(bare(part) for part in get_args(annotation))


def without_shape(thing: Any) -> list[str]:
    """The arguments, fields and results of a function or class that are tensors, and whose shape neither type nor docstring says."""
    if inspect.isclass(thing):
        types = vars(thing).get("__annotations__", {})
    else:
        signature = inspect.signature(inspect.unwrap(thing))
        types = {name: parameter.annotation for name, parameter in signature.parameters.items()} | {"return": signature.return_annotation}
    tensors = [name for name, annotation in types.items() if not name.startswith("_") and bare(annotation)]
    return [] if SHAPE.search(thing.__doc__ or "") else tensors


DESCRIBED = described()


def test_everything_public_has_a_docstring() -> None:
    missing = [name for name, thing in DESCRIBED.items() if not has_docstring(thing)]
    assert not missing, f"{len(missing)} of {len(DESCRIBED)} have no docstring"
    assert len(DESCRIBED) > 150 and {"load_model", "LatentSet.union", "LiveAdapters.using", "organism.prompts", "plots.save"} <= set(
        DESCRIBED
    )


def test_every_tensor_has_its_shape() -> None:
    missing = {name: found for name, thing in DESCRIBED.items() if (found := without_shape(thing))}
    assert not missing


def test_what_is_missing_is_noticed() -> None:
    def no_words(x): ...

    def no_shape(x: Tensor) -> list[Tensor]:
        """Words."""
        return [x]

    def shape_in_words(x: Tensor | None) -> Tensor | None:
        """From [batch pos] to [batch pos]."""
        return x

    class Plain: ...

    assert not has_docstring(no_words) and not has_docstring(Plain)

    def no_axes(x: Tensor) -> None:
        """For a list, [x], or `f(x=[...])`."""

    assert without_shape(no_axes) == ["x"]
    assert without_shape(no_shape) == ["x", "return"] and not without_shape(shape_in_words)
    assert not without_shape(blockem_tl.steer)  # in its types


@pytest.mark.parametrize("module", ["blockem_tl.hooks", "blockem_tl.training.loop"])
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert importlib.import_module(module).__doc__
