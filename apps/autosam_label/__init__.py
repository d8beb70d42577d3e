"""The MONAI Label app: ``main.py`` is for its loader, ``server.py`` for its ASGI hook, ``start.py`` for people."""
