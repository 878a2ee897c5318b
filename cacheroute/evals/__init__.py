"""Quality of a routing: stepped scores, tasks, prices, tune, frontier."""
