"""How fast: arms, runs, the control, the floor. Knows a loaded model; knows no quality."""
