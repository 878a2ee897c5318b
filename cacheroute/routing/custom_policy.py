"""Custom routing policies in Python: `--routing python:package.module:ClassName`.

A complete example, in a file my_policy.py in the current folder (`--routing python:my_policy:Near`):

    import numpy as np

    class Near:
        '''Cached experts among the best 2K first, but the best one always.'''

        def __init__(self, n_expert, n_used, n_layers):
            self.n_used = n_used

        def choose(self, layer, z, mass, resident):
            ranked = np.argsort(-z, kind="stable")
            near = ranked[1 : 2 * self.n_used]
            order = np.concatenate([ranked[:1], near[resident[near]], near[~resident[near]]])
            return order[: self.n_used]

`choose` is called for every decoded token (prompts are routed by `original`) and layer (0, 1, ... of those with experts): z[E]
are the scores that the model ranks, -inf where an expert may not be chosen, mass[E] its router mass, resident[E] whether an
expert is in the cache. It returns K distinct experts; their order does not matter, and their weights are the model's own. An
optional reset() is called when a sequence starts. The arrays are copies. An exception, and a result that is not K
distinct experts, stop the run; what the class prints goes to stderr. Live and simulated runs call it in the same way; both are
slower than with a strategy in C++.

Does not depend on a model or a trace.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cacheroute import interrupts
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.native import bindings


def _stdout_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """What a user's code prints is no result."""
    return contextlib.redirect_stdout(sys.stderr)


def load(name: str) -> type[Any]:
    """The class of `package.module:ClassName`. Raises UsageError when there is none or it has no choose()."""
    module_name, _, class_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # the `cacheroute` program does not search it, `python -m` does
        sys.path.append(here)
    try:
        with _stdout_to_stderr():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as e:  # any error of the user's module
        raise UsageError(f"{module_name} cannot be imported ({type(e).__name__}: {e}).") from e
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not callable(getattr(found, "choose", None)):
        raise UsageError(f"{module_name} has no class {class_name} with a choose() method.")
    return found


class Policy:
    """A policy bound to a model. `callback` is a cr_policy; after a failure it chooses nothing, and check() raises the reason."""

    def __init__(self, name: str, n_expert: int, n_used: int, n_layers: int) -> None:
        cls = load(name)
        self._name, self._n_expert, self._n_used = cls.__name__, n_expert, n_used
        try:
            with _stdout_to_stderr():
                self._policy = cls(n_expert, n_used, n_layers)
        except (Exception, SystemExit) as e:
            raise CacherouteError(f"{self._name} could not be made ({type(e).__name__}: {e}).") from e
        self._tokens = [0] * n_layers
        self._error: CacherouteError | None = None
        self._interrupted = False
        self.callback = bindings.POLICY(self._call)

    def reset(self) -> None:
        """A sequence starts."""
        self._tokens = [0] * len(self._tokens)
        try:
            with _stdout_to_stderr():
                getattr(self._policy, "reset", lambda: None)()
        except (Exception, SystemExit) as e:
            raise CacherouteError(f"{self._name}.reset failed ({type(e).__name__}: {e}).") from e

    def check(self) -> None:
        """Raises the CacherouteError of the first call that failed, or KeyboardInterrupt: what ran after it is not what the
        policy chose."""
        interrupts.check()
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt
        if self._error:
            raise self._error

    @interrupts.shield
    def _call(self, _: Any, layer: int, z: Any, mass: Any, resident: Any, out: Any) -> int:
        try:  # around all that calls Python, where Ctrl-C may come
            if self._error or self._interrupted or interrupts.pending():
                return 1
            self._tokens[layer] += 1
            n = (self._n_expert,)
            arrays = [np.ctypeslib.as_array(pointer, n).copy() for pointer in (z, mass, resident)]
            with _stdout_to_stderr():
                chosen = self._policy.choose(layer, arrays[0], arrays[1], arrays[2].astype(bool))
            wrong = self._accept(chosen, out)
            cause = None
        except KeyboardInterrupt:
            self._interrupted = True
            return 1
        except BaseException as e:  # no exception may pass through C
            wrong, cause = f"{type(e).__name__}: {e}", e
        if wrong:
            at = f"decoded token {self._tokens[layer]}, layer {layer}"
            self._error = CacherouteError(f"{self._name}.choose failed at {at}: {wrong}.")
            self._error.__cause__ = cause
        return 1 if wrong else 0

    def _accept(self, chosen: Any, out: Any) -> str:
        """Fills `out`, or returns what is wrong."""
        ids = np.asarray(chosen)
        if ids.shape != (self._n_used,):
            return f"it returned the shape {ids.shape}, not ({self._n_used},)"
        if ids.dtype.kind not in "iu":
            return f"it returned {ids.dtype}, not whole numbers"
        if ids.min() < 0 or ids.max() >= self._n_expert:
            return f"expert {ids.min() if ids.min() < 0 else ids.max()} is not within 0..{self._n_expert - 1}"
        if len(set(ids.tolist())) < self._n_used:
            return f"it chose an expert twice: {ids.tolist()}"
        for i, e in enumerate(ids.tolist()):
            out[i] = e
        return ""
