"""One module per SAM family; the module's name is its key (see ``lib.plugins``). A size is a YAML row, not code."""
