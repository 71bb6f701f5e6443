"""One module and one function per command, each read top to bottom. Only `runtime` and `training.distributed` know Ray."""
