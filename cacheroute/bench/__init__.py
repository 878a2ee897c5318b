"""Speed measurements: arms, runs, the control, the floor. Does not measure quality."""
