"""Progress for people at a terminal, and for whoever reads a log."""

import sys

from tqdm import tqdm

LOG_S = 30.0  # between two lines of a log


class Progress(tqdm):
    """tqdm at a terminal; elsewhere a line every half minute, which also tells a watching launcher that the work goes on."""

    def __init__(self, *arguments, disable: bool = False, **options):
        self.is_log = not getattr(sys.stderr, "isatty", lambda: False)()
        if self.is_log:
            options |= {"mininterval": LOG_S, "maxinterval": 2 * LOG_S, "ascii": True, "ncols": 0, "leave": False, "miniters": 1}
        super().__init__(*arguments, disable=disable, **options)

    def display(self, msg=None, pos=None, **more):
        if not self.is_log:
            return super().display(msg, pos, **more)
        if msg != "":  # "" clears the line at a terminal
            print(str(self) if msg is None else msg, file=sys.stderr, flush=True)
        return True

    def clear(self, nolock=False):
        if not self.is_log:
            super().clear(nolock)
