"""How the patched engine gets onto this machine, and what the machine has. Knows nothing of models and routing."""
