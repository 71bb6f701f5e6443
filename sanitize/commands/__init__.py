"""One module and one function per command, each read top to bottom. Only `workers`, `runtime` and `training.distributed` know Ray."""
