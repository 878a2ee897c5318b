"""What a loaded model gives for tokens that are decoded one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cacheroute import Llama
from cacheroute.evals.perplexity import log_probabilities


def decoded(llm: Llama, **settings: Any) -> list[Any]:
    """Log-probabilities after each of 28 decoded tokens, with half of the experts in memory; `settings`: of configure()."""
    tokens = np.random.default_rng(1).integers(3, 300, 40).tolist()
    llm.configure(budget=max(llm.layout.n_expert // 2, llm.layout.n_used), **settings)
    llm.eval(tokens[:12])
    rows = []
    with llm.decoding():
        for token in tokens[12:]:
            llm.eval([token])
            rows.append(log_probabilities(llm))
    return rows


def last_logits(llm: Any) -> npt.NDArray[np.float32]:
    """[n_vocab]: of the last token, of any llama_cpp.Llama."""
    return np.array(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)), np.float32)


def assert_same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> None:
    """Stricter than equality, for which -0 is 0."""
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
