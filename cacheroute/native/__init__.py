"""The C++ core (router, cache, store, hook) and its view from Python, native/bindings.py. Knows no command and no GGUF."""
