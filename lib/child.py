"""What a process beside the server does with the datastore: a training, a batch or a scoring, which only read it.

Knows the datastore by what it can do, so that trainers and infers share it and nothing of the server is imported.
"""

from __future__ import annotations

RUN_SYNC = "run_sync: expected false, received true, which would hold up everybody else. Leave it out."


def only_read(store: object) -> None:
    """Makes the server the only one that writes the store's files; what a process beside it does first."""
    own = getattr(store, "only_read", None)
    if own is not None:  # ours, which also keeps to itself what it learns
        own()
    else:
        stop_watching(store)


def stop_watching(store: object) -> None:
    """A second process that watches the store's folder writes old states of its file over the server's."""
    observer = getattr(store, "_observer", None)
    if observer is not None and observer.is_alive():
        observer.stop()
        observer.join()
