"""How the train stage imports its libraries: without torch's compiler, which it has no use for.

`train` calls `load_torch` before anything imports torch, and then `load_peft`. transformers and bitsandbytes mark
functions for the compiler, and torch marks its optimizers and checkpoints: each mark loads `torch._dynamo`, and with it
a thousand modules. Where nothing is compiled a mark means nothing. (accelerate puts off `torch.compiler.disable` for
the same reason, see its `hooks`.) Rules:

- In place of `torch._dynamo` stands a module that takes marks and does nothing. Whoever asks for anything else, or for
  a part of the compiler, gets the real one, from then on and for everybody: all works as ever, only it is loaded later.
- A module is hidden by the import system's own means, None in `sys.modules`, and only while one library is imported
  that knows how to do without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
PARTS = (f"{COMPILER}.", "torch._inductor")
LIGHT_PARTS = ("_trace_wrapped_higher_order_op", "config")
"""These need nothing of the compiler. transformers' masks take a class from the first, checkpoints ask the second."""
UNUSED = ("click", "scipy", "sklearn")
"""What httpx takes for its command line, transformers for the losses of object detection and, up to 5.17 at least, for
assisted generation."""
MARKS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph")


def load_torch() -> None:
    """Import torch and bitsandbytes."""
    _defer_compiler()
    # `torch.compile` fails for want of these, whereupon bitsandbytes keeps its functions for CPUs as they are.
    with _hidden(f"{COMPILER}.backends", "torch._inductor"):
        import_module("bitsandbytes")


def load_peft() -> None:
    """Import PEFT, and with it the part of transformers that every model needs."""
    with _hidden(*UNUSED), _alone():
        import_module("peft")


def _defer_compiler() -> None:
    """Import torch, unless the process has its compiler already."""
    torch = find_spec("torch")
    spec = torch and PathFinder.find_spec(COMPILER, torch.submodule_search_locations)
    if spec is None or COMPILER in sys.modules:
        return
    sys.modules[COMPILER] = _Marks(spec)
    sys.meta_path.insert(0, _PartFinder())
    for name in LIGHT_PARTS:
        import_module(f"{COMPILER}.{name}")


class _Marks(ModuleType):
    """`torch._dynamo` as long as nobody compiles."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__path__ = spec, spec.submodule_search_locations or []

    def __getattr__(self, name: str) -> Any:
        if name in MARKS:
            return _unmarked
        if name.startswith("__"):  # the import system asks
            raise AttributeError(name)
        return getattr(_load_compiler(), name)

    @staticmethod
    def graph_break() -> None:
        """Do nothing; torch's optimizers call it in every step."""


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """A decorator, with or without arguments, that leaves a function as it is."""
    return _unmarked if function is None else function


class _PartFinder(MetaPathFinder):
    """Loads the whole compiler when a part of it is imported, before that part could meet the stand-in."""

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PARTS) or name.removeprefix(PARTS[0]) in LIGHT_PARTS:
            return None
        _load_compiler()
        return spec_from_loader(name, _Loaded(sys.modules[name])) if name in sys.modules else None


class _Loaded(Loader):
    """Gives the import system the module that is there already; as long as that has a spec, it would load it again."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__
        module.__spec__ = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:  # noqa: ARG002 - it is loaded
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _load_compiler() -> ModuleType:
    if isinstance(sys.modules[COMPILER], _Marks):
        sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _PartFinder)]
        del sys.modules[COMPILER]
        compiler = import_module(COMPILER)
        for name in LIGHT_PARTS:  # loaded before, so not bound to it
            setattr(compiler, name, sys.modules[f"{COMPILER}.{name}"])
    return sys.modules[COMPILER]


@contextmanager
def _hidden(*names: str) -> Generator[None]:
    """Modules that are not to be found meanwhile, unless they are loaded already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is what the import system documents
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def _alone() -> Generator[None]:
    """As with a torch that was built without process groups: what shards models over them stays unloaded."""
    distributed: Any = import_module("torch.distributed")  # Any: one of its functions is replaced
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = is_available
