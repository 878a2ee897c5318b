"""The table of faults: what can go wrong, the exit code, and the one sentence that says what to do."""
