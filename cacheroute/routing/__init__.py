"""Which experts may run, which leave the cache, how many are held: names, parameters and files. The choice is in native/."""
