"""Which code computes what layers with a state do beside products: scans of delta nets and Mamba, short convolutions.

Where flash-linear-attention, causal-conv1d or mamba-ssm is installed, transformers puts its kernels in the place of its
own code in torch once it is imported, whatever the device is. Rules:

- Kernels of packages compute on a GPU alone, and in jobs alone that need not be deterministic: nobody has shown that
  they give the same bits on every run.
- Everywhere else, and where layers are traced, torch computes: right, slower, and in more memory. Jobs are sized by it.
- One choice holds for a process and a family of models, as transformers' functions are its modules' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from inspect import getclosurevars, signature
from types import FunctionType, ModuleType
from typing import Any

from torch.nn import Module

DISTRIBUTIONS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}
"""The distributions whose kernels transformers takes, by the packages in them."""
PLACE = "is_new_implementation"
"""What transformers' wrapper around its own function calls whether a package has taken its place."""
OTHERS = "_by_package"


def packages(base: Module) -> dict[str, str | None]:
    """The distributions that have kernels for a model's layers, and their versions; None for one that is not here."""
    return {name: _version(name) for name in sorted({_distribution(each) for *_, each in _functions(base)})}


def settle(base: Module, *, by_packages: bool) -> None:
    """Let a model's layers be computed by the packages that are installed, or by torch."""
    for module, name, function in list(_functions(base)):
        setattr(module, name, function if by_packages else _in_torch(function))


def in_use(base: Module) -> dict[str, bool]:
    """Whether a package's kernel computes, by the names of transformers' functions."""
    found: dict[str, bool] = {}
    for module, name, function in _functions(base):
        found[name] = getattr(module, name) is function and bool(_closure(function)[PLACE])
    return found


def _functions(base: Module) -> Iterator[tuple[ModuleType, str, Any]]:
    """transformers' functions, as it has them, in the modules that the model's layers are of."""
    names = {type(each).__module__ for each in base.modules()}
    for module in (sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")):
        for name, value in list(vars(module).items()):
            function = getattr(value, OTHERS, value)
            if isinstance(function, FunctionType) and PLACE in function.__code__.co_freevars:
                yield module, name, function


def _in_torch(function: Any) -> Callable[..., Any]:
    """transformers' own function, which takes what it knows of what packages' are given."""
    own: Callable[..., Any] = function.__wrapped__
    known = signature(own).parameters

    @wraps(own)
    def compute(*args: Any, **fields: Any) -> Any:
        return own(*args, **{name: value for name, value in fields.items() if name in known})

    setattr(compute, OTHERS, function)
    return compute


def _closure(function: Any) -> dict[str, Any]:
    return dict(getclosurevars(function).nonlocals)


def _distribution(function: Any) -> str:
    package = str(_closure(function)["package"])
    return DISTRIBUTIONS.get(package, package)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
