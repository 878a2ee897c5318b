"""What a model would be like on this machine, before it is loaded: memory, bytes read, tokens per second."""
