"""Figures of the results that the commands have written."""
