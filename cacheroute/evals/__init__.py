"""What a routing costs: scores of text and of tasks, one token per decode, paired against `original`."""
