"""What asks a run to stop, and how its loader processes outlive that."""

import signal

# SIGUSR2 is submitit's; SIGUSR1 is not for us, NCCL uses it.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name)]


def outlive_signals(worker_id: int) -> None:
    """DataLoader's worker_init_fn. Ctrl-C, and launchers, signal loader processes too; the trainer needs them until it has saved.

    They end with the trainer: torch's workers watch for that.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
