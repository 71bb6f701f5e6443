"""One module and one function per command, each read top to bottom. Who knows Ray: workers, runtime, counters, training.distributed."""
