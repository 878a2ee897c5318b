"""Figures of what the commands have written. Knows rows by the names of their fields."""
