"""What a routing costs: stepped scores, tasks, prices, tune, frontier. Knows a loaded model; knows no command line."""
