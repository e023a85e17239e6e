"""What every loader process starts with."""

import signal


def outlive_signals(worker_id: int) -> None:
    """DataLoader's worker_init_fn. Ctrl-C, and launchers, signal loader processes too; the trainer needs them until it has saved.

    They end with the trainer: torch's workers watch for that.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
