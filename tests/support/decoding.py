"""What a loaded model gives for tokens that are decoded one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

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
