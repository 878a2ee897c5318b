"""A loaded model that yields tokens and statistics. Knows no command line and no text."""
