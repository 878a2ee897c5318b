"""Routings, evictions and budgets: names, parameters and files. The choice itself is made in native/."""
