"""How often a controller looks for garbage: rarely, because it makes next to none.

Its objects hold each other in trees, so Python frees nearly all of them without looking. Looking took a fifth of the
time of the slowest answers about plans. Both programs call it, and `benchmarks.planning`.
"""

from __future__ import annotations

import gc

NEW_OBJECTS = 50_000
"""More than there were, before Python looks for circles among them."""


def collect_rarely() -> None:
    """From now on; what is there already (modules, settings) is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
