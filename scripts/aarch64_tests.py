"""Which tests scripts/aarch64 runs, and why not the others: the one place that says so.

Emulation is ten to thirty times slower than a processor, and some of what tests ask for is not there: what mincore says of a
file, advice to drop pages, the facts of /proc, and a compiler of the emulated system.
"""

from __future__ import annotations

# What depends on the processor's arithmetic: the router against its numpy oracle, bit-identity with llama.cpp without the hook.
KERNELS = [
    "tests/test_router.py",
    "tests/test_identity.py",
    "tests/test_graph_order.py",
]
# And all of the core and of what drives it, at least once on ARM.
ALL = [
    *KERNELS,
    "tests/test_all_resident.py",
    "tests/test_budget.py",
    "tests/test_cache.py",
    "tests/test_custom_policy.py",
    "tests/test_direct_store.py",
    "tests/test_inspect.py",
    "tests/test_model_files.py",
    "tests/test_overlap.py",
    "tests/test_paired.py",
    "tests/test_prefetch.py",
    "tests/test_prompt_routing.py",
    "tests/test_read_ahead.py",
    "tests/test_replay.py",
    "tests/test_routing_state.py",
    "tests/test_simulate.py",
    "tests/test_speculate.py",
    "tests/test_store.py",
    "tests/test_task_profile.py",
    "tests/test_tiny_models.py",
    "tests/test_trace.py",
    "tests/test_tuned.py",
]
_MINCORE = "compares with what mincore says of a mapped file: the emulator leaves out MADV_PAGEOUT, so pages stay"
DESELECT = {
    "tests/test_direct_store.py::test_io_can_be_changed_and_changed_back": _MINCORE,
    "tests/test_direct_store.py::test_logits_do_not_depend_on_io": _MINCORE,
    "tests/test_inspect.py::test_a_split_model_of_100_gb_takes_less_than_a_second": "takes longer in emulation",
    "tests/test_tuned.py::test_layers_may_share_a_budget_unevenly": _MINCORE,
    "tests/test_direct_store.py::test_reads_during_compute_change_no_logit": _MINCORE,
    "tests/test_prefetch.py::test_a_wrong_prediction_is_cancelled_and_mostly_not_read": "reads end before slow code cancels",
}
