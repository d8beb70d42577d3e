"""One learning method per file; a module's name is its key (``lib.plugins``)."""
